#!/usr/bin/env bash
# Make the stores of Llama-3.1-70B on 4 x 8 GPUs, by Slurm, and say what training on them will see.
#
# Usage: HF_DIR=Llama-3.1-70B-Instruct examples/llama31_70b/1_data.sh CHATS.jsonl VALID.jsonl
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PLAN_ARGS=(--seq-length 8192 --tp 8 --pp 4 --dp 1 --sequence-parallel --global-batch-size 64)
exec "$HERE/../make_stores.sh" "$1" "$2" "${PLAN_ARGS[@]}"
