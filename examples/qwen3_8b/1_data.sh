#!/usr/bin/env bash
# Make the stores of Qwen3-8B on 8 GPUs, and say what training on them will see.
#
# Usage: HF_DIR=Qwen3-8B examples/qwen3_8b/1_data.sh CHATS.jsonl VALID.jsonl
set -euo pipefail

: "${HF_DIR:?name the Hugging Face folder of the model}"
RUN_DIR=${RUN_DIR:-run}
PLAN_ARGS=(--tp 2 --cp 2 --dp 2 --sequence-parallel --global-batch-size 32)

mkdir -p "$RUN_DIR"
megasft build --input "$1" --tokenizer "$HF_DIR" --output "$RUN_DIR/store" --max-tokens 32768
megasft build --input "$2" --tokenizer "$HF_DIR" --output "$RUN_DIR/valid-store" --max-tokens 32768
megasft lint "$RUN_DIR/store"
megasft plan "$RUN_DIR/store" --seq-length 32768 "${PLAN_ARGS[@]}" --model-config "$HF_DIR" \
  --plot "$RUN_DIR/plan.png"
