#!/bin/sh
# convert_hf2mcore.sh SRC DST: a HuggingFace directory becomes a Megatron-core one. Flags may follow; see --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.cli convert hf2mcore "$@"
