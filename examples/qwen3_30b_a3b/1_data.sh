#!/usr/bin/env bash
# Make the stores of Qwen3-30B-A3B, a mixture of experts, on 2 x 8 GPUs, and say what training on them will see.
#
# Usage: HF_DIR=Qwen3-30B-A3B examples/qwen3_30b_a3b/1_data.sh CHATS.jsonl VALID.jsonl
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PLAN_ARGS=(--seq-length 16384 --cp 2 --dp 8 --global-batch-size 64)
exec "$HERE/../make_stores.sh" "$1" "$2" "${PLAN_ARGS[@]}"
