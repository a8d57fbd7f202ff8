#!/bin/sh
# Fine-tune a Qwen3 model, with experts or without: 27 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch qwen3 "$@"
