#!/bin/sh
# Fine-tune a dense Qwen2.5-shaped model: 25 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch qwen "$@"
