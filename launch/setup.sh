# Sourced by demo.sh and test.sh: makes .venv where it is missing, and brings it up to date.
# Needs python3 (3.10 or newer) with venv, and pip's package index. Change nothing: a second run
# finds the stamp of what is installed and takes no time.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
venv=${DISTCLIP_VENV:-.venv}

"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 10):
    sys.exit(f"distclip needs Python 3.10 or newer, this is {sys.version.split()[0]}; "
             "name another one with PYTHON=python3.12")
PY

wanted=$(cat pyproject.toml launch/constraints.txt | cksum)
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/distclip-stamp" 2>/dev/null)" != "$wanted" ]; then
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    echo "installing into $venv (once; torch is large) ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint launch/constraints.txt --editable ".[dev]" || exit 1
    echo "$wanted" >"$venv/distclip-stamp"
fi
# One thread per rank: ranks on one machine would otherwise fight for its cores.
export OMP_NUM_THREADS=1
export PATH="$root/$venv/bin:$PATH"
