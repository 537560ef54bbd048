"""Mesh files: every bad one is refused by name, every good one comes in whole, un-mirrored and with its way back."""

import struct
import warnings

import numpy as np
import pytest
import torch
import trimesh

from threestudio_pgc.scene.mesh import (
    MeshError,
    Similarity,
    TriangleMesh,
    builtin_mesh_names,
    builtin_mesh_path,
    load_mesh,
    normalize,
)

TETRAHEDRON = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], np.float64)  # no two axes alike
TETRAHEDRON_FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def volume(mesh: TriangleMesh) -> float:
    """Signed volume in the stored frame: positive where faces are counter-clockwise from outside."""
    a, b, c = mesh.vertices[mesh.faces].double().unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def write_obj(path, vertices, faces, header="") -> None:
    lines = [header] + ["v " + " ".join(map(str, row)) for row in vertices]
    path.write_text("\n".join(lines + ["f " + " ".join(str(i + 1) for i in face) for face in faces]) + "\n")


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_a_mesh_without_anything_is_refused_when_normalized():
    empty = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    assert empty.vertex_normals().shape == (0, 3) and empty.face_normals().shape == (0, 3) and empty.user_vertices().shape == (0, 3)
    with pytest.raises(MeshError, match="want a finite extent"):
        normalize(empty)


def test_missing_file(tmp_path):
    with pytest.raises(MeshError, match=r"nothing\.obj: no such file"):
        load_mesh(tmp_path / "nothing.obj")


def test_folder(tmp_path):
    with pytest.raises(MeshError, match="is a folder; want a mesh file"):
        load_mesh(tmp_path)


@pytest.mark.parametrize("suffix", ["obj", "glb", "ply", "stl", "off"])
def test_empty_file(tmp_path, suffix):
    path = tmp_path / f"mesh.{suffix}"
    path.write_bytes(b"")
    with pytest.raises(MeshError, match=rf"mesh\.{suffix}: the file is empty"):
        load_mesh(path)


@pytest.mark.parametrize("suffix", ["obj", "glb", "gltf", "ply", "stl", "off", "3ds", "xyz123"])
def test_rubbish(tmp_path, suffix):
    path = tmp_path / f"mesh.{suffix}"
    path.write_bytes(b"\x93 this is no mesh \x00\xff" * 20)
    with pytest.raises(MeshError, match=rf"mesh\.{suffix}: (cannot be read as a mesh|has no faces)"):
        load_mesh(path)


def test_truncated_file(tmp_path):
    path = tmp_path / "mesh.glb"
    whole = trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES).export(file_type="glb")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MeshError, match=r"mesh\.glb: cannot be read as a mesh"):
        load_mesh(path)


def test_vertices_without_faces(tmp_path):
    write_obj(tmp_path / "mesh.obj", TETRAHEDRON, [])
    with pytest.raises(MeshError, match=r"mesh\.obj: .*want a triangle mesh"):
        load_mesh(tmp_path / "mesh.obj")


def test_point_cloud(tmp_path):
    trimesh.PointCloud(TETRAHEDRON).export(tmp_path / "cloud.ply")
    with pytest.raises(MeshError, match=r"cloud\.ply: is a point cloud, without faces; want a triangle mesh"):
        load_mesh(tmp_path / "cloud.ply")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_vertices_that_are_not_finite(tmp_path, value):
    write_obj(tmp_path / "mesh.obj", [*TETRAHEDRON[:3], [0, 0, value]], TETRAHEDRON_FACES)
    with pytest.raises(MeshError, match="1 of 4 vertices have NaN or infinite coordinates"):
        load_mesh(tmp_path / "mesh.obj")


def test_an_unused_bad_vertex_does_no_harm(tmp_path):
    write_obj(tmp_path / "mesh.obj", [["nan"] * 3, [1e9] * 3, *TETRAHEDRON], TETRAHEDRON_FACES + 2)
    mesh = load_mesh(tmp_path / "mesh.obj")
    np.testing.assert_array_equal(mesh.user_vertices(), TETRAHEDRON)


def test_no_extent(tmp_path):
    write_obj(tmp_path / "mesh.obj", [[1, 2, 3]] * 4, TETRAHEDRON_FACES)
    with pytest.raises(MeshError, match=r"all vertices lie at \[1\.0, 2\.0, 3\.0\]"):
        load_mesh(tmp_path / "mesh.obj")


def test_only_degenerate_faces(tmp_path):
    write_obj(tmp_path / "mesh.obj", [[0, 0, 0], [1, 1, 1], [2, 2, 2]], [[0, 1, 2], [0, 0, 1]])
    with pytest.raises(MeshError, match="all 2 faces are degenerate"):
        load_mesh(tmp_path / "mesh.obj")


def test_too_many_faces(tmp_path):
    trimesh.creation.icosphere(3).export(tmp_path / "mesh.ply")
    with pytest.raises(MeshError, match="1280 faces, at most 1279 are accepted; simplify the mesh"):
        load_mesh(tmp_path / "mesh.ply", max_faces=1279)
    assert len(load_mesh(tmp_path / "mesh.ply", max_faces=1280).faces) == 1280


def test_over_a_million_faces_are_refused_by_default(tmp_path):
    count = 1_000_001
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    header += f"element face {count}\nproperty list uchar int vertex_indices\nend_header\n"
    corners = np.eye(3, dtype="<f4").tobytes()
    (tmp_path / "mesh.ply").write_bytes(header.encode() + corners + struct.pack("<Biii", 3, 0, 1, 2) * count)
    with pytest.raises(MeshError, match="1000001 faces, at most 1000000"):
        load_mesh(tmp_path / "mesh.ply")


def test_faces_that_name_no_vertex(tmp_path):
    (tmp_path / "mesh.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n")
    with pytest.raises(MeshError, match=r"mesh\.off"):
        load_mesh(tmp_path / "mesh.off")


def test_unknown_builtin():
    with pytest.raises(MeshError, match="builtin:bunnny: no such bundled mesh; there are bunny, knot, lettered, teapot, vase"):
        load_mesh("builtin:bunnny")


def test_bad_up(tmp_path):
    with pytest.raises(MeshError, match="up is 'x'; want 'y' or 'z'"):
        load_mesh(tmp_path / "mesh.obj", up="x")


# ---------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", ["obj", "glb", "ply", "stl", "off"])
def test_every_format_comes_back_in_the_users_frame(tmp_path, suffix):
    path = tmp_path / f"mesh.{suffix}"
    trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES, process=False).export(path)
    mesh = load_mesh(str(path))
    assert mesh.source_path == path and mesh.vertices.dtype == torch.float32 and mesh.faces.dtype == torch.int64
    assert mesh.vertices.shape == (4, 3)  # welded, where the format repeats them
    corners = mesh.user_vertices()[mesh.faces.numpy()]
    np.testing.assert_allclose(corners, TETRAHEDRON[TETRAHEDRON_FACES], atol=1e-6)
    assert volume(mesh) == pytest.approx(1.0, rel=1e-6)
    back = normalize(mesh)
    np.testing.assert_allclose(back.user_vertices()[back.faces.numpy()], TETRAHEDRON[TETRAHEDRON_FACES], atol=1e-5)


def test_quads_and_polygons_are_triangulated(tmp_path):
    corners = [[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    write_obj(tmp_path / "cube.obj", corners, quads)
    cube = load_mesh(tmp_path / "cube.obj")
    assert cube.vertices.shape == (8, 3) and cube.faces.shape == (12, 3) and volume(cube) == pytest.approx(1)
    (tmp_path / "cube.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 6\nproperty list uchar int vertex_indices\nend_header\n"
        + "".join(f"{a} {b} {c}\n" for a, b, c in corners)
        + "".join("4 " + " ".join(map(str, quad)) + "\n" for quad in quads)
    )
    assert volume(load_mesh(tmp_path / "cube.ply")) == pytest.approx(1)
    hexagon = [[np.cos(a), np.sin(a), 0] for a in np.arange(6) * np.pi / 3]
    write_obj(tmp_path / "hexagon.obj", hexagon, [[0, 1, 2, 3, 4, 5]])
    assert load_mesh(tmp_path / "hexagon.obj").faces.shape == (4, 3)


def test_parts_of_a_scene_are_placed_and_a_mirroring_node_keeps_its_outside(tmp_path):
    part = trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES, process=False)
    scene = trimesh.Scene()
    moved, mirrored = np.eye(4), np.diag([-1.0, 1, 1, 1])
    moved[:3, 3] = [10, 0, 0]
    scene.add_geometry(part, transform=moved)
    scene.add_geometry(part.copy(), transform=mirrored)
    scene.export(tmp_path / "scene.glb")
    mesh = load_mesh(tmp_path / "scene.glb")
    assert mesh.vertices.shape == (8, 3) and mesh.faces.shape == (8, 3)
    assert volume(mesh) == pytest.approx(2, rel=1e-5)
    low, high = mesh.user_vertices().min(0), mesh.user_vertices().max(0)
    np.testing.assert_allclose([low, high], [[-1, 0, 0], [11, 2, 3]], atol=1e-6)


def test_gltf_is_turned_upright_and_never_mirrored(tmp_path):
    trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES, process=False).export(tmp_path / "mesh.glb")
    mesh = load_mesh(tmp_path / "mesh.glb")
    extent = (mesh.vertices.max(0).values - mesh.vertices.min(0).values).tolist()
    assert extent == pytest.approx([3, 1, 2])  # the file's y is up, its z, a glTF model's front, looks at azimuth 0
    assert np.linalg.det(mesh.frame.rotation) == pytest.approx(1)
    assert volume(mesh) == pytest.approx(1, rel=1e-6)
    as_is = load_mesh(tmp_path / "mesh.glb", up="z")
    np.testing.assert_array_equal(as_is.vertices.numpy(), as_is.user_vertices())
    trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES, process=False).export(tmp_path / "mesh.obj")
    turned = load_mesh(tmp_path / "mesh.obj", up="y")
    np.testing.assert_allclose(turned.vertices[turned.faces], mesh.vertices[mesh.faces], atol=1e-6)


def test_a_glb_that_turns_a_z_up_mesh_upright_is_read_as_that_mesh_itself(tmp_path):
    """As Blender's and our own are: else a mesh that was exported and textured again would have its front on another side."""
    from threestudio_pgc.export.textured_mesh import export_textured_mesh

    write_obj(tmp_path / "mesh.obj", TETRAHEDRON, TETRAHEDRON_FACES)
    first = load_mesh(tmp_path / "mesh.obj")
    color = lambda points, normals: {"base_color": torch.full_like(points, 0.5)}  # noqa: E731
    export_textured_mesh(first, color, tmp_path, "mesh", formats=("glb",), resolution=64)
    again = load_mesh(tmp_path / "mesh.glb")
    assert set(map(tuple, again.vertices.tolist())) == set(map(tuple, TETRAHEDRON.tolist()))
    np.testing.assert_allclose(again.frame.rotation, np.eye(3))
    assert volume(again) > 0
    told = load_mesh(tmp_path / "mesh.glb", up="y")  # what is said counts
    assert sorted(told.frame.apply(told.vertices.numpy())[:, 1].round(6).tolist()) == [0, 0, 0, 3]


def test_degenerate_faces_are_left_out_and_said_so(tmp_path):
    faces = [*TETRAHEDRON_FACES.tolist(), [0, 0, 1], [0, 1, 4]]
    write_obj(tmp_path / "mesh.obj", [*TETRAHEDRON, [2, 0, 0]], faces)
    with pytest.warns(UserWarning, match="left out 2 of 6 faces, which have no area"):
        mesh = load_mesh(tmp_path / "mesh.obj")
    np.testing.assert_array_equal(mesh.user_vertices()[mesh.faces], TETRAHEDRON[TETRAHEDRON_FACES])


def test_a_thin_but_real_triangle_is_kept(tmp_path):
    write_obj(tmp_path / "mesh.obj", [[0, 0, 0], [1, 0, 0], [0.5, 1e-5, 0]], [[0, 1, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_mesh(tmp_path / "mesh.obj").faces) == 1


def test_far_from_the_origin_the_shape_survives(tmp_path):
    far = TETRAHEDRON + [4.1e6, -5.2e5, 30.0]
    write_obj(tmp_path / "mesh.obj", far, TETRAHEDRON_FACES)
    mesh = load_mesh(tmp_path / "mesh.obj")
    assert volume(mesh) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(normalize(mesh).user_vertices(), far, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- welding, UVs, colours


def test_texture_seams_do_not_split_the_geometry(tmp_path):
    """Two triangles that share an edge in space but not in the texture."""
    (tmp_path / "mesh.obj").write_text(
        "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0.5\nvt 0 0\nvt 0.4 0\nvt 0.4 0.4\nvt 0.6 0.6\nvt 1 1\nvt 0.6 1\nf 1/1 2/2 3/3\nf 1/4 3/5 4/6\n"
    )
    mesh = load_mesh(tmp_path / "mesh.obj")
    assert mesh.vertices.shape == (4, 3) and mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    assert mesh.uvs.shape == (6, 2) and mesh.uv_faces.shape == (2, 3)
    expected = [[[0, 0], [0.4, 0], [0.4, 0.4]], [[0.6, 0.6], [1, 1], [0.6, 1]]]
    torch.testing.assert_close(mesh.uvs[mesh.uv_faces], torch.tensor(expected))


def test_negative_zero_is_zero(tmp_path):
    write_obj(tmp_path / "mesh.obj", [[0, 0, 0], [1, 0, 0], [0, 1, 0], ["-0.0", 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 1, 2], [3, 4, 5]])
    assert load_mesh(tmp_path / "mesh.obj").vertices.shape == (4, 3)


def test_texture_coordinates_read_the_same_from_glb_and_obj(tmp_path):
    """v = 1 is the picture's top row in both, although glTF counts v downwards."""
    uv = np.array([[0, 0], [1, 0], [0.25, 0.75], [0.5, 1.0]])
    visual = trimesh.visual.TextureVisuals(uv=uv)
    part = trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES, visual=visual, process=False)
    for suffix in ("glb", "obj"):
        part.export(tmp_path / f"mesh.{suffix}")
        mesh = load_mesh(tmp_path / f"mesh.{suffix}")
        np.testing.assert_allclose(mesh.uvs[mesh.uv_faces].numpy(), uv[TETRAHEDRON_FACES], atol=1e-6)


def test_texture_coordinates_of_some_parts_only_are_dropped_and_said_so(tmp_path):
    bare = trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES, process=False)
    textured = bare.copy()
    textured.visual = trimesh.visual.TextureVisuals(uv=np.random.default_rng(0).random((4, 2)))
    scene = trimesh.Scene([bare, textured])
    scene.export(tmp_path / "mesh.glb")
    with pytest.warns(UserWarning, match="1 of 2 parts lack texture coordinates, so all are ignored"):
        mesh = load_mesh(tmp_path / "mesh.glb")
    assert mesh.uvs is None and mesh.uv_faces is None


def test_vertex_colours(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [51, 102, 153]], np.uint8)
    part = trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES, vertex_colors=colours, process=False)
    part.export(tmp_path / "mesh.ply")
    mesh = load_mesh(tmp_path / "mesh.ply")
    torch.testing.assert_close(mesh.vertex_colors, torch.from_numpy(colours / 255).float())
    trimesh.Trimesh(TETRAHEDRON, TETRAHEDRON_FACES, process=False).export(tmp_path / "plain.ply")
    assert load_mesh(tmp_path / "plain.ply").vertex_colors is None


# ---------------------------------------------------------------------------------------------------------------- frame


def rotation() -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def test_similarity_there_and_back():
    frame = Similarity(rotation(), 3.0, np.array([1.0, -2.0, 5.0]))
    points = np.random.default_rng(2).normal(size=(7, 3))
    np.testing.assert_allclose(frame.invert(frame.apply(points)), points, atol=1e-14)
    np.testing.assert_allclose(frame.apply(points[1:]) - frame.apply(points[:1]), 3 * frame.rotate(points[1:] - points[:1]), atol=1e-13)


@pytest.mark.parametrize("extent", [0.8, 0.5])
def test_normalize_centres_scales_and_keeps_the_way_back(extent):
    generator = np.random.default_rng(3)
    vertices = torch.from_numpy((generator.random((50, 3)) * [5, 2, 9] + [100, 3, -40]).astype(np.float32))
    frame = Similarity(rotation(), 2.5, np.array([7.0, 8.0, 9.0]))
    mesh = TriangleMesh(vertices, torch.from_numpy(generator.integers(0, 50, (30, 3))), frame=frame)
    moved = normalize(mesh, extent)
    low, high = moved.vertices.min(0).values, moved.vertices.max(0).values
    torch.testing.assert_close(low, -high, rtol=0, atol=1e-6)
    assert float(high.max()) == pytest.approx(extent, abs=1e-6)
    np.testing.assert_allclose(moved.user_vertices(), mesh.user_vertices(), atol=1e-4)
    assert np.linalg.det(moved.frame.rotation) == pytest.approx(1)
    assert np.sign(volume(moved)) == np.sign(volume(normalize(moved)))
    assert torch.equal(moved.faces, mesh.faces) and torch.equal(mesh.vertices, vertices)


# ---------------------------------------------------------------------------------------------------------------- normals


def test_sphere_normals_point_outward():
    sphere = trimesh.creation.icosphere(4)
    mesh = TriangleMesh(torch.from_numpy(sphere.vertices).float(), torch.from_numpy(sphere.faces))
    assert (mesh.vertex_normals() * mesh.vertices).sum(-1).min() > 0.9995
    assert (mesh.face_normals() * mesh.vertices[mesh.faces].mean(1)).sum(-1).min() > 0.99
    torch.testing.assert_close(mesh.vertex_normals().norm(dim=-1), torch.ones(len(mesh.vertices)))


def test_normals_are_weighted_by_area():
    # around vertex 0 a face of area 2 looks to +z, one of area 1/2 to +x
    vertices = torch.tensor([[0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float32)
    mesh = TriangleMesh(vertices, torch.tensor([[0, 1, 2], [0, 3, 4]]))
    expected = torch.nn.functional.normalize(torch.tensor([0.5, 0, 2.0]), dim=0)
    torch.testing.assert_close(mesh.vertex_normals()[0], expected)
    assert mesh.face_normals().tolist() == [[0, 0, 1], [1, 0, 0]]


def test_normals_of_faces_that_cancel_out_are_finite_with_finite_gradient():
    vertices = torch.eye(3).requires_grad_()
    mesh = TriangleMesh(vertices, torch.tensor([[0, 1, 2], [2, 1, 0]]))
    assert mesh.vertex_normals().tolist() == [[0, 0, 1]] * 3
    mesh.vertex_normals().sum().backward()
    assert torch.isfinite(vertices.grad).all()


def test_normals_follow_the_vertices():
    mesh = TriangleMesh(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([[0, 1, 2]]))
    assert mesh.vertex_normals() is mesh.vertex_normals()
    with torch.no_grad():
        mesh.vertices[2] = torch.tensor([0.0, 0, 1])
    assert mesh.vertex_normals()[0].tolist() == [0, -1, 0]
    mesh.vertices = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert mesh.vertex_normals()[0].tolist() == [1, 0, 0]
    mesh.vertices.requires_grad_()
    for _ in range(2):  # each call has a graph of its own
        mesh.vertex_normals().sum().backward()


def test_normals_of_a_validation_serve_the_training_after_it():
    mesh = load_mesh("builtin:lettered")
    with torch.inference_mode():  # Lightning validates in it, and does so once before training
        expected = mesh.vertex_normals()
        assert torch.equal(mesh.to("cpu").vertex_normals(), expected)
    weight = torch.ones(3, requires_grad=True)
    (mesh.vertex_normals() * weight).sum().backward()
    torch.testing.assert_close(weight.grad, expected.sum(0))


def test_to_moves_everything():
    mesh = load_mesh("builtin:lettered").to("meta")
    assert {getattr(mesh, name).device.type for name in ("vertices", "faces", "uvs", "uv_faces")} == {"meta"}
    assert mesh.source_path == builtin_mesh_path("lettered")


# ---------------------------------------------------------------------------------------------------------------- bundled


@pytest.mark.parametrize("name", ["bunny", "knot", "lettered", "teapot", "vase"])
def test_bundled_meshes_are_sound(name):
    assert name in builtin_mesh_names()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no degenerate faces
        mesh = normalize(load_mesh(f"builtin:{name}"))
    faces = mesh.faces.numpy()
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert len(np.unique(directed, axis=0)) == len(directed)  # consistently wound, manifold
    unpaired = len({tuple(edge) for edge in directed} ^ {tuple(edge[::-1]) for edge in directed})
    assert (unpaired > 0) == (name == "teapot")  # closed, but for the teapot's rims
    assert volume(mesh) > 0.1  # faces look outward
    assert (mesh.uvs is not None) == (name == "lettered")
    assert 1000 < len(mesh.faces) < 10_000


def test_lettered_texture_is_one_to_one():
    """No mirrored, empty or overlapping chart, so that a user's own coordinates can be tested with it."""
    mesh = load_mesh("builtin:lettered")
    a, b, c = mesh.uvs[mesh.uv_faces].double().unbind(1)
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    assert (area > 1e-6).all() and mesh.uvs.min() > 0 and mesh.uvs.max() < 1
    from threestudio_pgc.scene.raster.cpu import CpuRasterizer

    clip = torch.cat([mesh.uvs * 2 - 1, torch.zeros(len(mesh.uvs), 1), torch.ones(len(mesh.uvs), 1)], dim=1)
    times = torch.zeros(128, 128)
    for group in clip[mesh.uv_faces].split(64):  # each triangle as a view of its own
        times += (CpuRasterizer().rasterize(group, torch.tensor([[0, 1, 2]]), 128, 128)[..., 3] > 0).sum(0)
    assert times.max() == 1 and times.mean() > 0.5
