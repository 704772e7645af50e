#!/usr/bin/env bash
# Make the stores of 128K tokens of context with CP 8, on 2 x 8 GPUs, and say what training on them will see.
#
# Usage: HF_DIR=Llama-3.1-8B-Instruct examples/long_context_128k/1_data.sh CHATS.jsonl VALID.jsonl
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PLAN_ARGS=(--seq-length 131072 --tp 2 --cp 8 --dp 1 --sequence-parallel --global-batch-size 8)
exec "$HERE/../make_stores.sh" "$1" "$2" "${PLAN_ARGS[@]}"
