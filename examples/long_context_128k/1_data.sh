#!/usr/bin/env bash
# Make the stores of 128K tokens of context with CP 8, on 2 x 8 GPUs, and say what training on them will see.
#
# Usage: HF_DIR=Llama-3.1-8B-Instruct examples/long_context_128k/1_data.sh CHATS.jsonl VALID.jsonl
set -euo pipefail

: "${HF_DIR:?name the Hugging Face folder of the model}"
RUN_DIR=${RUN_DIR:-run}
PLAN_ARGS=(--tp 2 --cp 8 --dp 1 --sequence-parallel --global-batch-size 8)

mkdir -p "$RUN_DIR"
megasft build --input "$1" --tokenizer "$HF_DIR" --output "$RUN_DIR/store" --max-tokens 131072
megasft build --input "$2" --tokenizer "$HF_DIR" --output "$RUN_DIR/valid-store" --max-tokens 131072
megasft lint "$RUN_DIR/store"
megasft plan "$RUN_DIR/store" --seq-length 131072 "${PLAN_ARGS[@]}" --model-config "$HF_DIR" \
  --plot "$RUN_DIR/plan.png"
