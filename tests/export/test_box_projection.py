import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from threestudio_pgc.export import box_projection as module
from threestudio_pgc.export.atlas import uv_areas, uv_to_clip
from threestudio_pgc.export.box_projection import box_projection
from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.unwrap import usable_uvs
from threestudio_pgc.scene.mesh import TriangleMesh
from threestudio_pgc.scene.raster import make_rasterizer


def mesh_of(vertices, faces):
    return TriangleMesh(torch.as_tensor(vertices, dtype=torch.float32), torch.as_tensor(faces, dtype=torch.int64))


def spiral_ramp(turns=3, steps=40):
    """A ramp that winds over itself: seen from above, all of it looks the same way and covers the same ring `turns` times."""
    angle = np.linspace(0, 2 * np.pi * turns, steps * turns + 1)
    rows = [np.stack([radius * np.cos(angle), radius * np.sin(angle), 0.05 * angle], -1) for radius in (0.4, 1.0)]
    inner = np.arange(len(angle) - 1)
    outer = inner + len(angle)
    faces = np.concatenate([np.stack([inner, outer, outer + 1], -1), np.stack([inner, outer + 1, inner + 1], -1)])
    return mesh_of(np.concatenate(rows), faces)


def loose_triangles(count):
    generator = np.random.default_rng(0)
    corners = generator.random((count, 1, 3)) + 0.02 * generator.standard_normal((count, 3, 3))
    return mesh_of(corners.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3))


def with_atlas(mesh, atlas):
    return dataclasses.replace(mesh, uvs=torch.from_numpy(atlas.uvs), uv_faces=torch.from_numpy(atlas.uv_faces))


def chart_count(atlas):
    """Pieces of faces that share texture coordinates."""
    start, end = atlas.uv_faces[:, :2].ravel(), atlas.uv_faces[:, 1:].ravel()
    return connected_components(coo_array((np.ones(len(start)), (start, end)), shape=(len(atlas.uvs),) * 2))[0]


def drawn_charts(atlas, size=256):
    """Texels (size, size) in any face, and the number of patches that they form."""
    rast = make_rasterizer("cpu").rasterize(uv_to_clip(atlas.uvs, size), torch.from_numpy(atlas.uv_faces), size, size)
    covered = rast[0, ..., 3].numpy() > 0
    return covered, label(covered, np.ones((3, 3)))[1]


def test_no_faces():
    with pytest.raises(ExportError, match="no faces"):
        box_projection(mesh_of(np.zeros((0, 3)), np.zeros((0, 3))))


@pytest.mark.parametrize("far", [0.0, float("nan"), float("inf")])
def test_no_finite_area(far):
    with pytest.raises(ExportError, match="surface of (0.0|nan)"):
        box_projection(mesh_of([[0, 0, 0], [1, 0, 0], [far, 0, 0]], [[0, 1, 2]]))


def test_a_face_without_area_among_others_does_no_harm(box):
    flat = dataclasses.replace(box, faces=torch.cat([box.faces, torch.tensor([[0, 1, 1]])]))
    atlas = box_projection(flat)
    areas = uv_areas(atlas.uvs, atlas.uv_faces)
    assert (areas[:-1] > 0).all() and areas[-1] == 0
    assert usable_uvs(with_atlas(flat, atlas)) == (True, "")


def test_one_triangle_fills_half_of_the_texture():
    atlas = box_projection(mesh_of([[5, 5, 5], [7, 5, 5], [5, 7, 5]], [[0, 1, 2]]), padding=0)
    assert uv_areas(atlas.uvs, atlas.uv_faces) == pytest.approx([0.5], abs=1e-6)


def test_a_box_has_six_charts_of_equal_squares(box):
    atlas = box_projection(box)
    assert (atlas.source, len(atlas.uvs)) == ("box", 24)
    areas = uv_areas(atlas.uvs, atlas.uv_faces)
    assert areas == pytest.approx(np.full(12, areas[0]), rel=1e-4)


def test_each_corner_has_one_vertex(bare_sphere):
    atlas = box_projection(bare_sphere)
    corner_of_uv = np.full(len(atlas.uvs), -1)
    corner_of_uv[atlas.uv_faces] = bare_sphere.faces.numpy()
    assert np.array_equal(corner_of_uv[atlas.uv_faces], bare_sphere.faces.numpy())


@pytest.mark.parametrize("mesh", [spiral_ramp(), loose_triangles(500)], ids=["spiral", "loose triangles"])
def test_the_coordinates_are_usable_and_no_face_is_lost_or_mirrored(mesh):
    atlas = box_projection(mesh)
    assert atlas.uvs.min() >= 0 and atlas.uvs.max() <= 1
    assert (uv_areas(atlas.uvs, atlas.uv_faces) > 0).all()
    assert usable_uvs(with_atlas(mesh, atlas)) == (True, "")


def test_texels_are_as_large_everywhere_as_the_projection_allows(bare_sphere):
    """UV area per area of surface is the cosine between the face and its axis, up to one factor: between 1 / sqrt(3) and 1."""
    atlas = box_projection(bare_sphere)
    a, b, c = bare_sphere.vertices[bare_sphere.faces].double().unbind(1)
    density = uv_areas(atlas.uvs, atlas.uv_faces) / (torch.linalg.cross(b - a, c - a).norm(dim=1) / 2).numpy()
    cosine = bare_sphere.face_normals().abs().amax(dim=1).numpy()
    assert density / cosine == pytest.approx(np.full(len(cosine), (density / cosine)[0]), rel=1e-3)


def test_a_chart_over_itself_is_cut_only_as_often_as_needed():
    assert 3 <= chart_count(box_projection(spiral_ramp())) <= 4


def test_cutting_in_halves_ends_too(monkeypatch):
    monkeypatch.setattr(module, "DEPTH_CUTS", 0)
    mesh = spiral_ramp()
    assert usable_uvs(with_atlas(mesh, box_projection(mesh))) == (True, "")


def test_a_triangle_there_twice_gets_two_places():
    atlas = box_projection(mesh_of(np.eye(3), [[0, 1, 2], [0, 1, 2]]))
    assert len(atlas.uvs) == 6
    assert drawn_charts(atlas)[1] == 2


def test_a_sliver_joins_the_chart_beside_it():
    """A strip leans just beyond 45 degrees between two large faces that look up."""
    x = np.array([0, 1, 1.001, 2])
    z = np.array([0, 0, 0.0011, 0.0011])
    vertices = np.concatenate([np.stack([x, np.full(4, y), z], -1) for y in (0.0, 1.0)])
    faces = [[i, i + 1, i + 5] for i in range(3)] + [[i, i + 5, i + 4] for i in range(3)]
    assert len(box_projection(mesh_of(vertices, faces)).uvs) == 8


def test_charts_stay_apart_by_the_padding(bare_sphere):
    covered, count = drawn_charts(box_projection(bare_sphere, padding=4, resolution=256))
    assert count == 6
    assert label(binary_dilation(covered, iterations=1), np.ones((3, 3)))[1] == count


def test_padding_gives_way_to_very_many_charts():
    mesh = loose_triangles(500)
    atlas = box_projection(mesh, padding=4, resolution=64)  # 500 times 4 x 4 texels are more than there are
    assert usable_uvs(with_atlas(mesh, atlas)) == (True, "")


def test_the_same_mesh_gives_the_same_coordinates(bare_sphere):
    first, second = (box_projection(bare_sphere) for _ in range(2))
    assert np.array_equal(first.uvs, second.uvs) and np.array_equal(first.uv_faces, second.uv_faces)
