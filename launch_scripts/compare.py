"""Compare methods over a list of prompts and meshes: every method on every row, a table of how long each took, and the gallery.

    python launch_scripts/compare.py LIST.csv --methods fantasia3d,+pgc,+sdxl,+sdxl+pgc [key=value ...]     # the paper's Figure 3
    python launch_scripts/compare.py LIST.csv --methods fantasia3d,+sdxl+pgc --figure 4 --devices 0,1       # the paper's Figure 4
    python launch_scripts/compare.py LIST.csv --methods "pocket,pocket+pgc,soft=fantasia3d-pocket-pgc;system.guidance.pgc.threshold=0.3"

LIST.csv has the columns prompt and mesh, and any further ones named by a key of the configuration, such as data.eval_elevation_deg: what
a row has there holds for its runs. Paths of meshes are relative to the list; builtin:NAME is a bundled one. Without a column mesh each
method has the mesh, or the shape to start from, of its own configuration. Later settings win: the configuration's, the method's, the row's,
those of the command line.

Every run is an ordinary launcher run, train to export, in OUTPUT/MESH-PROMPT/METHOD with its log.txt. The same command again skips what is
finished, goes on with what was stopped, from its last checkpoint, and tries again what failed. A run with other settings is in the way: the
first keys that differ are named, and --rerun replaces such runs, and only those. Whatever can be refused is refused before the first run.

Exit code: 0; 1 some run failed; 2 refused; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import re
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "custom")]

from launch_scripts.studies import PLACE, Job, StudyError, assign, prompt_override, run_all, shipped  # noqa: E402
from threestudio_pgc.export.files import ExportError, write_bytes  # noqa: E402
from threestudio_pgc.standalone.config import ConfigError, read_yaml  # noqa: E402
from threestudio_pgc.standalone.registry import nearest  # noqa: E402

OFF, ON = "system.guidance.pgc.enabled=false", "system.guidance.pgc.enabled=true"
NO_NORMALS = "system.loss.lambda_normal_sds=0"
# Methods by figure and name: the configuration and its overrides.
FIGURES: dict[str, dict[str, tuple[str, ...]]] = {
    "3": {
        "fantasia3d": ("fantasia3d-sd15-depth",),
        "+pgc": ("fantasia3d-sd15-depth-pgc",),
        "+sdxl": ("fantasia3d-sdxl",),
        "+sdxl+pgc": ("fantasia3d-sdxl-pgc",),
        "pocket": ("fantasia3d-pocket-pgc", OFF),
        "pocket+pgc": ("fantasia3d-pocket-pgc",),
        "pocket+rms": ("fantasia3d-pocket-pgc", "system.guidance.pgc.rule=view-rms"),
        "pocket+value": ("fantasia3d-pocket-pgc", "system.guidance.pgc.rule=clip-value"),
    },
    "4": {
        "fantasia3d": ("fantasia3d-joint-sd15-depth",),
        "+pgc": ("fantasia3d-joint-sd15-depth", ON),
        "+sdxl": ("fantasia3d-joint-sdxl-pgc", OFF),
        "+sdxl+pgc": ("fantasia3d-joint-sdxl-pgc",),
        "+sdxl+pgc-nrm": ("fantasia3d-joint-sdxl-pgc", NO_NORMALS),
        "pocket": ("fantasia3d-joint-pocket-pgc", OFF),
        "pocket+pgc": ("fantasia3d-joint-pocket-pgc",),
        "pocket+pgc-nrm": ("fantasia3d-joint-pocket-pgc", NO_NORMALS),
    },
}
GALLERY, STUDY = "gallery", "study"  # folders, in OUTPUT
DEFAULT_WORKERS = 2
LONGEST = 80  # characters of a run's folder
OPEN, CLOSED, QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class Method:
    name: str
    config: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """mesh: as it stands in the list, "" where the list has no such column. path: of it, absolute, or builtin:NAME."""

    line: int
    prompt: str
    mesh: str
    path: str
    overrides: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------ what is compared


def split(text: str, separator: str) -> list[str]:
    """Parts between separators that are in no quotes and no brackets. Raises StudyError where one of those is left open."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        else:
            depth += (character in OPEN) - (character in CLOSED)
        if character == separator and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if quote or depth:
        raise StudyError(f"--methods: found {text!r}, wanted every bracket and quote closed")
    return [part.strip() for part in parts]


def read_methods(text: str, figure: str) -> list[Method]:
    """`--methods`: names of the figure, or LABEL=CONFIG[;key=value...]. Raises StudyError."""
    methods = [_read_method(part, FIGURES[figure]) for part in split(text, ",")]
    twice = [name for name, count in Counter(method.name for method in methods).items() if count > 1]
    if twice:
        raise StudyError(f"--methods: found {twice[0]} twice, wanted each once")
    return methods


def _read_method(text: str, known: dict[str, tuple[str, ...]]) -> Method:
    name, equals, rest = (part.strip() for part in text.partition("="))
    if not equals:
        if name not in known:
            hint = nearest(name, known)
            hint += "" if hint.startswith("known") else f" known: {', '.join(known)}"
            raise StudyError(f"--methods: no method {name!r}; {hint}; or LABEL=CONFIG;key=value;...")
        config, *overrides = known[name]
        return Method(name, shipped(config), tuple(overrides))
    config, *overrides = split(rest, ";")
    path = shipped(config) if shipped(config).is_file() else Path(config)
    if not name or not path.is_file():
        stems = [file.stem for file in shipped("").parent.glob("*.yaml")]
        raise StudyError(f"--methods: found {text!r}, wanted LABEL=CONFIG, a YAML file or one of configs/; {nearest(config, stems)}")
    return Method(name, path, tuple(check_overrides(filter(None, overrides), f"--methods: {name}")))


def check_overrides(overrides: Iterable[str], where: str) -> list[str]:
    """The overrides, of which none sets what is set here. Raises StudyError."""
    overrides = list(overrides)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or key.startswith("-"):
            raise StudyError(f"{where}: found {override!r}, wanted key=value")
        if key in (*PLACE, "system.prompt_processor.prompt"):
            raise StudyError(f"{where}: found {key}, which is set by this script; wanted --output for the folder, the list for the prompts")
    return overrides


def read_list(path: Path) -> list[Row]:
    """The rows of LIST.csv: UTF-8, with or without BOM, commas or semicolons. Raises StudyError, with the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: found bytes that are not UTF-8, wanted a CSV file saved as UTF-8") from error
    head = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if ";" in head and "," not in head else ",", strict=True)
    lines = []
    try:
        for cells in reader:
            lines.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise StudyError(f"{path} line {reader.line_num}: {error}") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]  # spreadsheets leave empty ones at the end
    if not lines:
        raise StudyError(f"{path}: found nothing, wanted a line of columns, prompt and mesh, and rows below")
    (number, columns), *rest = lines
    _check_columns(f"{path} line {number}", columns)
    if not rest:
        raise StudyError(f"{path}: found no row below the columns, wanted at least one prompt")
    rows: dict[tuple[str, str], Row] = {}
    for number, cells in rest:
        where = f"{path} line {number}"
        if len(cells) != len(columns):
            raise StudyError(f"{where}: found {len(cells)} cells, wanted {len(columns)}; a prompt with a comma needs quotes around it")
        row = _row(where, number, dict(zip(columns, cells)), path.parent)
        earlier = rows.setdefault((row.prompt, row.path), row)
        if earlier is not row:
            raise StudyError(
                f"{where}: prompt and mesh are those of line {earlier.line}; to compare settings of one pair, make each a method"
            )
    return list(rows.values())


def _check_columns(where: str, columns: list[str]) -> None:
    if "prompt" not in columns:
        raise StudyError(f"{where}: found columns {', '.join(columns)}, wanted prompt among them")
    for column, count in Counter(columns).items():
        if count > 1:
            raise StudyError(f"{where}: found column {column!r} {count} times, wanted once")
        if column not in ("prompt", "mesh") and "." not in column:
            hint = nearest(column, ["prompt", "mesh"])
            raise StudyError(f"{where}: no column {column!r}; {hint}; others are full keys such as data.eval_elevation_deg")
    check_overrides((f"{column}=" for column in columns if "." in column), where)


def _row(where: str, line: int, cells: dict[str, str], folder: Path) -> Row:
    prompt, mesh = cells.pop("prompt"), cells.pop("mesh", None)
    if not prompt:
        raise StudyError(f"{where}: found no prompt, wanted one")
    if mesh == "":
        raise StudyError(f"{where}: found no mesh, wanted a file or builtin:NAME; without the column each method has its own")
    path = mesh or ""
    if path and not path.startswith("builtin:"):
        path = str((folder / Path(path).expanduser()).resolve())
    return Row(line, prompt, mesh or "", path, tuple(f"{key}={value}" for key, value in cells.items() if value))


# ----------------------------------------------------------------------------------------------------------------- what is run


def slugs(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """A folder's name for each. Those that would share one, on any file system, are told apart by a hash of the whole name."""
    short = [re.sub(r"\W+", "_", name).strip("_")[:LONGEST] for name in names]
    count = Counter(slug.casefold() for slug in (*short, *taken, ""))
    digest = [hashlib.sha256(name.encode()).hexdigest()[:8] for name in names]
    return [slug if count[slug.casefold()] == 1 else f"{slug}_{extra}".strip("_") for slug, extra in zip(short, digest)]


def make_jobs(rows: Sequence[Row], methods: Sequence[Method], output: Path, overrides: Sequence[str]) -> list[Job]:
    """Every method on the first row, then on the second, ... Raises StudyError for a method that takes no mesh where a row has one."""
    folders = slugs([f"{Path(row.path.removeprefix('builtin:')).stem} {row.prompt}" for row in rows], [GALLERY, STUDY])
    mesh_keys = [_mesh_key(method, overrides) if any(row.mesh for row in rows) else "" for method in methods]
    jobs = []
    for row, folder in zip(rows, folders):
        for method, name, key in zip(methods, slugs([method.name for method in methods]), mesh_keys):
            given = [prompt_override(row.prompt), "system.export_after_training=true"]
            given += [assign(key, f"mesh:{row.path}" if key.endswith("shape_init") else row.path)] if row.mesh else []
            about = {"method": method.name, "prompt": row.prompt, "mesh": row.mesh, "order": len(jobs)}
            label = f"{row.prompt} ({row.mesh}): {method.name}" if row.mesh else f"{row.prompt}: {method.name}"
            jobs.append(Job(label, output / folder / name, method.config, (*given, *method.overrides, *row.overrides, *overrides), about))
    return jobs


def _mesh_key(method: Method, overrides: Sequence[str]) -> str:
    """Where the mesh goes: a fixed one, or the shape that a moving one starts from."""
    from omegaconf import OmegaConf

    import threestudio_pgc.modules  # noqa: F401  registers the geometries
    from threestudio_pgc.host import find

    given = [override.partition("=")[2] for override in (*method.overrides, *overrides) if override.startswith("system.geometry_type=")]
    kind = (given or [OmegaConf.select(read_yaml(method.config, key=method.name), "system.geometry_type", default="")])[-1]
    try:
        schema = getattr(find(kind), "Config", None)
    except KeyError as error:
        raise StudyError(f"{method.name}: system.geometry_type: {error}") from error
    keys = {field.name for field in dataclasses.fields(schema)} if schema else set()
    for key in ("shape_init", "mesh"):
        if key in keys:
            return f"system.geometry.{key}"
    raise StudyError(f"{method.name}: found {kind!r}, which takes no mesh; wanted a geometry with a key mesh or shape_init")


def check(path: Path, rows: Sequence[Row], jobs: Sequence[Job]) -> None:
    """Every configuration, and every mesh once, read with the settings of its runs. Raises StudyError."""
    from threestudio_pgc.scene.mesh import MAX_FACES, MeshError, load_mesh

    row_of, read = {(row.prompt, row.mesh): row for row in rows}, set()
    for job in jobs:
        row = row_of[job.about["prompt"], job.about["mesh"]]
        wanted = (row.path, job.settings.get("system.geometry.max_faces", MAX_FACES), job.settings.get("system.geometry.up"))
        if not row.path or wanted in read:
            continue
        read.add(wanted)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the run's log has them
                load_mesh(row.path, max_faces=wanted[1], up=wanted[2])
        except MeshError as error:
            raise StudyError(f"{path} line {row.line}: mesh: {error}") from error


def choose_devices(devices: str | None, workers: int | None) -> list[str]:
    """The launcher's --gpu for each run at a time. Raises StudyError for a device that is not there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if workers is not None or (devices is None and count == 0):
        if workers is not None and workers < 1:
            raise StudyError(f"--workers: found {workers}, wanted at least 1")
        return ["none"] * (workers or DEFAULT_WORKERS)
    chosen = (devices or "0").split(",")
    if not all(re.fullmatch(r"\d+", device) for device in chosen) or len(set(chosen)) < len(chosen):
        raise StudyError(f"--devices: found {devices!r}, wanted different numbers with commas between")
    if max(map(int, chosen)) >= count:
        raise StudyError(f"--devices: found {devices}, wanted numbers below {count}, which is how many usable CUDA devices are here")
    return chosen


# ---------------------------------------------------------------------------------------------------------------- what comes of it


def table(rows: Sequence[Row], methods: Sequence[Method], records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines of cells, the columns' names first: prompt, mesh, and of each method its seconds, "failed", or "" where it was not run."""
    cells = [("failed" if "error" in record else f"{record['seconds']:.1f}") if record else "" for record in records]
    lines = [["prompt", "mesh", *(method.name for method in methods)]]
    for index, row in enumerate(rows):
        lines.append([row.prompt, row.mesh, *cells[index * len(methods) :][: len(methods)]])
    return lines


def print_table(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines)]
    for prompt, mesh, *cells in lines:
        print("  ".join([prompt.ljust(widths[0]), mesh.ljust(widths[1]), *(cell.rjust(width) for cell, width in zip(cells, widths[2:]))]))


def make_gallery(folders: Sequence[Path], output: Path, study: bool) -> None:
    """The gallery of the runs, in their order, with `study` the blind preference study instead. A failure is warned of: the runs stand."""
    command = [sys.executable, str(ROOT / "launch_scripts" / "gallery.py"), *map(str, folders), "--output", str(output)]
    command += ["--study"] if study else []
    sys.stdout.flush()
    if subprocess.run(command).returncode:
        print(f"warning: {output} was not made, the runs are not affected; to try again:\n  {shlex.join(command)}", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(f"methods of --figure {figure}: {', '.join(known)}" for figure, known in FIGURES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("list", type=Path, metavar="LIST.csv")
    parser.add_argument("--methods", required=True, help="with commas between: names, see below, or LABEL=CONFIG[;key=value;...]")
    parser.add_argument("--figure", choices=FIGURES, default="3", help="3: the mesh is fixed (default); 4: the shape moves")
    parser.add_argument("--output", type=Path, help="default: outputs/compare/ and the list's name")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--devices", metavar="N[,N...]", help="GPUs, a run at a time on each (default: the first)")
    where.add_argument("--workers", type=int, help=f"runs at a time on the CPU (default where there is no GPU: {DEFAULT_WORKERS})")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose prompt contains this text")
    parser.add_argument("--retries", type=int, default=1, help="of a run that fails (default: 1)")
    parser.add_argument("--rerun", action="store_true", help="replace runs that were made with other settings")
    parser.add_argument("--no-gallery", action="store_true", help="neither a gallery in OUTPUT/gallery nor a study")
    parser.add_argument("--study", action="store_true", help="write the blind preference study as well, in OUTPUT/study")
    args, overrides = parser.parse_known_args(argv)
    return args, [override for override in overrides if override != "--"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args, overrides = parse(argv)
    try:
        return compare(args, check_overrides(overrides, "command line"))
    except (StudyError, ConfigError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def compare(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    if args.retries < 0:
        raise StudyError(f"--retries: found {args.retries}, wanted 0 or more")
    rows, methods = read_list(args.list), read_methods(args.methods, args.figure)
    devices = choose_devices(args.devices, args.workers)
    output = args.output or Path("outputs", "compare", args.list.stem)
    jobs = make_jobs(rows, methods, output, overrides)
    chosen = [job for job in jobs if args.only in job.about["prompt"]]
    if not chosen:
        raise StudyError(f"--only: found {args.only!r}, wanted part of one of: {', '.join(row.prompt for row in rows)}")
    check(args.list, rows, chosen)

    done = {record["label"]: record for record in run_all(chosen, devices, retries=args.retries, rerun=args.rerun)}
    lines = table(rows, methods, [done.get(job.label) or job.record for job in jobs])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_bytes(output / "table.csv", text.getvalue().encode())
    print_table(lines)
    failed = [job for job in chosen if "error" in done[job.label]]
    for job in failed:
        print(f"failed: {job.label}: {done[job.label]['error']}\n  log: {job.log}", file=sys.stderr)
    begun = [job.folder for job in jobs if (job.folder / "configs" / "parsed.yaml").is_file()]
    if begun and not args.no_gallery:
        make_gallery(begun, output / GALLERY, study=False)
        if args.study:
            make_gallery(begun, output / STUDY, study=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
