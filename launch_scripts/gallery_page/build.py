"""Writing a gallery or a study as a folder of static files that opens from disk and from any web server."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from threestudio_pgc.export.files import require_space, write_bytes

from .model_viewer import SCRIPT, ModelViewer
from .runs import Run, differing

STATIC = Path(__file__).parent / "static"
MANIFEST = "files.json"  # in every folder that is written here: what belongs to it
FORMAT = "threestudio_pgc gallery"
STUDY_FORMAT = "threestudio_pgc study"


def write_gallery(runs: Sequence[Run], output: Path, title: str, viewer: ModelViewer) -> Path:
    """Write the gallery: one row per (prompt, mesh), one column per method, both in the order in which the runs have them.

    A gallery that is there already is replaced, once the new one is complete.

    Returns:
        its page.
    Raises:
        ValueError: `output` holds something else, or cannot be written.
    """
    rows, methods = _axes(runs)
    page: dict[str, Any] = {"title": title, "methods": methods, "rows": []}
    with _replacing(output, runs) as folder:
        _copy_static(folder, viewer, "index.html", "gallery.js")
        for r, row in enumerate(rows):
            in_row = [run for run in runs if run.row == row]
            cells: list[dict[str, Any] | None] = [None] * len(methods)
            for run in in_row:
                column = methods.index(run.method)
                cells[column] = _cell(folder, f"{r + 1:03d}-{column + 1:02d}", run)
            settings = [[key, [run.settings.get(key) for run in in_row]] for key in differing(in_row)]
            names = [run.method for run in in_row]
            page["rows"].append({"prompt": row[0], "mesh": row[1], "methods": names, "settings": settings, "cells": cells})
        _write_data(folder / "data.js", "GALLERY", page)
    return output / "index.html"


def write_study(runs: Sequence[Run], output: Path, title: str, seed: int, viewer: ModelViewer) -> Path:
    """Write a blind preference study: the paper's user study (5.4), one pick among all methods per prompt.

    Nothing in the folder names a method: assets are called by a hash, and each participant sees them in an order of their own. What
    the hashes stand for is kept beside the folder, in `key_file`, for the tally.

    Raises:
        ValueError: fewer than two methods, a method without a usable export in some row, or `output` as in `write_gallery`.
    """
    rows, methods = _axes(runs)
    names = _names(rows)
    table = {(run.row, run.method): run for run in runs}
    if len(methods) < 2:
        raise ValueError(f"--study: found one method, {methods[0]!r}, wanted at least two to choose between")
    for row in rows:
        for method in methods:
            run = table.get((row, method))
            if run is None or run.glb is None:
                found = "no run" if run is None else f"in {run.folder} {run.problem}"
                raise ValueError(f"--study: for {names[row]!r} and method {method!r} found {found}; wanted every method for every prompt")
    whole = hashlib.sha256(json.dumps([rows, methods]).encode())
    for row in rows:
        for method in methods:
            whole.update(hashlib.sha256(table[row, method].glb.read_bytes()).digest())
    identity = whole.hexdigest()[:12]

    key = {"format": STUDY_FORMAT + " key", "study": identity, "prompts": list(names.values()), "methods": methods, "assets": {}}
    page: dict[str, Any] = {"study": identity, "seed": seed, "title": title, "rows": []}
    _check_key(output, identity)
    with _replacing(output, runs) as folder:
        _copy_static(folder, viewer, "study.html", "study.js")
        for r, row in enumerate(rows):
            options = []
            for c, method in enumerate(methods):
                run = table[row, method]
                # Made from the whole digest, of which the page shows a part, so that a name does not tell its column.
                asset = hashlib.sha256(f"{whole.hexdigest()}/{r}/{c}".encode()).hexdigest()[:12]
                key["assets"][asset] = [r, c]
                options.append({"asset": asset, "front": run.front_degrees, "still": _copy_file(folder, asset, "-still", run.still)})
                _write_asset(folder, asset, run.glb)
            options.sort(key=lambda option: option["asset"])
            page["rows"].append({"prompt": names[row], "options": options})
        _write_data(folder / "data.js", "STUDY", page)
        write_bytes(key_file(output), json.dumps(key, indent=1).encode())
    return output / "study.html"


def key_file(study: Path) -> Path:
    """Beside the study's folder, not in it: what is published does not tell."""
    study = study.absolute()
    return study.with_name(f"{study.name}-key.json")


def _axes(runs: Sequence[Run]) -> tuple[list[tuple[str, str]], list[str]]:
    return list(dict.fromkeys(run.row for run in runs)), list(dict.fromkeys(run.method for run in runs))


def _names(rows: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What a participant is asked about: the prompt, and the mesh only where the prompt stands in several rows."""
    prompts = [prompt for prompt, _ in rows]
    return {(p, mesh): f"{p} ({Path(mesh.removeprefix('builtin:')).stem})" if prompts.count(p) > 1 else p for p, mesh in rows}


def _cell(folder: Path, asset: str, run: Run) -> dict[str, Any]:
    if run.glb is not None:
        _write_asset(folder, asset, run.glb)
    return {
        "asset": asset if run.glb is not None else None,
        "bytes": run.glb.stat().st_size if run.glb is not None else None,
        "problem": run.problem,
        "front": run.front_degrees,
        "steps": run.steps,
        "seconds": run.seconds,
        "still": _copy_file(folder, asset, "-still", run.still),
        "video": _copy_file(folder, asset, "-turntable", run.video),
        "sheet": _copy_file(folder, asset, "-sheet", run.sheet),
        "statistics": {name: [[step, float(f"{value:.4g}")] for step, value in points] for name, points in run.statistics.items()},
        "yaml": run.settings_text,
    }


def _write_asset(folder: Path, asset: str, glb: Path) -> None:
    # A page on disk may not fetch a file beside it, but it may run a script: so the model comes as one.
    encoded = base64.b64encode(glb.read_bytes())
    (folder / "assets" / f"{asset}.js").write_bytes(b'receiveAsset("%s","%s")\n' % (asset.encode(), encoded))


def _copy_file(folder: Path, asset: str, ending: str, file: Path | None) -> str | None:
    """Returns the copy's address, relative to the page."""
    if file is None:
        return None
    name = f"assets/{asset}{ending}{file.suffix}"
    shutil.copyfile(file, folder / name)
    return name


def _copy_static(folder: Path, viewer: ModelViewer, *pages: str) -> None:
    (folder / "assets").mkdir()
    for name in ("page.css", "viewers.js", *pages):
        shutil.copyfile(STATIC / name, folder / name)
    (folder / SCRIPT).write_bytes(viewer.script)
    (folder / "model-viewer-LICENSE.txt").write_bytes(viewer.licence)


def _write_data(file: Path, variable: str, data: Any) -> None:
    file.write_text(f"const {variable} = {json.dumps(data, allow_nan=False)};\n", encoding="ascii")


def _check_key(output: Path, identity: str) -> None:
    file = key_file(output)
    if file.is_file():
        try:
            found = json.loads(file.read_text())["study"]
        except (ValueError, KeyError, TypeError):
            found = "something else"
        if found != identity:
            raise ValueError(
                f"{file}: found the key of study {found}, wanted none or that of {identity}; without it that study's results could not be "
                "tallied: choose another --output, or remove the file"
            )


@contextlib.contextmanager
def _replacing(output: Path, runs: Sequence[Run]) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends well."""
    output = output.absolute()
    _check_replaceable(output)
    files = [file for run in runs for file in (run.glb, run.video, run.sheet, run.still) if file is not None]
    require_space(output.parent, 4 * sum(file.stat().st_size for file in files) // 3 + 10_000_000)
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        names = sorted(str(file.relative_to(partial).as_posix()) for file in partial.rglob("*") if file.is_file())
        (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": names}, indent=0))
        if output.exists():
            shutil.rmtree(output)
        partial.replace(output)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"--output: found a file at {output}, wanted a new folder or a gallery")
    inside = {file.relative_to(output).as_posix() for file in output.rglob("*") if not file.is_dir()}
    try:
        manifest = json.loads((output / MANIFEST).read_text())
        ours = {*manifest["files"], MANIFEST} if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if foreign := sorted(inside - ours):
        raise ValueError(
            f"--output: found {foreign[0]} in {output}, which no gallery put there, and {len(foreign) - 1} more such files; "
            "wanted a new folder, an empty one or a gallery to replace"
        )
