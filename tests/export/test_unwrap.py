import dataclasses

import numpy as np
import pytest
import torch

from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.unwrap import atlas_for, split_vertices, unwrap, usable_uvs, uv_areas
from threestudio_pgc.scene.mesh import TriangleMesh


def with_uvs(mesh, uvs):
    return dataclasses.replace(mesh, uvs=torch.as_tensor(uvs, dtype=torch.float32))


def test_no_faces():
    empty = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(ExportError, match="no faces"):
        unwrap(empty)
    assert usable_uvs(empty) == (False, "the mesh has no texture coordinates")
    empty.uvs, empty.uv_faces = torch.zeros(0, 2), empty.faces
    assert usable_uvs(empty) == (False, "the mesh has no faces")


def test_no_area():
    line = TriangleMesh(torch.eye(3)[[0, 1]], torch.tensor([[0, 1, 1]]))
    with pytest.raises(ExportError, match="surface of 0.0"):
        unwrap(line)


def test_good_uvs_are_usable_and_kept_as_they_are(box):
    assert usable_uvs(box) == (True, "")
    atlas, reason = atlas_for(box)
    assert (atlas.source, reason) == ("user", "")
    assert np.array_equal(atlas.uvs, box.uvs) and np.array_equal(atlas.uv_faces, box.uv_faces)


def test_mirrored_uvs_are_usable(box):
    assert usable_uvs(with_uvs(box, box.uvs * torch.tensor([-1, 1]) + torch.tensor([1, 0]))) == (True, "")


def test_small_but_separate_uvs_are_usable(box):
    assert usable_uvs(with_uvs(box, box.uvs * 0.2 + 0.4)) == (True, "")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda uvs: uvs * 2, "beyond"),
        (lambda uvs: uvs - 0.5, "beyond"),
        (lambda uvs: uvs * float("nan"), "NaN or infinite"),
        (lambda uvs: uvs * 0, "use 0.00% of the texture"),
        (lambda uvs: uvs * 0.01, "use 0.01% of the texture"),
        (lambda uvs: uvs % 0.5, "lie over others"),
        (lambda uvs: (uvs - 0.5).abs(), "33.3% of the surface has no area"),
    ],
)
def test_bad_uvs_are_refused_with_the_reason(box, change, reason):
    mesh = with_uvs(box, change(box.uvs))
    usable, found = usable_uvs(mesh)
    assert not usable and reason in found
    atlas, why = atlas_for(mesh, resolution=64)
    assert (atlas.source, why) == ("xatlas", found)


def test_a_side_without_texture_area_is_refused(box):
    uvs = box.uvs.clone()
    uvs[:4] = uvs[0]
    assert usable_uvs(with_uvs(box, uvs)) == (False, "16.7% of the surface has no area in the texture")


def test_two_sides_in_one_place_are_refused(box):
    uvs = box.uvs.clone()
    uvs[:4] = uvs[4:8]
    usable, reason = usable_uvs(with_uvs(box, uvs))
    assert not usable and reason.endswith("of the texture coordinates lie over others")
    assert float(reason.split("%")[0]) == pytest.approx(100 / 6, abs=0.2)


def test_uv_faces_that_do_not_fit_are_refused(box):
    assert "24" in usable_uvs(dataclasses.replace(box, uv_faces=box.uv_faces + 4))[1]
    assert "11 faces" in usable_uvs(dataclasses.replace(box, uv_faces=box.uv_faces[1:]))[1]


def test_unwrapping_keeps_the_faces_and_gives_each_corner_one_vertex(bare_sphere):
    atlas = unwrap(bare_sphere, resolution=256)
    assert atlas.uv_faces.shape == tuple(bare_sphere.faces.shape)
    corner_of_uv = np.full(len(atlas.uvs), -1)
    corner_of_uv[atlas.uv_faces] = bare_sphere.faces.numpy()
    assert np.array_equal(corner_of_uv[atlas.uv_faces], bare_sphere.faces.numpy())


def test_unwrapped_uvs_are_usable_themselves(bare_sphere):
    atlas = unwrap(bare_sphere, resolution=256)
    assert atlas.uvs.min() >= 0 and atlas.uvs.max() <= 1
    bare_sphere.uvs, bare_sphere.uv_faces = torch.from_numpy(atlas.uvs), torch.from_numpy(atlas.uv_faces)
    assert usable_uvs(bare_sphere) == (True, "")
    assert np.abs(uv_areas(atlas.uvs, atlas.uv_faces)).sum() > 0.3


def test_unwrapping_is_deterministic(bare_sphere):
    first, second = (unwrap(bare_sphere, resolution=128) for _ in range(2))
    assert np.array_equal(first.uvs, second.uvs) and np.array_equal(first.uv_faces, second.uv_faces)


def test_charts_stay_apart_by_the_padding(bare_sphere):
    """Grown by two texels, charts of different faces still do not touch."""
    from scipy.ndimage import binary_dilation, label

    from threestudio_pgc.export.unwrap import uv_to_clip
    from threestudio_pgc.scene.raster import make_rasterizer

    atlas = unwrap(bare_sphere, padding=4, resolution=256)
    rast = make_rasterizer("cpu").rasterize(uv_to_clip(atlas.uvs, 256), torch.from_numpy(atlas.uv_faces), 256, 256)
    covered = rast[0, ..., 3].numpy() > 0
    charts = label(covered, np.ones((3, 3)))[1]
    assert charts > 5
    assert label(binary_dilation(covered, iterations=1), np.ones((3, 3)))[1] == charts


def test_split_vertices_pairs_each_corner(box):
    vertex, uv, faces = split_vertices(box.faces.numpy(), box.uv_faces.numpy())
    assert np.array_equal(vertex[faces], box.faces.numpy())
    assert np.array_equal(uv[faces], box.uv_faces.numpy())
    assert len(vertex) == 24


def test_split_vertices_of_an_unsplit_mesh_changes_nothing(box):
    faces = box.faces.numpy()
    vertex, uv, split = split_vertices(faces, faces)
    assert np.array_equal(vertex, np.arange(8)) and np.array_equal(uv, vertex) and np.array_equal(split, faces)
