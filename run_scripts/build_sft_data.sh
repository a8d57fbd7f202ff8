#!/bin/sh
# build_sft_data.sh INPUT TOKENIZER_DIR OUTPUT_PREFIX [SEQ_LEN]: rows become a dataset. Flags of `data build` may follow.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
[ "${1:-}" != --help ] || exec "$python" -m toolkits.cli data build --help
given=$#
usage() {
    echo "usage: sh build_sft_data.sh INPUT TOKENIZER_DIR OUTPUT_PREFIX [SEQ_LEN] [FLAGS]; $1" >&2
    exit 2
}
[ $# -ge 3 ] || usage "$given arguments given"
for word in "$1" "$2" "$3"; do
    case $word in -?*) usage "$word stands where a path is expected; flags come last" ;; esac
done
input=$1 tokenizer=$2 prefix=$3 seq_len=
shift 3
case ${1:--} in
-*) ;;
*[!0-9]*) usage "SEQ_LEN is a number, not $1" ;;
*)
    seq_len=$1
    shift
    case ${1:--} in -*) ;; *) usage "$given arguments given" ;; esac
    ;;
esac
"$python" -m toolkits.cli data build "$input" "$prefix" --tokenizer "$tokenizer" "$@"
[ -n "$seq_len" ] || exit 0
# The dataset serves every SEQ_LEN; this one says what of it fits. Rows that are too long are cut when training starts.
exec "$python" -m toolkits.cli data check "$prefix" --tokenizer "$tokenizer" --seq-len "$seq_len" --allow too_long
