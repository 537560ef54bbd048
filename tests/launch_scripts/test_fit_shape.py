"""Shapes fitted to silhouettes and normals through the renderer alone: three meshes without symmetry, from a sphere, at low resolution."""

import pytest

from launch_scripts import fit_shape
from threestudio_pgc.scene.mesh import load_mesh, normalize


@pytest.mark.parametrize("name, steps", [("bunny", 120), ("teapot", 120), ("knot", 300)])
def test_a_sphere_becomes_the_mesh_that_eight_views_show(name, steps):
    target = normalize(load_mesh(f"builtin:{name}"))
    fit = fit_shape.fit_views(target, resolution=32, size=96, steps=steps, progress=False)
    print(f"{name}: IoU {fit.iou:.4f}, unseen {fit.iou_unseen:.4f}, Chamfer {fit.chamfer:.4f}, {fit.seconds:.1f} s")
    assert fit.iou >= 0.97 and fit.iou_unseen >= 0.93
    assert fit.chamfer < 0.035, "in half extents; the sphere it starts from is at 0.18"
    assert (fit.mesh.adjacency >= 0).all(), "closed"


def test_the_sphere_it_starts_from_is_far_from_any_of_them():
    target = normalize(load_mesh("builtin:bunny"))
    start = fit_shape.fit_views(target, resolution=32, size=96, steps=1, progress=False)
    assert start.iou < 0.7 and start.chamfer > 0.15


def test_the_command_writes_a_picture_and_a_glb(tmp_path, capsys):
    assert fit_shape.main(["--out", str(tmp_path), "--resolution", "16", "--size", "32", "--steps", "2", "--representation", "field"]) == 0
    assert "mask IoU" in capsys.readouterr().out
    assert (tmp_path / "views.png").is_file() and (tmp_path / "shape.glb").is_file()


UNFIT = [("nowhere.obj: no such file", ["--mesh", "nowhere.obj"]), ("resolution: found 1,", ["--resolution", "1"])]


@pytest.mark.parametrize("words, arguments", UNFIT)
def test_what_cannot_be_fitted_is_said(words, arguments, tmp_path, capsys):
    assert fit_shape.main(["--out", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err
