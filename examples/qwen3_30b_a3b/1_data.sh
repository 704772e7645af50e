#!/usr/bin/env bash
# Make the stores of Qwen3-30B-A3B, a mixture of experts, on 2 x 8 GPUs, and say what training on them will see.
#
# Usage: HF_DIR=Qwen3-30B-A3B examples/qwen3_30b_a3b/1_data.sh CHATS.jsonl VALID.jsonl
set -euo pipefail

: "${HF_DIR:?name the Hugging Face folder of the model}"
RUN_DIR=${RUN_DIR:-run}
PLAN_ARGS=(--cp 2 --dp 8 --global-batch-size 64)

mkdir -p "$RUN_DIR"
megasft build --input "$1" --tokenizer "$HF_DIR" --output "$RUN_DIR/store" --max-tokens 16384
megasft build --input "$2" --tokenizer "$HF_DIR" --output "$RUN_DIR/valid-store" --max-tokens 16384
megasft lint "$RUN_DIR/store"
megasft plan "$RUN_DIR/store" --seq-length 16384 "${PLAN_ARGS[@]}" --model-config "$HF_DIR" \
  --plot "$RUN_DIR/plan.png"
