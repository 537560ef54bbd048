import dataclasses
import subprocess
import time
import warnings

import numpy as np
import pytest
import torch

from threestudio_pgc.export import unwrap as module
from threestudio_pgc.export.atlas import split_vertices, uv_areas
from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.unwrap import atlas_for, unwrap, usable_uvs
from threestudio_pgc.scene.mesh import TriangleMesh


def with_uvs(mesh, uvs):
    return dataclasses.replace(mesh, uvs=torch.as_tensor(uvs, dtype=torch.float32))


def bumpy_sphere(rings):
    """A closed surface of 4 rings (rings - 1) triangles."""
    polar, around = np.meshgrid(np.linspace(0, np.pi, rings + 1)[1:-1], np.arange(2 * rings) * np.pi / rings, indexing="ij")
    radius = 0.7 + 0.02 * np.sin(30 * around) * np.sin(25 * polar)
    points = radius[..., None] * np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], -1)
    here = np.arange((rings - 1) * 2 * rings).reshape(rings - 1, -1)
    right = np.roll(here, -1, axis=1)
    bands = [[here[:-1], here[1:], right[1:]], [here[:-1], right[1:], right[:-1]]]
    north, south = np.full(2 * rings, here.size), np.full(2 * rings, here.size + 1)
    caps = [[north, here[0], right[0]], [right[-1], here[-1], south]]
    vertices = np.concatenate([points.reshape(-1, 3), [[0, 0, 0.7], [0, 0, -0.7]]])
    faces = np.concatenate([np.stack(corners, -1).reshape(-1, 3) for corners in bands + caps])
    return TriangleMesh(torch.tensor(vertices, dtype=torch.float32), torch.tensor(faces))


@pytest.fixture
def processes(monkeypatch):
    """The processes started meanwhile."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return started


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


def test_one_corner_out_of_range_is_refused_with_the_range(box):
    uvs = box.uvs.clone()
    uvs[0, 1] = -0.25
    assert "[0.017, -0.25] to [0.983, 0.975], beyond [0, 1]" in usable_uvs(with_uvs(box, uvs))[1]


def test_tiles_side_by_side_are_refused_with_their_range(box):
    """As in UDIM: one side lies a texture further to the right."""
    uvs = box.uvs.clone()
    uvs[:4, 0] += 1
    assert "to [1.317, 0.975], beyond [0, 1]" in usable_uvs(with_uvs(box, uvs))[1]


def test_one_mirrored_side_among_others_is_usable(box):
    uvs = box.uvs.clone()
    uvs[:4, 0] = uvs[:4, 0].min() + uvs[:4, 0].max() - uvs[:4, 0]
    assert usable_uvs(with_uvs(box, uvs)) == (True, "")


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


def test_faces_that_xatlas_leaves_out_lie_beside_their_neighbours():
    """A dome whose rings shrink to a millionth: its smallest faces have no area for xatlas, which puts them into the texture's corner."""
    polar, turn = np.geomspace(1e-6, 2.5, 40)[:, None], np.linspace(0, 2 * np.pi, 24, endpoint=False)
    rings = np.stack([np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn), np.cos(polar) + 0 * turn], axis=-1).reshape(-1, 3)
    here = np.arange(39)[:, None] * 24 + np.arange(24)
    after = np.arange(39)[:, None] * 24 + (np.arange(24) + 1) % 24
    faces = np.concatenate([np.stack([here, here + 24, after + 24], -1), np.stack([here, after + 24, after], -1)]).reshape(-1, 3)
    mesh = TriangleMesh(torch.tensor(rings, dtype=torch.float32), torch.tensor(faces))
    atlas = unwrap(mesh, resolution=256)
    flat = uv_areas(atlas.uvs, atlas.uv_faces) == 0
    assert atlas.source == "xatlas" and 100 < flat.sum() < len(faces)
    near = {tuple(uv) for uv in atlas.uvs[atlas.uv_faces[~flat]].reshape(-1, 2).round(6).tolist()}
    assert {tuple(uv) for uv in atlas.uvs[atlas.uv_faces[flat]].reshape(-1, 2).round(6).tolist()} <= near


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_that_is_no_time_is_refused(bare_sphere, limit):
    with pytest.raises(ExportError, match=f"time_limit: found {limit}, wanted seconds above 0"):
        unwrap(bare_sphere, time_limit=limit)


def test_progress_rises_to_one_without_a_warning(bare_sphere, processes):
    shares = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unwrap(bare_sphere, resolution=128, time_limit=600, progress=shares.append).source == "xatlas"
    assert [process.returncode for process in processes] == [0]
    assert shares == sorted(shares) and 0 <= shares[0] < 1 and shares[-1] == 1


def test_a_mesh_larger_than_a_pipe_holds_arrives_whole_however_often_it_is_asked_after(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 1e-3)  # the process is asked long before it has started
    mesh = bumpy_sphere(40)
    assert mesh.vertices.nbytes + mesh.faces.nbytes > 2**17
    assert unwrap(mesh, resolution=128, time_limit=60).source == "xatlas"


def test_without_a_limit_progress_is_called_too(bare_sphere):
    shares = []
    unwrap(bare_sphere, resolution=128, progress=shares.append)
    assert shares[0] == 0 and shares[-1] == 1


def test_at_the_limit_the_process_ends_and_projections_take_its_place(bare_sphere, processes):
    with pytest.warns(UserWarning, match=r"not done with 320 faces after 0\.01 s; .* projections along the axes"):
        atlas, reason = atlas_for(bare_sphere, resolution=128, time_limit=0.01)
    assert (atlas.source, reason) == ("box", "the mesh has no texture coordinates")
    assert [process.returncode for process in processes] == [-9]
    bare_sphere.uvs, bare_sphere.uv_faces = torch.from_numpy(atlas.uvs), torch.from_numpy(atlas.uv_faces)
    assert usable_uvs(bare_sphere) == (True, "")


def test_a_large_mesh_comes_back_soon_after_the_limit():
    mesh = bumpy_sphere(140)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match="77840 faces after 0.5 s"):
        assert atlas_for(mesh, time_limit=0.5)[0].source == "box"
    assert time.monotonic() - begun < 60  # xatlas alone takes a few seconds; the machine may be busy


def test_a_crash_of_xatlas_is_survived_and_told():
    """Two triangles back to back, long and narrow: https://github.com/jpcy/xatlas/issues/130."""
    vertices = torch.tensor([[0, 695.61237, 85.88235], [0, 994.86237, 245.88235], [0, 699.2378, 87.820755]])
    with pytest.warns(UserWarning, match=r"xatlas ended with status -\d+ on 2 faces"):
        atlas = unwrap(TriangleMesh(vertices, torch.tensor([[0, 1, 2], [1, 0, 2]])), resolution=128)
    assert atlas.source == "box"


def test_charts_of_xatlas_that_overlap_are_not_taken():
    """Around a cylinder of 500 sides no fold is sharp enough for xatlas: it projects the front onto the back."""
    import trimesh

    cylinder = trimesh.creation.cylinder(1, 2, sections=500)
    mesh = TriangleMesh(torch.tensor(cylinder.vertices, dtype=torch.float32), torch.tensor(cylinder.faces))
    with pytest.warns(UserWarning, match=r"nothing usable \(33.3% of the texture coordinates lie over others\)"):
        assert unwrap(mesh).source == "box"


def test_what_xatlas_refuses_is_told(processes):
    with pytest.raises(module._NoAtlas, match="(?i)refused 1 faces .*index"):
        module._run_xatlas(np.eye(3, dtype=np.float32), np.array([[0, 1, 7]]), 1.0, 64, 1, None, None)
    assert processes[0].returncode == 0


def test_a_worker_that_cannot_start_is_told(bare_sphere, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "WORKER", tmp_path / "nowhere.py")
    with pytest.warns(UserWarning, match=r"status 2 on 320 faces \(.*nowhere.py"):
        assert unwrap(bare_sphere, resolution=128).source == "box"


def test_an_interrupt_leaves_no_process_behind(bare_sphere, processes):
    def interrupt(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unwrap(bare_sphere, time_limit=600, progress=interrupt)
    assert [process.returncode for process in processes] == [-9]


def test_charts_stay_apart_by_the_padding(bare_sphere):
    """Grown by two texels, charts of different faces still do not touch."""
    from scipy.ndimage import binary_dilation, label

    from threestudio_pgc.export.atlas import uv_to_clip
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
