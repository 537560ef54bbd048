"""Khronos' glTF validator, an npm package, for tests that are skipped where it cannot be had."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

VERSION = "2.0.0-dev.3.10"
PATIENCE_S = 30
FOLDER = Path(__file__).resolve().parents[2] / ".pgc_cache" / "npm"

# Reads paths from the command line, writes {path: [{code, severity, pointer, message}]}.
PROGRAM = """
const validator = require('gltf-validator'), fs = require('fs');
(async () => {
  const found = {};
  for (const path of process.argv.slice(1)) {
    const report = await validator.validateBytes(new Uint8Array(fs.readFileSync(path)), {maxIssues: 100});
    found[path] = report.issues.messages;
  }
  console.log(JSON.stringify(found));
})();
"""


class Unavailable(Exception):
    """The validator cannot be had here; the message says why."""


@functools.cache
def _environment() -> dict[str, str] | str:
    """Environment in which node finds the package, which is installed once below the repository where it is not there; or why none."""
    if shutil.which("node") is None:
        return "node is not installed"
    installed = os.environ | {"NODE_PATH": str(FOLDER / "node_modules")}
    for environment in (dict(os.environ), installed):
        if subprocess.run(["node", "-e", "require('gltf-validator')"], env=environment, capture_output=True).returncode == 0:
            return environment
    if shutil.which("npm") is None:
        return "the npm package gltf-validator is not installed, and neither is npm"
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--prefix", str(FOLDER), "--no-audit", "--no-fund", "--fetch-retries=0", f"gltf-validator@{VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"npm could not fetch gltf-validator {VERSION} within {PATIENCE_S} s"
    if done.returncode != 0:
        return f"npm could not fetch gltf-validator {VERSION}: {done.stderr.strip()[-200:]}"
    return installed


def issues(paths: Sequence[Path]) -> dict[Path, list[str]]:
    """Errors and warnings (not information and hints) of each file, as lines. Raises Unavailable."""
    environment = _environment()
    if isinstance(environment, str):
        raise Unavailable(environment)
    command = ["node", "-e", PROGRAM, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    found = {Path(path): messages for path, messages in json.loads(done.stdout).items()}
    kinds = ("error", "warning")
    return {
        path: [f"{kinds[m['severity']]} {m['code']} {m.get('pointer', '')}: {m['message']}" for m in messages if m["severity"] < 2]
        for path, messages in found.items()
    }
