#!/bin/sh
# Fine-tune a GLM model: 25 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch glm "$@"
