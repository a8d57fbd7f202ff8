#!/bin/sh
# Fine-tune a Mistral or Mixtral model: 26 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch mistral "$@"
