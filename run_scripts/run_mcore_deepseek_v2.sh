#!/bin/sh
# Fine-tune a DeepSeek-V2 model: 26 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch deepseek_v2 "$@"
