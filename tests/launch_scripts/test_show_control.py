"""The command that shows control images: what it leaves on disk, and how it refuses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch_scripts import show_control
from threestudio_pgc.diffusion.control import NORMAL_CONVENTIONS

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["shading", "depth", *(f"normal-{name}" for name in NORMAL_CONVENTIONS)]


def picture(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("control")
    assert show_control.main(["--out", str(out), "--views", "2", "--size", "40"]) == 0
    return out


def test_it_leaves_a_sheet_and_every_picture(folder):
    assert {path.stem for path in folder.iterdir()} == {"sheet", *(f"view{view}-{name}" for view in range(2) for name in NAMES)}
    for path in folder.glob("view*.png"):
        assert picture(path).shape == (40, 40, 3)
    assert picture(folder / "sheet.png").shape[0] > 2 * 40 and picture(folder / "sheet.png").shape[1] > len(NAMES) * 40


def test_the_sheet_shows_every_picture_pixel_by_pixel(folder):
    sheet = picture(folder / "sheet.png")
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (40, 40, 3))[:, :, 0]
    for path in folder.glob("view*.png"):
        corner = (windows[:, :, 20] == picture(path)[20]).all(axis=(-1, -2))  # the middle row first, which is cheap
        places = [place for place in zip(*np.nonzero(corner)) if np.array_equal(windows[place], picture(path))]
        assert places, path.name


def test_pictures_have_the_polarity_and_the_background_that_was_promised(folder):
    depth, shading = picture(folder / "view0-depth.png"), picture(folder / "view0-shading.png")
    assert depth.max() == 255 and (depth[0, 0] == 0).all() and (shading[0, 0] == 255).all()
    for name, convention in NORMAL_CONVENTIONS.items():
        corner = picture(folder / f"view0-normal-{name}.png")[0, 0]
        np.testing.assert_allclose(corner, 255 * np.array(convention.background), atol=0.51)


def test_conventions_differ_in_red_alone(folder):
    ours, bae = (picture(folder / f"view0-normal-{name}.png").astype(int) for name in ("opengl", "normalbae"))
    np.testing.assert_allclose(ours[..., 0] + bae[..., 0], 255, atol=1)
    assert np.array_equal(ours[..., 1:], bae[..., 1:]) and (ours != bae).any()


def test_it_ends_by_saying_where_the_pictures_are(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert show_control.main(["--mesh", "builtin:bunny", "--out", str(out), "--views", "1", "--size", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"Pictures: {out}", f"Sheet: {out / 'sheet.png'}"]


def test_a_bad_mesh_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "launch_scripts/show_control.py", "--mesh", "no/such/mesh.obj", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["show_control: --mesh: no/such/mesh.obj: no such file"] and not done.stdout
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_1(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert show_control.main(["--out", str(tmp_path / "file"), "--views", "1", "--size", "8"]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("show_control: --out: ") and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("argument", ["--views", "--size"])
def test_numbers_below_one_are_refused_by_name(argument, capsys):
    with pytest.raises(SystemExit) as refused:
        show_control.main([argument, "0"])
    assert refused.value.code == 2 and argument in capsys.readouterr().err
