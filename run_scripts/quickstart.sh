#!/bin/sh
# Prepare .venv, then run the whole line on a tiny model, or on yours: quickstart.sh [HF_DIR DATA.jsonl]
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_environment.sh"
prepare ""
exec "$python" -m toolkits.quickstart "$@"
