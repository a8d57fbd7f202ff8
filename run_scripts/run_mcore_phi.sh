#!/bin/sh
# Fine-tune a Phi-3 or Phi-4 model: 25 arguments, explained by --help.
set -eu
. "$(dirname -- "$(readlink -f -- "$0")")/_python.sh"
exec "$python" -m toolkits.launch phi "$@"
