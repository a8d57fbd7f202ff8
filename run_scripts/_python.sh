# Sourced by the scripts beside it: sets `python` and lets it find the repository from any folder.
repository=$(cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -x "${VIRTUAL_ENV:-}/bin/python" ]; then
    python=$VIRTUAL_ENV/bin/python
elif [ -x "$repository/.venv/bin/python" ]; then
    python=$repository/.venv/bin/python
else
    python=python3
fi
# Safe path: another clone in the current folder must not be imported instead of this one.
export PYTHONSAFEPATH=1 PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
