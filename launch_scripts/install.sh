#!/usr/bin/env bash
# Puts this extension into a threestudio checkout, or takes it out again: `bash launch_scripts/install.sh --help` says how.
# The Python that runs threestudio need not be the one that runs this: see --python.
set -euo pipefail

for python in "${PYTHON:-}" python3 python; do
    if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
        exec "$python" "$(dirname "${BASH_SOURCE[0]}")/install_host.py" "$@"
    fi
done
echo "install.sh: found no Python, wanted python3, 3.8 or newer. Set PYTHON=/path/to/python3" >&2
exit 5
