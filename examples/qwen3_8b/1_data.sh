#!/usr/bin/env bash
# Make the stores of Qwen3-8B on 8 GPUs, and say what training on them will see.
#
# Usage: HF_DIR=Qwen3-8B examples/qwen3_8b/1_data.sh CHATS.jsonl VALID.jsonl
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PLAN_ARGS=(--seq-length 32768 --tp 2 --cp 2 --dp 2 --sequence-parallel --global-batch-size 32)
exec "$HERE/../make_stores.sh" "$1" "$2" "${PLAN_ARGS[@]}"
