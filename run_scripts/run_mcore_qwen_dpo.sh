#!/bin/sh
# Train a dense Qwen2.5-shaped model on preference pairs (DPO): 26 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch qwen_dpo "$@"
