#!/bin/sh
# Train a Qwen3 model, dense or with experts on preference pairs (DPO): 28 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch qwen3_dpo "$@"
