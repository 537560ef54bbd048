"""Put this extension into a threestudio checkout, or take it out again.

bash launch_scripts/install.sh [THREESTUDIO_DIR] [--copy] [--python PYTHON]      links custom/threestudio_pgc and configs/threestudio_pgc
bash launch_scripts/install.sh THREESTUDIO_DIR --uninstall [--force]

Without THREESTUDIO_DIR the commit this was tested with is cloned into ./threestudio. All checks come before the first change, and what
fails half-way is undone. Exit codes: 0 done; 1 failed half-way and undone; 2 a wrong command line; 3 no threestudio there, or one that is
too old; 4 something is in the way; 5 the Python that runs threestudio is not found or lacks what loading the extension needs; 6 no
directory given and GitHub not reachable.

Needs the standard library only, of Python 3.8 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Where it goes in a checkout -> what goes there. threestudio looks for extensions in custom/ and for a --config from its own root.
PARTS = {"custom/threestudio_pgc": ROOT / "custom" / "threestudio_pgc", "configs/threestudio_pgc": ROOT / "configs"}
MANIFEST = "custom/threestudio_pgc.installed.json"  # beside the package: threestudio's loader passes over files that are not .py

REPOSITORY, COMMIT = "https://github.com/threestudio-project/threestudio", "28d9d80"
OLDEST_HOST, TESTED_HOST, UNTRIED_HOST = (0, 2, 0), "0.2.3", (0, 3)
OLDEST_PYTHON = (3, 10)

HALF_WAY, NO_THREESTUDIO, IN_THE_WAY, WRONG_PYTHON, NOT_REACHABLE = 1, 3, 4, 5, 6

# Package -> what does not work without it. Versions that are wanted are those of requirements.txt.
LOADING = ("torch", "numpy", "pytorch-lightning", "omegaconf")  # without these the package cannot even be imported
WITHOUT = {
    "torch": "anything",
    "numpy": "anything",
    "pytorch-lightning": "anything",
    "omegaconf": "anything",
    "diffusers": "every guidance but pgc-wrapped-guidance",
    "transformers": "pgc-prompt-processor, pgc-zero123-guidance",
    "safetensors": "reading models and encoded prompts",
    "accelerate": "nothing, but models load slower",
    "numba": "pgc-mesh-rasterizer, baked textures, .hdr lights, pgc-dmtet on a CPU",
    "scipy": "pgc-mesh-exporter",
    "trimesh": "pgc-textured-mesh",
    "xatlas": "exporting meshes that bring no texture coordinates",
    "libigl": "pgc-dmtet with shape_init a mesh",
    "fast-simplification": "exporting with fewer faces",
    "OpenEXR": ".exr lights",
    "imageio-ffmpeg": "turntables as .mp4",
    "nvdiffrast": "threestudio, which imports it; rendering on the GPU",
    "tinycudann": "threestudio, which imports it",
}
# First version with which threestudio itself does not start: it imports two functions that libigl renamed.
HOST_LIMITS = {"libigl": ((2, 6), "threestudio, which imports names that 2.6 dropped")}
NOT_ON_PYPI = ("nvdiffrast", "tinycudann")
# Of diffusers: the first version with what a part needs.
SINCE = (
    ((0, 18), "SDXL"),
    ((0, 19), "SDXL with a ControlNet"),
    ((0, 26), "convert_zero123.py"),
    ((0, 29), "Stable Diffusion 3"),
    ((0, 30), "FLUX"),
)

PROBE = """
import importlib.metadata, json, sys
found = {"python": "%d.%d.%d" % sys.version_info[:3]}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


class InstallError(Exception):
    """Nothing was changed. `code` is the exit code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


# ------------------------------------------------------------------------------------------------------------ versions


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    return tuple(int(number) for number in re.match(r"[\d.]*", version).group().split(".") if number)


class Wanted(NamedTuple):
    """A package's line of requirements.txt. oldest, limit: the first version that will do and the first that will not, or None."""

    requirement: str
    oldest: tuple[int, ...] | None
    limit: tuple[int, ...] | None


def wanted_versions(path: Path = ROOT / "requirements.txt") -> dict[str, Wanted]:
    wanted = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line:
            name = re.match(r"[\w.-]+", line).group()
            bounds = {sign: version_tuple(version) for sign, version in re.findall(r"(>=|<)([\d.]+)", line)}
            wanted[name] = Wanted(line, bounds.get(">="), bounds.get("<"))
    return wanted


def host_version(folder: Path) -> str:
    """The version of the threestudio checkout in `folder`. Raises InstallError where it is none, or one that is too old."""
    module = folder / "threestudio" / "__init__.py"
    for path, kind in ((folder, "folder"), (folder / "launch.py", "file"), (module, "file")):
        if not (path.is_dir() if kind == "folder" else path.is_file()):
            raise InstallError(NO_THREESTUDIO, f"{folder}: found no {kind} {path}, wanted the root of a threestudio checkout")
    match = re.search(r"""^__version__\s*=\s*["']([^"']+)""", module.read_text(encoding="utf-8"), re.MULTILINE)
    wanted = f"threestudio {'.'.join(map(str, OLDEST_HOST))} or newer ({TESTED_HOST} is tested)"
    if match is None:
        raise InstallError(NO_THREESTUDIO, f"{module}: found no __version__, wanted {wanted}")
    if version_tuple(match.group(1)) < OLDEST_HOST:
        raise InstallError(NO_THREESTUDIO, f"{folder}: found threestudio {match.group(1)}, wanted {wanted}")
    return match.group(1)


# ------------------------------------------------------------------------------------------- the Python of threestudio


def find_python(given: str | None) -> str:
    """The Python that runs threestudio: --python, that of the active environment, or `python` of the PATH."""
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise InstallError(WRONG_PYTHON, f"--python: found no program {given!r}, wanted the Python that runs threestudio")
        return found
    candidates = ["python", "python3"]
    if os.environ.get("VIRTUAL_ENV"):
        scripts = Path(os.environ["VIRTUAL_ENV"]) / ("Scripts" if os.name == "nt" else "bin")
        candidates.insert(0, str(scripts / "python"))
    for candidate in candidates:
        found = shutil.which(candidate)
        if found is not None:
            return found
    raise InstallError(WRONG_PYTHON, "--python: found no `python` on the PATH, wanted the Python that runs threestudio")


def probe(python: str) -> dict[str, str | None]:
    """Version of each package of `WITHOUT`, and of "python", as that interpreter's package metadata has them. Imports none of them."""
    try:
        done = subprocess.run([python, "-c", PROBE, *WITHOUT], capture_output=True, text=True, timeout=60)
        done.check_returncode()
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = getattr(error, "stderr", None) or error
        raise InstallError(WRONG_PYTHON, f"--python: {python} cannot be asked for its packages: {str(reason).strip()}") from error


class Row(NamedTuple):
    """A line of the table. usable: there, and not too old. note: what does not work."""

    package: str
    found: str
    wanted: str
    usable: bool
    note: str


def table(found: dict[str, str | None]) -> list[Row]:
    """What will and what will not work with the packages of a Python, as `probe` found them."""
    wanted = wanted_versions()
    rows = []
    for package, without in WITHOUT.items():
        want = wanted.get(package)
        limit, why = HOST_LIMITS.get(package, (None, ""))
        spelled = _requirement(want)[len(package) :] or "any" if want else "any"
        version = found[package]
        if version is None:
            rows.append(Row(package, "-", spelled, False, without))
            continue
        number, usable, notes = version_tuple(version), True, []
        if want and want.oldest and number < want.oldest:
            usable = False
            notes.append("older than wanted")
        if want and want.limit and number >= want.limit:
            notes.append("newer than wanted")
        if limit and number >= limit:
            usable = False
            notes.append(why)
        if package == "diffusers":
            lacking = [f"{what} ({'.'.join(map(str, since))})" for since, what in SINCE if number < since]
            if lacking:
                notes.append(", ".join(lacking))
        rows.append(Row(package, version, spelled, usable, "; ".join(notes) or "ok"))
    return rows


def _requirement(wanted: Wanted) -> str:
    """What pip is asked for: this package's requirement, below what threestudio itself can take."""
    limit, _ = HOST_LIMITS.get(re.match(r"[\w.-]+", wanted.requirement).group(), (None, ""))
    return wanted.requirement + (f",<{'.'.join(map(str, limit))}" if limit else "")


def print_table(rows: list[Row], python: str, version: str) -> None:
    print(f"Packages of {python} (Python {version}), from their metadata:")
    lines = [("package", "found", "wanted", "ok, or what will not work"), *((row.package, row.found, row.wanted, row.note) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)) + f"  {line[3]}".rstrip())
    print()


def pip_command(rows: list[Row], python: str, torch: str) -> str | None:
    """What installs the packages that are missing or too old, torch left as it is; None where there are none."""
    wanted = wanted_versions()
    lacking = [_requirement(wanted[row.package]) for row in rows if not row.usable and row.package in wanted and row.package != "torch"]
    # An exact pin of what is there: pip then leaves it alone whatever the others would like.
    return f"{python} -m pip install " + " ".join(f'"{name}"' for name in [f"torch=={torch}", *lacking]) if lacking else None


def check_python(python: str) -> None:
    """Print the table and the command that completes it. Raises InstallError where the extension could not even be loaded."""
    found = probe(python)
    rows = table(found)
    print_table(rows, python, found["python"])
    if version_tuple(found["python"]) < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        raise InstallError(WRONG_PYTHON, f"--python: found Python {found['python']} ({python}), wanted {wanted} or newer")
    missing = [package for package in LOADING if found[package] is None]
    if missing:
        raise InstallError(WRONG_PYTHON, f"--python: found no {', '.join(missing)} in {python}, wanted the Python that runs threestudio")
    command = pip_command(rows, python, found["torch"])
    if command:
        print(f"What is missing, without touching torch:\n  {command}")
    absent = [name for name in NOT_ON_PYPI if found[name] is None]
    if absent:
        print(f"{' and '.join(absent)}: not in PyPI, see threestudio's own installation guide")
    print()


# ---------------------------------------------------------------------------------------------- what is there already


def file_hashes(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below `folder`, compiled ones left out: Python and numba write those by themselves."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_manifest(folder: Path) -> dict[str, dict]:
    """What an earlier run installed: part -> {"link": its target} or {"files": path -> SHA-256}. Empty where there is nothing."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        if set(parts) <= set(PARTS) and all(len(record) == 1 and set(record) <= {"link", "files"} for record in parts.values()):
            return parts
    except (ValueError, TypeError, AttributeError):
        pass
    raise InstallError(IN_THE_WAY, f"{path}: found something else than install.sh writes there, wanted it away")


def check_removable(folder: Path, force: bool) -> list[str]:
    """The parts that stand in the checkout and are ours to remove.

    Raises InstallError where one of them is somebody else's, or a copy that was changed and `force` is false.
    """
    manifest, ours = read_manifest(folder), []
    for part, source in PARTS.items():
        path, record = folder / part, manifest.get(part, {})
        if path.is_symlink():
            target = os.readlink(path)
            if target != record.get("link") and path.resolve() != source:
                raise InstallError(IN_THE_WAY, f"{path}: found a link to {target}, wanted none, or one to {source}")
        elif not path.exists():
            continue
        elif "files" not in record:
            raise InstallError(IN_THE_WAY, f"{path}: found something that install.sh did not put there, wanted nothing of that name")
        elif not force:
            changed = [name for name, value in file_hashes(path).items() if record["files"].get(name) != value]
            if changed:
                shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
                raise InstallError(IN_THE_WAY, f"{path}: found files that were changed or added ({shown}), wanted them saved, or --force")
        ours.append(part)
    return ours


# ----------------------------------------------------------------------------------------------------------- changing


def place(source: Path, path: Path, copy: bool) -> dict:
    """Make `path` a link to `source`, or a copy of it; return its entry in the manifest."""
    if not copy:
        os.symlink(source, path, target_is_directory=True)
        return {"link": str(source)}
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("__pycache__"))
    return {"files": file_hashes(path)}


def can_link(folder: Path) -> bool:
    """Whether this file system, and the user's rights, allow symbolic links."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            os.symlink(ROOT, Path(scratch) / "link", target_is_directory=True)
        except (OSError, NotImplementedError):
            return False
    return True


def exchange(folder: Path, remove: list[str], install: dict[str, Path], copy: bool = False) -> None:
    """Take the parts `remove` out and put the parts `install` in: all of it, or, where anything fails, nothing."""
    manifest = folder / MANIFEST
    with contextlib.ExitStack() as scratch_stack, contextlib.ExitStack() as undo:
        # In the checkout itself, because only there moving is renaming.
        scratch = Path(scratch_stack.enter_context(tempfile.TemporaryDirectory(prefix=".threestudio_pgc-", dir=folder)))
        records, ready = {}, {}
        for number, (part, source) in enumerate(install.items()):
            ready[part] = scratch / f"new{number}"
            records[part] = place(source, ready[part], copy)
        old = [*remove, *([MANIFEST] if manifest.exists() else [])]
        for number, part in enumerate(old):
            _move(folder / part, scratch / f"old{number}", undo)
        for part, path in ready.items():
            if not (folder / part).parent.is_dir():
                (folder / part).parent.mkdir()
                undo.callback((folder / part).parent.rmdir)
            _move(path, folder / part, undo)
        if records:
            (scratch / "manifest").write_text(json.dumps(records, indent=1), encoding="utf-8")
            _move(scratch / "manifest", manifest, undo)
        undo.pop_all()


def _move(path: Path, target: Path, undo: contextlib.ExitStack) -> None:
    os.rename(path, target)
    undo.callback(os.rename, target, path)


def git(*arguments: str, seconds: int) -> None:
    """Run git without a question to the user. Raises InstallError, with git's own reason, where it fails or takes longer."""
    try:
        subprocess.run(
            ["git", *arguments],
            check=True,
            timeout=seconds,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        wanted = "wanted it reachable, or THREESTUDIO_DIR given"
        raise InstallError(NOT_REACHABLE, f"{REPOSITORY}: found {COMMIT} not to be had ({reason}), {wanted}") from error


def clone(target: Path) -> None:
    """Clone the tested commit of threestudio. Raises InstallError, and leaves nothing, where that is not possible."""
    git("ls-remote", REPOSITORY, "HEAD", seconds=20)
    print(f"Cloning {REPOSITORY} at {COMMIT} into {target} ...", flush=True)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, target, ignore_errors=True)
        git("clone", "--no-checkout", REPOSITORY, str(target), seconds=1800)
        git("-C", str(target), "checkout", "--detach", COMMIT, seconds=600)
        host_version(target)
        undo.pop_all()


# -------------------------------------------------------------------------------------------------------- command line


def install(folder: Path | None, copy: bool, force: bool, python: str | None) -> None:
    to_clone = folder is None and not Path("threestudio").exists()
    folder = Path(os.path.abspath(folder or "threestudio"))
    if not to_clone:
        version = host_version(folder)
        print(f"threestudio {version} in {folder}")
        if version_tuple(version) >= UNTRIED_HOST:
            print(f"  newer than any this was tested with, which is {TESTED_HOST}")
    replaced = [] if to_clone else check_removable(folder, force)
    check_python(find_python(python))
    if to_clone:
        clone(folder)
    if not copy and not can_link(folder):
        copy = True
        print("This file system takes no symbolic links: copying instead.")
    exchange(folder, replaced, PARTS, copy)
    for part, source in PARTS.items():
        print(f"{'Copied' if copy else 'Linked'} {source} to {folder / part}")
    command, prompt = "python launch.py --config", 'system.prompt_processor.prompt="a zebra bunny"'
    configs, trial = "configs/threestudio_pgc", "outputs/fantasia3d-sdxl-pgc/TRIAL"
    print(f"\nNext, in {folder}:")
    print(f"  {command} {configs}/fantasia3d-pocket-pgc.yaml --train --gpu 0 {prompt}    # downloads nothing")
    print(f"  {command} {configs}/fantasia3d-sdxl-pgc.yaml --train --gpu 0 {prompt} system.geometry.mesh=your.obj")
    print(f"  {command} {trial}/configs/parsed.yaml --export --gpu 0 resume={trial}/ckpts/last.ckpt")


def uninstall(folder: Path, force: bool) -> None:
    host_version(folder)
    removed = check_removable(folder, force)
    exchange(folder, removed, {})
    for part in removed:
        print(f"Removed {folder / part}")
    if not removed:
        print(f"Nothing of threestudio_pgc is in {folder}")


def main(argv: list[str] | None = None) -> int:
    about = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        prog="install.sh", description=about[0], epilog=about[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", metavar="THREESTUDIO_DIR", type=Path, help="root of a threestudio checkout")
    parser.add_argument("--copy", action="store_true", help="copy instead of linking")
    parser.add_argument("--python", help="the Python that runs threestudio; default: that of the active environment")
    parser.add_argument("--uninstall", action="store_true", help="remove what was installed, and nothing else")
    parser.add_argument("--force", action="store_true", help="remove a copy even if files in it were changed")
    args = parser.parse_args(argv)
    if args.uninstall and args.folder is None:
        parser.error("--uninstall: found no THREESTUDIO_DIR, wanted the checkout to remove the extension from")
    if args.uninstall and (args.copy or args.python):
        parser.error("--uninstall: found --copy or --python beside it, wanted neither")
    try:
        if args.uninstall:
            uninstall(Path(os.path.abspath(args.folder)), args.force)
        else:
            install(args.folder, args.copy, args.force, args.python)
    except InstallError as error:
        print(f"install.sh: {error}. Nothing was changed.", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"install.sh: {error}. What had been done was undone.", file=sys.stderr)
        return HALF_WAY
    return 0


if __name__ == "__main__":
    sys.exit(main())
