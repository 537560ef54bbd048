# Sourced by quickstart.sh and test.sh: makes .venv and installs into it what REQUIREMENTS names, once per change of those files.
# PGC_TORCH_INDEX=<url> installs torch from another index, for example one with CPU-only wheels: much smaller than PyPI's CUDA build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON_SYSTEM="${PYTHON:-python3}"
PYTHON=.venv/bin/python

if ! "$PYTHON_SYSTEM" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "Python 3.10 or newer is needed; found: $("$PYTHON_SYSTEM" --version 2>&1 || true). Set PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if ! "$PYTHON" -c '' 2>/dev/null; then
    rm -rf .venv
    if ! "$PYTHON_SYSTEM" -m venv .venv; then
        rm -rf .venv
        echo "Python cannot make virtual environments here. On Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
fi

stamp=".venv/installed-$(basename "$REQUIREMENTS" .txt)"
wanted="$(cat requirements*.txt constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "Installing into .venv (once; a few minutes on a slow line) ..."
    # torch first and by its exact version: anything that depends on it then finds it and pulls no other build.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check ${PGC_TORCH_INDEX:+--index-url "$PGC_TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --prefer-binary -r "$REQUIREMENTS" -c constraints.txt
    echo "$wanted" > "$stamp"
fi
