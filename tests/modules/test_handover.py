"""From one stage's surface to the texture stage's mesh, and how that mesh lives on in checkpoints."""

import shutil

import numpy as np
import pytest
import torch

from threestudio_pgc.host import Mesh
from threestudio_pgc.modules.geometry import TexturedMesh
from threestudio_pgc.scene.mesh import Similarity, TriangleMesh

TINY = {"n_levels": 2, "log2_hashmap_size": 8, "base_resolution": 4, "max_resolution": 8}


class Surface:
    """A geometry of this package, reduced to what is handed over."""

    def __init__(self, mesh, texture=None):
        self.mesh, self.texture = mesh, texture

    def export_mesh(self):
        return self.mesh

    def triangle_mesh(self):
        raise AssertionError("wanted the mesh that is exported")


class HostSurface:
    """A geometry of the host's: no more than an isosurface, with a graph behind it."""

    def __init__(self, vertices, faces):
        self.vertices, self.faces = vertices.requires_grad_(), faces

    def isosurface(self):
        return Mesh(v_pos=self.vertices * 1.0, t_pos_idx=self.faces)


def tetrahedron(**rest):
    vertices = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    return TriangleMesh(vertices, torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]]), **rest)


def config(**rest):
    return {"mesh": None, "texture": TINY, **rest}


def test_a_surface_without_faces_is_refused():
    with pytest.raises(ValueError, match="the Surface to convert has no faces, wanted at least one triangle"):
        TexturedMesh.create_from(Surface(TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))), config())


def test_a_surface_that_is_not_finite_is_refused_with_the_count():
    mesh = tetrahedron()
    mesh.vertices[1:3, 0] = torch.nan
    with pytest.raises(ValueError, match="has 2 vertices that are not finite, wanted none"):
        TexturedMesh.create_from(Surface(mesh), config())


def test_no_mesh_and_nothing_taken_over_is_refused_by_the_key():
    with pytest.raises(ValueError, match="system.geometry.mesh: found null, wanted a mesh file"):
        TexturedMesh(config()).initialize_shape()


def test_the_surface_stays_where_it_stands_and_the_file_is_not_read():
    geometry = TexturedMesh.create_from(Surface(tetrahedron()), config(mesh="no/such/file.obj"))
    mesh = geometry.triangle_mesh()
    assert torch.equal(mesh.vertices, tetrahedron().vertices) and torch.equal(mesh.faces, tetrahedron().faces)
    assert np.array_equal(mesh.user_vertices(), tetrahedron().vertices.double().numpy())


def test_a_surface_of_the_host_is_taken_without_its_graph():
    source = tetrahedron()
    geometry = TexturedMesh.create_from(HostSurface(source.vertices, source.faces.int()), config())
    mesh = geometry.triangle_mesh()
    assert torch.equal(mesh.vertices, source.vertices) and not mesh.vertices.requires_grad
    assert mesh.faces.dtype == torch.int64 and torch.equal(mesh.faces, source.faces)


def test_later_changes_of_the_earlier_surface_do_not_reach_the_mesh():
    source = tetrahedron()
    geometry = TexturedMesh.create_from(Surface(source), config())
    source.vertices.zero_()
    assert torch.equal(geometry.triangle_mesh().vertices, tetrahedron().vertices)


def test_the_texture_is_inherited_where_it_is_asked_for():
    torch.manual_seed(0)
    source = Surface(tetrahedron(), TexturedMesh.create_from(Surface(tetrahedron()), config()).texture)
    points = torch.rand(50, 3)
    inherited, fresh = (TexturedMesh.create_from(source, config(), copy_net=copy).texture for copy in (True, False))
    assert torch.equal(inherited(points), source.texture(points))
    assert not torch.equal(fresh(points), source.texture(points))
    inherited.mlp[0].bias.data += 1
    assert not torch.equal(inherited(points), source.texture(points)), "a copy, not the same parameters"


@pytest.mark.parametrize("other", [None, {**TINY, "max_resolution": 7}, {**TINY, "gain": 2.0}])
def test_a_texture_of_another_size_is_not_inherited_and_that_is_said(other, caplog):
    texture = other and TexturedMesh.create_from(Surface(tetrahedron()), config(texture=other)).texture
    TexturedMesh.create_from(Surface(tetrahedron(), texture), config(), copy_net=True)
    assert "system.geometry_convert_inherit_texture: the Surface has no texture field of the size" in caplog.text


def test_a_mesh_that_was_taken_over_comes_back_from_the_state_bit_for_bit():
    frame = Similarity(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0], 1 / 3, np.array([1e6, 0.1, -7]))
    uvs = {"uvs": torch.rand(3, 2), "uv_faces": torch.tensor([[0, 1, 2]] * 4)}
    source = TexturedMesh.create_from(Surface(tetrahedron(frame=frame, **uvs)), config())
    for settings in (config(), config(mesh="builtin:lettered")):  # the configuration may go on naming a file
        loaded = TexturedMesh(settings)
        loaded.load_state_dict(source.half().state_dict())
        mine, other = loaded.triangle_mesh(), source.triangle_mesh()
        for name in ("vertices", "faces", "uvs", "uv_faces"):
            assert torch.equal(getattr(mine, name), getattr(other, name)), name
        assert np.array_equal(mine.user_vertices(), frame.apply(tetrahedron().vertices.numpy()))
        assert loaded.state_dict().keys() == source.state_dict().keys(), "and goes into the next checkpoint"


def test_a_mesh_from_a_file_is_not_in_the_state():
    state = TexturedMesh(config(mesh="builtin:bunny")).state_dict()
    assert not any("mesh" in key for key in state)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"mesh.vertices\""):
        TexturedMesh(config()).load_state_dict(state)


@pytest.fixture
def first_stage(launch, tmp_path):
    """Two steps on a box that a user's file has turned, large and far away, with texture coordinates. Returns checkpoint and positions."""
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 2) for z in (0, 3)], np.float64)
    box = 20 * corners @ np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]]) + [300, -50, 8]
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    lines = ["v {} {} {}".format(*corner) for corner in box.round(6).tolist()]
    file = tmp_path / "box.obj"
    file.write_text("\n".join(lines + ["f " + " ".join(str(corner + 1) for corner in quad) for quad in quads]))
    assert launch("train", tmp_path / "first", f"system.geometry.mesh={file}", "trainer.max_steps=2") == 0
    return tmp_path / "first" / "n" / "t" / "ckpts" / "last.ckpt", box.round(6)


def obj_positions(folder):
    (path,) = (folder / "n" / "t" / "save").glob("*export/model.obj")
    return np.array([line.split()[1:] for line in path.read_text().splitlines() if line.startswith("v ")], np.float64)


def test_hand_over_train_resume_test_and_export_without_the_earlier_stage(launch, first_stage, tmp_path):
    """The whole way of a user: the mesh is the earlier stage's to the end, in his own coordinates."""
    checkpoint, box = first_stage
    second = tmp_path / "second"
    convert = ("system.geometry.mesh=null", f"system.geometry_convert_from={checkpoint}", "system.geometry_convert_inherit_texture=true")
    assert launch("train", second, *convert, "trainer.max_steps=2") == 0
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "box.obj").unlink()
    resume = f"resume={second / 'n' / 't' / 'ckpts' / 'last.ckpt'}"
    assert launch("train", second, *convert, resume, "trainer.max_steps=3", "checkpoint.every_n_train_steps=1") == 0
    state = torch.load(second / "n" / "t" / "ckpts" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3 and state["state_dict"]["geometry.mesh.vertices"].shape == (8, 3)
    assert launch("test", second, *convert, resume) == 0
    for settings in (convert, ("system.geometry.mesh=builtin:vase",)):
        assert launch("export", second, *settings, resume) == 0
        np.testing.assert_allclose(obj_positions(second), box, rtol=0, atol=1e-7 * 300)


def test_a_texture_stage_follows_on_a_texture_stage_whose_mesh_came_from_another(launch, first_stage, tmp_path):
    """The configuration in the middle names no mesh."""
    checkpoint, _ = first_stage
    for name in ("second", "third"):
        convert = ("system.geometry.mesh=null", f"system.geometry_convert_from={checkpoint}")
        assert launch("train", tmp_path / name, *convert, "trainer.max_steps=1", "checkpoint.every_n_train_steps=1") == 0
        checkpoint = tmp_path / name / "n" / "t" / "ckpts" / "last.ckpt"
    second, third = (torch.load(tmp_path / name / "n/t/ckpts/last.ckpt", weights_only=True)["state_dict"] for name in ("second", "third"))
    meshes = [{key: value for key, value in state.items() if ".mesh." in key} for state in (second, third)]
    assert len(meshes[0]) == 5 and all(torch.equal(value, meshes[1][key]) for key, value in meshes[0].items())


def test_a_shape_that_moved_is_exported_by_both_stages_at_the_same_positions(launch, tmp_path):
    """From the geometry stage's signed distances; the texture stage's configuration may go on naming a file."""
    shape = "fantasia3d-geometry-pocket-pgc"
    one_step = ("trainer.max_steps=1", "checkpoint.every_n_train_steps=1")
    assert launch("train", tmp_path / "shape", *one_step, config=shape) == 0
    checkpoint = tmp_path / "shape" / "n" / "t" / "ckpts" / "last.ckpt"
    assert launch("export", tmp_path / "shape", f"resume={checkpoint}", "system.exporter.min_fragment=0", config=shape) == 0
    texture = tmp_path / "texture"
    assert launch("train", texture, f"system.geometry_convert_from={checkpoint}", *one_step) == 0
    assert launch("export", texture, f"resume={texture / 'n' / 't' / 'ckpts' / 'last.ckpt'}") == 0
    assert np.array_equal(obj_positions(texture), obj_positions(tmp_path / "shape"))


def test_a_run_without_any_mesh_trains_nothing_and_says_why(launch, tmp_path, capsys):
    assert launch("train", tmp_path, "system.geometry.mesh=null") != 0
    captured = capsys.readouterr()
    assert "system.geometry.mesh: found null, wanted a mesh file" in captured.out + captured.err
