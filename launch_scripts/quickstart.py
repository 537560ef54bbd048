"""Texture a mesh with the bundled model: the two launcher calls a user would make, train then export, and where the results are.

Run by quickstart.sh, which installs what this needs. Further arguments are config overrides, e.g. `trainer.max_steps=300`.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/fantasia3d-pocket-pgc.yaml"


def launch(*arguments: str) -> None:
    """One call of the standalone launcher; ends this script with its exit code if that is not zero."""
    command = [sys.executable, "launch_scripts/launch.py", "--config", CONFIG, "--gpu", "none", *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the launcher got it too, saves a checkpoint and says how to go on: let it
            continue
    if code:
        sys.exit(code)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit('usage: python launch_scripts/quickstart.py "PROMPT" MESH [key=value ...]')
    prompt, mesh, *overrides = sys.argv[1:]
    begun = time.perf_counter()
    slug = re.sub(r"\W+", "_", f"{prompt} {Path(mesh).stem.removeprefix('builtin:')}").strip("_")
    root = next((item.split("=", 1)[1] for item in overrides if item.startswith("exp_root_dir=")), "outputs")
    folder = Path(root) / "quickstart" / slug
    common = ["name=quickstart", f"tag={slug}", "use_timestamp=false", f"system.geometry.mesh={mesh}", *overrides]
    quoted = prompt.replace("\\", "\\\\").replace('"', '\\"')
    common.append(f'system.prompt_processor.prompt="{quoted}"')

    launch("--train", *common)
    launch("--export", *common, f"resume={folder}/ckpts/last.ckpt", "system.exporter.save_video=false")  # training has made it

    results = {"GLB": "*export*/*.glb", "Turntable": "*test*.mp4", "Contact sheet": "*test*sheet.png"}
    print(f"\n{prompt!r} took {time.perf_counter() - begun:.0f} s")
    for name, pattern in results.items():
        found = sorted((ROOT / folder / "save").glob(pattern), key=lambda path: path.stat().st_mtime)
        print(f"{name + ':':15}{os.path.relpath(found[-1], ROOT) if found else 'missing'}")


if __name__ == "__main__":
    main()
