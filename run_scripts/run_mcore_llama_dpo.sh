#!/bin/sh
# Train a Llama-shaped model on preference pairs (DPO): 26 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch llama_dpo "$@"
