#!/bin/sh
# build_sft_data.sh INPUT TOKENIZER_DIR OUTPUT_PREFIX [SEQ_LEN]: JSON records become a dataset. Flags may follow.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
[ "${1:-}" != --help ] || exec "$python" -m toolkits.cli data build --help
if [ $# -lt 3 ]; then
    echo "usage: sh build_sft_data.sh INPUT TOKENIZER_DIR OUTPUT_PREFIX [SEQ_LEN]; $# arguments given" >&2
    exit 2
fi
input=$1 tokenizer=$2 prefix=$3
shift 3
case ${1:-} in
[0-9]*)
    echo "SEQ_LEN $1 is not needed: the dataset serves every SEQ_LEN that training asks for" >&2
    shift
    ;;
esac
exec "$python" -m toolkits.cli data build "$input" "$prefix" --tokenizer "$tokenizer" "$@"
