#!/usr/bin/env bash
# Run the whole quickstart on a CPU: text, tokenizer, model, store, training, conversion, answer.
#
# Usage: examples/quickstart/run.sh                    into the folder demo
#        DEMO_DIR=/tmp/demo DEMO_STEPS=4 examples/quickstart/run.sh    the road, without learning much
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PATH="$HERE/../../.venv/bin:$PATH" # what tools/make_venv.sh made, if it did
export DEMO_DIR=${DEMO_DIR:-demo} DEMO_STEPS=${DEMO_STEPS:-100}
readonly HALF=$((DEMO_STEPS / 2))
readonly MARKER=$DEMO_DIR/.made-by-quickstart
readonly QUESTION='What is the first line of the Zen of Python?'
readonly ANSWER='Beautiful is better than ugly.'

heading() {
  if [[ -t 1 ]]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi
}

if [[ -e $MARKER ]]; then
  rm -rf "$DEMO_DIR"
elif [[ -e $DEMO_DIR ]]; then
  printf '%s exists and was not made by this script; move it away or set DEMO_DIR\n' "$DEMO_DIR" >&2
  exit 1
fi
mkdir -p "$DEMO_DIR"
touch "$MARKER"

heading '1. Conversations, from the docstrings of the standard library'
python "$HERE/1_make_conversations.py" \
  --output "$DEMO_DIR/conversations.jsonl" --valid "$DEMO_DIR/valid.jsonl"

heading '2. A tokenizer of 2,048 tokens with a ChatML template'
python "$HERE/2_train_tokenizer.py" --input "$DEMO_DIR/conversations.jsonl" --output "$DEMO_DIR/hf"

heading '3. A Hugging Face model with random weights, and what training needs of both'
python "$HERE/3_make_model.py" --tokenizer "$DEMO_DIR/hf" --output "$DEMO_DIR/hf" --seed 0
megasft build --input "$DEMO_DIR/conversations.jsonl" --tokenizer "$DEMO_DIR/hf" \
  --output "$DEMO_DIR/store"
megasft build --input "$DEMO_DIR/valid.jsonl" --tokenizer "$DEMO_DIR/hf" \
  --output "$DEMO_DIR/valid-store"
megasft inspect "$DEMO_DIR/store"
megasft convert hf-to-megatron --hf "$DEMO_DIR/hf" --output "$DEMO_DIR/megatron"

heading "4. Training: $HALF steps as TP 2 x CP 2, resumed as DP 2 x PP 2 until step $DEMO_STEPS"
"$HERE/4_train.sh"

heading '5. Back to a Hugging Face folder'
megasft convert megatron-to-hf --checkpoint "$DEMO_DIR/checkpoints" --like "$DEMO_DIR/megatron" \
  --output "$DEMO_DIR/trained-hf"

heading '6. The loss'
python "$HERE/6_plot_loss.py" --tensorboard "$DEMO_DIR/tensorboard" --output "$DEMO_DIR/loss.png" \
  --mark "$HALF:TP 2 x CP 2 -> DP 2 x PP 2" | tee "$DEMO_DIR/loss.txt"
megasft plot "$DEMO_DIR/checkpoints" --output "$DEMO_DIR/run.png"

heading '7. The trained model answers'
EXPECTED=(--expect "$ANSWER")
if ((DEMO_STEPS < 100)); then EXPECTED=(); fi # too few steps to have learned it
python "$HERE/7_ask.py" --model "$DEMO_DIR/trained-hf" --question "$QUESTION" "${EXPECTED[@]}"

heading 'Done'
tail -n 2 "$DEMO_DIR/loss.txt"
printf 'Hugging Face checkpoint: %s\n' "$DEMO_DIR/trained-hf"
