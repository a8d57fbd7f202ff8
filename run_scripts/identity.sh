#!/bin/sh
# Prepare .venv, then run the example pipeline (identity change: SFT, DPO, safety DPO) on a tiny model: identity.sh [FOLDER]
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_environment.sh"
prepare ""
exec "$python" -m toolkits.quickstart.identity "$@"
