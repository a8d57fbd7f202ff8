#!/bin/sh
# Fine-tune a Qwen2 model, with experts or without: 26 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch qwen2 "$@"
