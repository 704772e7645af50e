#!/usr/bin/env bash
# Make the stores of a recipe, say what is wrong with them, and what training on them will see.
#
# Usage: HF_DIR=MODEL examples/make_stores.sh CHATS.jsonl VALID.jsonl --seq-length N <flags of megasft plan>
set -euo pipefail

: "${HF_DIR:?name the Hugging Face folder of the model}"
RUN_DIR=${RUN_DIR:-run}
CHATS=$1 VALID=$2 SEQ_LENGTH=$4
PLAN_ARGS=("${@:3}")

mkdir -p "$RUN_DIR"
megasft build --input "$CHATS" --tokenizer "$HF_DIR" --output "$RUN_DIR/store" --max-tokens "$SEQ_LENGTH"
megasft build --input "$VALID" --tokenizer "$HF_DIR" --output "$RUN_DIR/valid-store" --max-tokens "$SEQ_LENGTH"
megasft lint "$RUN_DIR/store"
megasft plan "$RUN_DIR/store" "${PLAN_ARGS[@]}" --model-config "$HF_DIR" --plot "$RUN_DIR/plan.png"
