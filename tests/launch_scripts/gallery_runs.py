"""Folders as the launcher leaves them, with a small model in each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import trimesh
import yaml

from threestudio_pgc.export.pictures import save_png

PROMPTS = ("a zebra bunny", "a brick vase", "a golden <b>knot</b> & more")
METHODS = ("fantasia3d", "fantasia3d+pgc", "fantasia3d+sdxl", "fantasia3d+sdxl+pgc")
LOG = "step,train/norm_p50,train/norm_max,train/share_clipped\n9,,,\n9,0.1,5.0,0.25\n19,0.2,inf,0.5\n29,0.3,7.0,"


def make_glb(color=(200, 80, 40), size=1.0) -> bytes:
    """A box of one colour."""
    box = trimesh.creation.box((size, 0.6 * size, 0.3 * size))
    box.visual.face_colors = [*color, 255]
    return box.export(file_type="glb")


def make_run(folder: Path, prompt=PROMPTS[0], glb: bytes | None = None, step=10, record: dict | None = None, **settings) -> Path:
    """A run; `settings` are dotted keys with "__" for the dot. `glb` b"" for none."""
    parsed = {"name": "fantasia3d-pocket-pgc", "tag": folder.name, "seed": 0}
    parsed["system"] = {"geometry": {"mesh": "builtin:bunny"}, "prompt_processor": {"prompt": prompt}, "pgc": {"enabled": True}}
    for key, value in settings.items():
        *path, last = key.split("__")
        inside = parsed
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "parsed.yaml").write_text(yaml.safe_dump(parsed, sort_keys=False), encoding="utf-8")
    if record is not None:
        (folder / "record.json").write_text(json.dumps(record))
    if glb != b"":
        export = folder / "save" / f"it{step}-export"
        export.mkdir(parents=True)
        (export / "model.glb").write_bytes(make_glb() if glb is None else glb)
    return folder


def add_results(folder: Path, step=10) -> None:
    """A still, a contact sheet, a turntable and a log."""
    picture = np.full((8, 8, 3), 120, np.uint8)
    save_png(folder / "save" / f"it{step}-test" / "0.png", picture)
    save_png(folder / "save" / f"it{step}-test-sheet.png", picture)
    (folder / "save" / f"it{step}-test.mp4").write_bytes(b"a film")
    (folder / "csv_logs" / "version_0").mkdir(parents=True)
    (folder / "csv_logs" / "version_0" / "metrics.csv").write_text(LOG)


def make_comparison(folder: Path, prompts=PROMPTS, methods=METHODS) -> Path:
    """Every method for every prompt, each of another colour, with a record as compare.py writes it."""
    for r, prompt in enumerate(prompts):
        for c, method in enumerate(methods):
            record = {"label": f"{r}-{c}", "seconds": 12.5, "method": method, "prompt": prompt, "mesh": "builtin:bunny"}
            glb = make_glb((60 + 40 * r, 60 + 40 * c, 120), size=1.0 + r)
            add_results(make_run(folder / f"{r}-{c}", prompt, glb, record=record, system__pgc__enabled=bool(c % 2)))
    return folder
