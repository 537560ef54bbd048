#!/usr/bin/env bash
# The whole test suite, on a bare machine: makes .venv, installs, checks style, runs the tests, a file at a time on each core. Arguments go to
# pytest; `-n 0` runs them in one process.
REQUIREMENTS=requirements-test.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PYTHON" -m ruff check .
# Single-threaded torch: on a few shared cores its thread pool costs these small tests more than it brings.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
