#!/bin/sh
# Prepare .venv, then lint and test. Arguments go to pytest.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_environment.sh"
prepare dev
cd -- "$repository"
"$python" -m ruff check .
exec "$python" -m pytest "$@"
