# Sourced: `prepare EXTRA` makes the clone's .venv with the EXTRA packages and sets `python`. PYTHON set: taken as it is.
repository=$(cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
venv=$repository/.venv

fail() {
    echo "error: $*" >&2
    exit 5
}

usable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

make_venv() {
    for candidate in python3.12 python3.11 python3; do
        usable "$candidate" || continue
        echo "making $venv with $candidate" >&2
        "$candidate" -m venv "$venv" && return
        fail "$candidate cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
    done
    fail "Python 3.11 or 3.12 is needed and neither was found; on Debian and Ubuntu: apt install python3 python3-venv"
}

prepare() {
    # Safe path: another clone in the current folder must not be imported instead of this one.
    export PYTHONSAFEPATH=1 PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
        return
    fi
    python=$venv/bin/python
    export PYTHON="$python"
    # One line an EXTRA; packages are installed again when setup.py or constraints.txt changes.
    stamp="$1 $(cat "$repository/setup.py" "$repository/constraints.txt" | cksum)"
    grep -qxF "$stamp" "$venv/installed" 2>/dev/null && return
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 || make_venv
    echo "installing into $venv: minutes the first time" >&2
    (cd "$repository" && "$python" -m pip install --disable-pip-version-check -c constraints.txt -e ".${1:+[$1]}") ||
        fail "the packages could not be installed"
    echo "$stamp" >>"$venv/installed"
}
