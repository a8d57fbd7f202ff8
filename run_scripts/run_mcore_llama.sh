#!/bin/sh
# Fine-tune a Llama model: 25 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch llama "$@"
