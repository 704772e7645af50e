#!/usr/bin/env bash
# Make the stores of Llama-3.1-70B on 4 x 8 GPUs, by Slurm, and say what training on them will see.
#
# Usage: HF_DIR=Llama-3.1-70B-Instruct examples/llama31_70b/1_data.sh CHATS.jsonl VALID.jsonl
set -euo pipefail

: "${HF_DIR:?name the Hugging Face folder of the model}"
RUN_DIR=${RUN_DIR:-run}
PLAN_ARGS=(--tp 8 --pp 4 --dp 1 --sequence-parallel --global-batch-size 64)

mkdir -p "$RUN_DIR"
megasft build --input "$1" --tokenizer "$HF_DIR" --output "$RUN_DIR/store" --max-tokens 8192
megasft build --input "$2" --tokenizer "$HF_DIR" --output "$RUN_DIR/valid-store" --max-tokens 8192
megasft lint "$RUN_DIR/store"
megasft plan "$RUN_DIR/store" --seq-length 8192 "${PLAN_ARGS[@]}" --model-config "$HF_DIR" \
  --plot "$RUN_DIR/plan.png"
