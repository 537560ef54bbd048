"""Into a checkout and out of it again. The checkouts here are the two files that are looked at; tests/host has the real threestudio."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch_scripts import install_host
from launch_scripts.install_host import (
    LOADING,
    NOT_ON_PYPI,
    PARTS,
    SINCE,
    WITHOUT,
    main,
    pip_command,
    table,
    version_tuple,
    wanted_versions,
)

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ("--python", sys.executable)


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path / "threestudio")


def make_checkout(folder, version='__version__ = "0.2.3"'):
    (folder / "threestudio").mkdir(parents=True)
    (folder / "launch.py").write_text("")
    (folder / "threestudio" / "__init__.py").write_text(f"__modules__ = {{}}\n{version}\n")
    (folder / "custom").mkdir()
    (folder / "configs").mkdir()
    return folder


@pytest.fixture
def small_parts(tmp_path, monkeypatch):
    """Two small folders in place of this package and its configurations."""
    for name, file in (("package", "guidance/sdxl.py"), ("package", "guidance/__pycache__/sdxl.pyc"), ("yaml", "sdxl.yaml")):
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text(file)
    monkeypatch.setattr(install_host, "PARTS", dict(zip(PARTS, (tmp_path / "package", tmp_path / "yaml"))))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python without packages."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin" / "python")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """packages(torch="2.1.0", ...): the metadata of these is what a bare Python finds."""

    def install(**versions):
        for name, version in versions.items():
            name = name.replace("_", "-")
            folder = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    return install


def tree(folder):
    """Every path below a folder, with what it holds or points to."""
    paths = (Path(root) / name for root, folders, files in os.walk(folder) for name in folders + files)
    return {path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes() for path in paths}


def refused(capsys, code, *arguments):
    """Run, expect that exit code, and return what was said about it."""
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().err


def test_what_is_no_threestudio_is_refused_by_name(tmp_path, capsys):
    assert f"found no folder {tmp_path / 'absent'}, wanted the root of a threestudio" in refused(capsys, 3, tmp_path / "absent", *PYTHON)
    (tmp_path / "other").mkdir()
    assert f"found no file {tmp_path / 'other' / 'launch.py'}" in refused(capsys, 3, tmp_path / "other", *PYTHON)
    assert tree(tmp_path / "other") == {}


@pytest.mark.parametrize("version, found", [('__version__ = "0.1.9"', "found threestudio 0.1.9"), ("", "found no __version__")])
def test_an_old_threestudio_is_refused(tmp_path, capsys, version, found):
    folder = make_checkout(tmp_path / "old", version)
    before = tree(folder)
    message = refused(capsys, 3, folder, *PYTHON)
    assert found in message and "wanted threestudio 0.2.0 or newer (0.2.3 is tested)" in message
    assert tree(folder) == before


def test_a_newer_one_is_taken_and_told_so(tmp_path, capsys):
    folder = make_checkout(tmp_path / "new", '__version__ = "0.3.0"')
    assert main([str(folder), *PYTHON]) == 0
    assert "newer than any this was tested with" in capsys.readouterr().out


def test_links_come_and_go_without_a_trace(checkout, capsys):
    before = tree(checkout)
    for _ in range(2):  # a second time changes nothing
        assert main([str(checkout), *PYTHON]) == 0
        assert {part: os.readlink(checkout / part) for part in PARTS} == {part: str(source) for part, source in PARTS.items()}
        assert set(tree(checkout)) - set(before) == {checkout / part for part in (*PARTS, install_host.MANIFEST)}
    assert (checkout / "configs/threestudio_pgc/fantasia3d-sdxl-pgc.yaml").is_file()
    out = capsys.readouterr().out
    assert out.count("python launch.py --config") == 2 * 3
    assert main([str(checkout), "--uninstall"]) == 0
    assert tree(checkout) == before
    assert main([str(checkout), "--uninstall"]) == 0
    assert "Nothing of threestudio_pgc" in capsys.readouterr().out


def test_a_link_made_by_hand_is_ours(checkout):
    before = tree(checkout)
    (checkout / "custom/threestudio_pgc").symlink_to(ROOT / "custom/threestudio_pgc")
    assert main([str(checkout), *PYTHON]) == 0
    assert main([str(checkout), "--uninstall"]) == 0
    assert tree(checkout) == before


def test_copies_come_and_go_without_a_trace(checkout, small_parts):
    before = tree(checkout)
    for how in ("--copy", "--copy", ""):  # over nothing, over itself; links in place of copies
        assert main([str(checkout), *PYTHON, *([how] if how else [])]) == 0
        assert (checkout / "custom/threestudio_pgc").is_symlink() == (not how)
        assert (checkout / "custom/threestudio_pgc/guidance/sdxl.py").read_text() == "guidance/sdxl.py"
    assert main([str(checkout), "--copy", *PYTHON]) == 0
    compiled = checkout / "custom/threestudio_pgc/guidance/__pycache__"
    assert not compiled.exists()
    compiled.mkdir()
    (compiled / "sdxl.pyc").write_text("made by Python")
    assert main([str(checkout), "--uninstall"]) == 0
    assert tree(checkout) == before


@pytest.mark.parametrize("file", ["guidance/sdxl.py", "guidance/mine.py"])
def test_work_in_a_copy_is_not_lost(checkout, small_parts, capsys, file):
    original = tree(checkout)
    assert main([str(checkout), "--copy", *PYTHON]) == 0
    (checkout / "custom/threestudio_pgc" / file).write_text("my work")
    before = tree(checkout)
    for arguments in (["--uninstall"], PYTHON):
        message = refused(capsys, 4, checkout, *arguments)
        assert f"found files that were changed or added ({file}), wanted them saved, or --force" in message
        assert tree(checkout) == before
    assert main([str(checkout), "--uninstall", "--force"]) == 0
    assert tree(checkout) == original


@pytest.mark.parametrize("part", PARTS)
def test_somebody_elses_is_refused_by_name(checkout, tmp_path, capsys, part):
    (checkout / part).mkdir()
    before = tree(checkout)
    for arguments in (PYTHON, ["--uninstall"], [*PYTHON, "--force"]):
        assert f"{checkout / part}: found something that install.sh did not put there" in refused(capsys, 4, checkout, *arguments)
        assert tree(checkout) == before
    (checkout / part).rmdir()
    (checkout / part).symlink_to(tmp_path)
    before = tree(checkout)
    assert f"{checkout / part}: found a link to {tmp_path}" in refused(capsys, 4, checkout, *PYTHON)
    assert tree(checkout) == before


def test_a_damaged_manifest_is_refused(checkout, capsys):
    for text in ("", "[]", '{"launch.py": {"link": "x"}}', '{"custom/threestudio_pgc": 3}'):
        (checkout / install_host.MANIFEST).write_text(text)
        assert "found something else than install.sh writes" in refused(capsys, 4, checkout, *PYTHON)


@pytest.mark.parametrize("moves", range(6))
def test_what_fails_half_way_is_undone(checkout, small_parts, capsys, monkeypatch, moves):
    assert main([str(checkout), "--copy", *PYTHON]) == 0
    before, rename, asked = tree(checkout), os.rename, []

    def full(source, target):
        asked.append(target)
        if len(asked) == moves + 1:
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    assert "no space left" in refused(capsys, 1, checkout, *PYTHON)
    assert tree(checkout) == before


def test_a_file_system_without_links_gets_a_copy(checkout, small_parts, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    assert main([str(checkout), *PYTHON]) == 0
    assert "takes no symbolic links: copying instead" in capsys.readouterr().out
    assert (checkout / "custom/threestudio_pgc/guidance/sdxl.py").is_file()
    assert "files" in json.loads((checkout / install_host.MANIFEST).read_text())["configs/threestudio_pgc"]


def test_the_python_must_be_the_one_that_runs_threestudio(checkout, capsys, bare_python, monkeypatch):
    before = tree(checkout)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "found no program 'no-such-python'" in refused(capsys, 5, checkout, "--python", "no-such-python")
    assert "cannot be asked for its packages" in refused(capsys, 5, checkout, "--python", "false")
    message = refused(capsys, 5, checkout, "--python", bare_python)
    assert f"found no {', '.join(LOADING)} in {bare_python}" in message
    assert tree(checkout) == before


def test_the_active_environments_python_is_asked(checkout, capsys, bare_python, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("VIRTUAL_ENV", str(Path(bare_python).parents[1]))
    assert f"in {bare_python}, wanted" in refused(capsys, 5, checkout)


def test_an_environment_that_lacks_some_is_told_what_and_how(checkout, capsys, bare_python, packages):
    packages(torch="2.1.0+cu118", numpy="1.26.4", pytorch_lightning="2.0.0", omegaconf="2.3.0", diffusers="0.17.1", trimesh="5.2.0")
    assert main([str(checkout), "--python", bare_python]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and line.split()[0] in WITHOUT}
    assert rows["trimesh"].endswith(" ok")
    assert "older than wanted; SDXL (0.18), SDXL with a ControlNet (0.19), convert_zero123.py (0.26)" in rows["diffusers"]
    assert rows["numba"].split()[1] == "-" and "pgc-mesh-rasterizer" in rows["numba"]
    (command,) = [line for line in out.splitlines() if "-m pip install" in line]
    assert f'{bare_python} -m pip install "torch==2.1.0+cu118"' in command
    assert f'"{wanted_versions()["numba"].requirement}"' in command and "diffusers" in command
    assert "trimesh" not in command and "nvdiffrast" not in command
    assert "nvdiffrast and tinycudann: not in PyPI" in out


def test_the_table_follows_the_versions():
    newest = {name: "99" if name in NOT_ON_PYPI else ".".join(map(str, (wanted_versions()[name].oldest))) for name in WITHOUT}
    newest["diffusers"] = "0.42.1"
    assert {row.note for row in table(newest)} == {"ok"}
    for since, what in SINCE:
        (row,) = [row for row in table({**newest, "diffusers": f"0.{since[1] - 1}.9"}) if row.package == "diffusers"]
        assert f"{what} (0.{since[1]})" in row.note
    (row,) = [row for row in table({**newest, "libigl": "2.6.3"}) if row.package == "libigl"]
    assert row.note == "threestudio, which imports names that 2.6 dropped" and not row.usable
    assert '"libigl>=2.4,<2.6"' in pip_command([row], "python", "2.1.0")
    (row,) = [row for row in table({**newest, "omegaconf": "3.0"}) if row.package == "omegaconf"]
    assert row.note == "newer than wanted" and row.usable


def test_versions_are_compared_by_their_numbers():
    assert version_tuple("2.13.0+cpu") == (2, 13, 0) and version_tuple("0.30.0.dev0") == (0, 30, 0) and version_tuple("none") == ()
    assert set(WITHOUT) - set(NOT_ON_PYPI) <= set(wanted_versions())
    assert wanted_versions()["omegaconf"] == ("omegaconf>=2.3,<2.5", (2, 3), (2, 5))


def test_without_a_directory_the_tested_commit_is_cloned(tmp_path, capsys, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=source, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    source = make_checkout(tmp_path / "source")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "tested")
    commit = git("rev-parse", "--short", "HEAD")
    (source / "launch.py").write_text("newer")
    git("commit", "-qam", "newer")
    monkeypatch.setattr(install_host, "REPOSITORY", str(source))
    monkeypatch.setattr(install_host, "COMMIT", commit)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main([*PYTHON]) == 0
    assert Path("threestudio/launch.py").read_text() == ""
    assert Path("threestudio/custom/threestudio_pgc/__init__.py").is_file()
    assert main([*PYTHON]) == 0  # it is there now
    assert capsys.readouterr().out.count("Cloning") == 1


def test_where_it_cannot_be_cloned_that_is_said_and_nothing_left(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(install_host, "REPOSITORY", str(tmp_path / "nowhere"))
    message = refused(capsys, 6, *PYTHON)
    assert f"{tmp_path / 'nowhere'}: found 28d9d80 not to be had" in message and "or THREESTUDIO_DIR given" in message
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("arguments", [["--uninstall"], ["x", "--uninstall", "--copy"], ["x", "--uninstall", "--python", "y"], ["x", "y"]])
def test_a_wrong_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: install.sh" in capsys.readouterr().err


def test_the_script_finds_a_python_and_passes_the_exit_code_on(checkout):
    def run(*arguments, **environment):
        command = ["bash", str(ROOT / "launch_scripts" / "install.sh"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})

    done = run("--help")
    assert done.returncode == 0 and "Exit codes: 0 done" in done.stdout
    done = run(checkout / "custom")
    assert done.returncode == 3 and "wanted the root of a threestudio checkout. Nothing was changed." in done.stderr
    done = run(checkout, *PYTHON, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert (checkout / "custom/threestudio_pgc/__init__.py").is_file()
