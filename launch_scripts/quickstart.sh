#!/usr/bin/env bash
# Texture a mesh with the bundled diffusion model, on a CPU, with no download but the Python packages:
#   bash launch_scripts/quickstart.sh ["PROMPT" [MESH]] [key=value ...]
# MESH is a file or builtin:bunny, builtin:teapot, builtin:vase, builtin:knot, builtin:lettered.
prompt="${1:-a zebra bunny}"
mesh="${2:-builtin:bunny}"
shift $(($# < 2 ? $# : 2))
# A relative mesh path is relative to where the user stands, not to the repository.
case "$mesh" in builtin:* | /*) ;; *) mesh="$PWD/$mesh" ;; esac

REQUIREMENTS=requirements.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" launch_scripts/quickstart.py "$prompt" "$mesh" "$@"
