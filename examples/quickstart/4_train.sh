#!/usr/bin/env bash
# Train 100 steps on four CPU processes: half as TP 2 x CP 2, then resumed as DP 2 x PP 2.
#
# Nothing else changes between the two calls, and the loss goes on as if nothing had: the rows and
# the divisor of the loss do not depend on the layout.
set -euo pipefail

DEMO_DIR=${DEMO_DIR:-demo}
STEPS=${DEMO_STEPS:-100}
HALF=$((STEPS / 2))
export CUDA_VISIBLE_DEVICES='' # the same demo on every machine
export OMP_NUM_THREADS=1       # four processes share the cores as it is

DATA_ARGS=(
  --megasft-data "$DEMO_DIR/store"
  --megasft-valid-data "$DEMO_DIR/valid-store"
  --seq-length 512
  --micro-batch-size 1
  --global-batch-size 8
)
MODEL_ARGS=(
  --megasft-hf "$DEMO_DIR/megatron"
)
TRAINING_ARGS=(
  --megasft-loss turn
  --calculate-per-token-loss
  --train-iters "$STEPS"
  --lr 5e-3
  --min-lr 5e-4
  --lr-decay-style cosine
  --lr-warmup-fraction 0.1
  --adam-beta2 0.95
  --weight-decay 0.01
  --clip-grad 1.0
)
OUTPUT_ARGS=(
  --load "$DEMO_DIR/checkpoints"
  --save "$DEMO_DIR/checkpoints"
  --save-interval "$HALF"
  --eval-interval "$HALF"
  --log-interval 1
  --tensorboard-dir "$DEMO_DIR/tensorboard"
  --tensorboard-log-interval 1
)

# Megatron prints a thousand lines of flags: all of it goes to the log, what tells the story is shown.
LOG=$DEMO_DIR/train.log
SHOWN='^\[megasft\]|(saved|loaded) checkpoint|[Ee]rror: '

train() { # the flags of one phase...
  torchrun --standalone --nproc-per-node 4 -m megasft.pretrain_sft \
    "${DATA_ARGS[@]}" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@" \
    2>&1 | tee -a "$LOG" | grep --line-buffered -E "$SHOWN" ||
    {
      printf 'training failed; the end of %s:\n' "$LOG" >&2
      tail -n 40 "$LOG" >&2
      return 1
    }
}

PARALLEL_ARGS=(--tensor-model-parallel-size 2 --context-parallel-size 2)
train "${PARALLEL_ARGS[@]}" --exit-interval "$HALF"

PARALLEL_ARGS=(--pipeline-model-parallel-size 2) # four processes: the other factor 2 is DP
train "${PARALLEL_ARGS[@]}"
