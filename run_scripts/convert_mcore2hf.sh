#!/bin/sh
# convert_mcore2hf.sh SRC DST: a Megatron-core directory becomes a HuggingFace one. Flags may follow; see --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.cli convert mcore2hf "$@"
