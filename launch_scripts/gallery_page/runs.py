"""What a gallery shows of a run of the launcher, read from the run's folder."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch_scripts.studies import flat

# Logged quantities, without their prefix "train/".
STATISTICS = ("share_clipped", "norm_p50", "norm_p99", "norm_max", "threshold", "nonfinite_pixels", "loss_sds")
MAX_POINTS = 200  # of each quantity; a drawing is not wider
# Settings that say where a run lies and what it is called, not what it did.
_BOOKKEEPING = re.compile(
    r"(name|description|tag|timestamp|use_timestamp|trial_name|trial_dir|exp_dir|exp_root_dir|resume|n_gpus)$"
    r"|system\.prompt_processor\.prompt$|system\.geometry\.mesh$|data\.image_path$|system\.guidance\.cond_image_path$"
)
_MAX_NAMED_SETTINGS = 3
_RECORD = {"prompt": str, "mesh": str, "method": str, "seconds": (int, float)}  # what is read of record.json


@dataclass
class Run:
    """One cell: a run of `method` on the row (prompt, mesh).

    Attributes:
        settings: dotted key -> value as text, of configs/parsed.yaml; settings_text: that file.
        glb: the newest export, or None, and then `problem` says what is wrong and what to do.
        front_degrees: azimuth about glTF's y axis, from +z, of the camera that stood at azimuth 0 in training.
        steps: optimisation steps of the export; seconds: of the run, where record.json says so.
        still, video, sheet: a view of azimuth 0, the turntable, the contact sheet.
        statistics: name in STATISTICS -> [(step, value)], at most MAX_POINTS each; only what was logged.
    """

    folder: Path
    prompt: str
    mesh: str
    method: str
    settings: dict[str, str]
    settings_text: str
    glb: Path | None = None
    problem: str = ""
    front_degrees: int = 0
    steps: int | None = None
    seconds: float | None = None
    still: Path | None = None
    video: Path | None = None
    sheet: Path | None = None
    statistics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def row(self) -> tuple[str, str]:
        return self.prompt, self.mesh


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs that the folders are or contain, each once, with names of methods that differ within every row.

    Order is that of the folders, and by name within one.

    Raises:
        ValueError: a folder does not exist, or is no run and holds none; a run's files cannot be understood.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: found {'a file' if folder.exists() else 'nothing'}, wanted the folder of a run")
        inside = _run_folders(folder)
        if not inside:
            raise ValueError(f"{folder}: found no configs/parsed.yaml in it or below, wanted a run of launch.py or a folder of runs")
        for run in inside:
            found.setdefault(run.resolve(), run)
    runs = [_read_run(folder) for folder in found.values()]
    _tell_methods_apart(runs)
    return runs


def read_glb_header(file: Path) -> dict[str, Any]:
    """The JSON part of a binary glTF 2.0 file. Raises ValueError unless the file is one, and whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(20)
        if len(header) < 20:
            raise ValueError(f"{file}: found {size} bytes, wanted a binary glTF (GLB) file")
        magic, version, length, json_length, kind = struct.unpack("<4sII I4s", header)
        if (magic, version, kind) != (b"glTF", 2, b"JSON"):
            raise ValueError(f"{file}: found magic {magic!r}, version {version}, wanted a binary glTF (GLB) 2 file")
        if length != size:
            raise ValueError(f"{file}: found {size} bytes, wanted the {length} that its header names; the file is cut short or damaged")
        try:
            return json.loads(stream.read(json_length))
        except ValueError as error:
            raise ValueError(f"{file}: found a JSON part that cannot be read ({error})") from error


def _run_folders(folder: Path) -> list[Path]:
    if (folder / "configs" / "parsed.yaml").is_file():
        return [folder]
    inside = sorted((child for child in folder.iterdir() if child.is_dir() and not child.is_symlink()), key=_natural)
    return [run for child in inside for run in _run_folders(child)]


def _natural(path: Path) -> list:
    """Sorts version_10 after version_9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _read_run(folder: Path) -> Run:
    config = folder / "configs" / "parsed.yaml"
    try:
        text = config.read_text(encoding="utf-8")
        parsed = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{config}: cannot be read ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{config}: found {type(parsed).__name__}, wanted the settings of a run")
    record = _read_record(folder / "record.json")
    settings = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in flat(parsed).items()}
    image = settings.get("data.image_path")
    prompt = record.get("prompt") or settings.get("system.prompt_processor.prompt") or (Path(image).name if image else None)
    if not prompt:
        raise ValueError(f"{config}: system.prompt_processor.prompt: found none, wanted a prompt (or data.image_path)")
    mesh = settings.get("system.geometry.mesh", "null")
    run = Run(
        folder=folder,
        prompt=prompt,
        mesh=record.get("mesh") or ("" if mesh == "null" else mesh),
        method=record.get("method") or settings.get("name") or folder.name,
        settings=settings,
        settings_text=text,
        seconds=record.get("seconds"),
        statistics=_read_statistics(folder / "csv_logs"),
    )
    _find_results(run)
    return run


def _read_record(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}: found {record!r:.80}, wanted an object")
    for name, kinds in _RECORD.items():
        if name in record and not isinstance(record[name], kinds):
            raise ValueError(f"{file}: {name}: found {record[name]!r:.80}, wanted {'a number' if name == 'seconds' else 'text'}")
    return record


def _find_results(run: Run) -> None:
    save = run.folder / "save"
    export = _newest(save, "export")
    glbs = sorted(export.glob("*.glb")) if export else []
    if glbs:
        try:
            header = read_glb_header(glbs[0])
        except ValueError as error:
            run.problem = f"broken export: {error}; {_how_to_export(run.folder)}"
        else:
            run.glb, run.steps = glbs[0], _step(export)
            # A mesh whose up is z stands in a turned node: its +x, azimuth 0, stays glTF's +x. In a mesh whose up is y, azimuth 0 is +z.
            run.front_degrees = 90 if any("rotation" in node for node in header.get("nodes", [])) else 0
    else:
        run.problem = f"no export; {_how_to_export(run.folder)}"
    frames = _newest(save, "test")
    if frames and (frames / "0.png").is_file():
        run.still = frames / "0.png"
    run.video = _newest(save, "test.mp4") or _newest(save, "test.gif")
    run.sheet = _newest(save, "test-sheet.png")


def _newest(save: Path, ending: str) -> Path | None:
    """save/itN-ENDING with the largest N."""
    found = [path for path in save.glob(f"it*-{ending}") if re.fullmatch(rf"it\d+-{re.escape(ending)}", path.name)]
    return max(found, key=_step, default=None)


def _step(path: Path) -> int:
    return int(re.match(r"it(\d+)-", path.name)[1])


def _how_to_export(folder: Path) -> str:
    checkpoint = folder / "ckpts" / "last.ckpt"
    if not checkpoint.is_file():
        return f"there is no checkpoint {checkpoint} to export from either: train the run again"
    config = folder / "configs" / "parsed.yaml"
    return f"run: python launch_scripts/launch.py --config {shlex.quote(str(config))} --export {shlex.quote(f'resume={checkpoint}')}"


def _read_statistics(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Values over steps; a run that was resumed has one log per start, and the later one counts."""
    points: dict[str, dict[int, float]] = {name: {} for name in STATISTICS}
    for file in sorted(logs.glob("version_*/metrics.csv"), key=lambda file: _natural(file.parent)):
        with file.open(newline="", encoding="utf-8", errors="replace") as stream:
            for line in csv.DictReader(stream):
                step = _number(line.get("step"))
                for name in STATISTICS:
                    value = _number(line.get(f"train/{name}"))
                    if step is not None and value is not None:
                        points[name][int(step)] = value
    return {name: _thinned(sorted(values.items())) for name, values in points.items() if values}


def _number(text: str | None) -> float | None:
    """None for an empty cell, for the torn last line of a log that is being written, and for what cannot be drawn."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _thinned(points: list) -> list:
    stride = math.ceil(len(points) / MAX_POINTS)
    return points[::-1][::stride][::-1]  # from the end, so that the last value is kept


def differing(runs: Sequence[Run]) -> list[str]:
    """Keys of settings whose values are not the same in all of the runs, in the order of the files."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not _BOOKKEEPING.match(key))
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def _tell_methods_apart(runs: Sequence[Run]) -> None:
    """Where one method has several runs in a row, add to its name the settings in which they differ, then numbers."""
    for method in dict.fromkeys(run.method for run in runs):
        same = [run for run in runs if run.method == method]
        rows = [[run for run in same if run.row == row] for row in dict.fromkeys(run.row for run in same)]
        # The settings that matter are those of all rows together, so that a method is called the same in each.
        keys = list(dict.fromkeys(key for row in rows for key in differing(row)))[:_MAX_NAMED_SETTINGS]
        for row in rows:
            taken: set[str] = set()
            for run in row:
                named = ", ".join(f"{'.'.join(key.split('.')[-2:])}={run.settings[key]}" for key in keys if key in run.settings)
                name = f"{method} ({named})" if named else method
                run.method, number = name, 1
                while run.method in taken:
                    number += 1
                    run.method = f"{name} #{number}"
                taken.add(run.method)
