"""Tangents, and that a normal map decoded as a glTF viewer does it gives back the normals that were baked."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.export.conftest import pbr_maps
from tests.export.test_gltf import parse_glb
from threestudio_pgc.export.atlas import UVAtlas
from threestudio_pgc.export.bake import bake
from threestudio_pgc.export.tangents import to_tangent_space, vertex_tangents
from threestudio_pgc.export.textured_mesh import export_textured_mesh
from threestudio_pgc.scene.mesh import Similarity, TriangleMesh, load_mesh, normalize
from threestudio_pgc.scene.mesh_colors import bilinear

CORNERS = np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
FACES = np.array([[0, 1, 2], [0, 2, 3]])
UP = np.array([[0, 0, 1.0]] * 4)
UVS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
MIRRORED = UVS * [-1, 1] + [1, 0]


def test_no_faces():
    none = np.zeros((0, 3))
    vertex, uv, faces, tangents = vertex_tangents(none, none.astype(int), none, none[:, :2], none.astype(int))
    assert len(vertex) == len(uv) == len(faces) == 0 and tangents.shape == (0, 4)


def test_faces_without_texture_area_have_some_tangent_always_the_same():
    for normal in (UP, UP[:, [2, 0, 1]], UP[:, [0, 2, 1]]):
        *_, first = vertex_tangents(CORNERS, FACES, normal, UVS * 0, FACES)
        *_, second = vertex_tangents(CORNERS, FACES, normal, UVS * 0, FACES)
        assert np.array_equal(first, second) and (first[:, 3] == 1).all()
        np.testing.assert_allclose(np.linalg.norm(first[:, :3], axis=1), 1, atol=1e-6)
        np.testing.assert_allclose((first[:, :3] * normal).sum(axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_tangent_runs_along_u_and_the_bitangent_along_v(mirrored, turns):
    uvs = MIRRORED if mirrored else UVS
    angle = turns * np.pi / 2
    uvs = (uvs - 0.5) @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + 0.5
    vertex, uv, faces, tangents = vertex_tangents(CORNERS, FACES, UP, uvs, FACES)
    assert np.array_equal(vertex[faces], FACES) and np.array_equal(uv[faces], FACES)
    bitangents = np.cross(UP[vertex], tangents[:, :3]) * tangents[:, 3:]
    # the two directions of space along which only u, and only v, grows
    step = np.linalg.solve(
        np.stack([CORNERS[1] - CORNERS[0], CORNERS[3] - CORNERS[0]])[:, :2], np.stack([uvs[1] - uvs[0], uvs[3] - uvs[0]])
    )
    u, v = np.linalg.inv(step)
    np.testing.assert_allclose(tangents[:, :2], np.tile(u / np.linalg.norm(u), (4, 1)), atol=1e-6)
    np.testing.assert_allclose(bitangents[:, :2], np.tile(v / np.linalg.norm(v), (4, 1)), atol=1e-6)
    assert (tangents[:, 3] == (-1 if mirrored else 1)).all()


def test_corners_count_by_their_angle():
    """Two faces around the origin: one of 90 degrees with u along x, one of 45 degrees with u along y."""
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [-1, 1, 0]])
    uvs = np.array([[0.0, 0], [1, 0], [0, 1], [1, 0], [1, 1]])
    vertex, _, _, tangents = vertex_tangents(vertices, np.array([[0, 1, 2], [0, 2, 3]]), UP, uvs, np.array([[0, 1, 2], [0, 3, 4]]))
    np.testing.assert_allclose(tangents[vertex == 0], [[2 / 5**0.5, 1 / 5**0.5, 0, 1]], atol=1e-6)


def test_a_mirrored_face_shares_no_vertex_with_one_that_is_not():
    """A texture folded along the diagonal, whose vertices have one texture coordinate each."""
    uvs = np.array([[0.0, 0], [1, 0], [1, 1], [1, 0]])
    vertex, uv, faces, tangents = vertex_tangents(CORNERS, FACES, UP, uvs, FACES)
    assert len(vertex) == 6 and not set(faces[0]) & set(faces[1])
    assert np.array_equal(vertex[faces], FACES) and np.array_equal(uv[faces], FACES)
    assert (tangents[faces[0], 3] == 1).all() and (tangents[faces[1], 3] == -1).all()
    np.testing.assert_allclose(tangents[faces[1], :3], [[0, 1, 0]] * 3, atol=1e-6)


def test_tangents_are_unit_and_orthogonal_on_a_curved_mesh(bare_sphere):
    uvs = np.random.default_rng(0).random((len(bare_sphere.vertices), 2))
    normals, faces = bare_sphere.vertex_normals().numpy(), bare_sphere.faces.numpy()
    vertex, _, _, tangents = vertex_tangents(bare_sphere.vertices.numpy(), faces, normals, uvs, faces)
    assert tangents.dtype == np.float32 and set(tangents[:, 3]) == {-1.0, 1.0}
    np.testing.assert_allclose(np.linalg.norm(tangents[:, :3], axis=1), 1, atol=1e-6)
    assert np.abs((tangents[:, :3] * normals[vertex]).sum(axis=1)).max() < 1e-6


def test_a_frame_that_has_collapsed_gives_the_surfaces_own_normal():
    flat = torch.tensor([[0.0, 0, 1]]).expand(3, 3)
    x = torch.tensor([[1.0, 0, 0]]).expand(3, 3)
    assert torch.equal(to_tangent_space(x, flat, flat, x), torch.tensor([[0.0, 0, 1]]).expand(3, 3))
    assert torch.equal(to_tangent_space(x * 0, flat, x, torch.linalg.cross(flat, x)), torch.tensor([[0.0, 0, 1]]).expand(3, 3))


def test_coordinates_in_a_crooked_frame_lead_back_to_the_direction():
    generator = torch.Generator().manual_seed(0)
    directions, normal, tangent, bitangent = torch.randn(4, 500, 3, generator=generator, dtype=torch.float64)
    found = to_tangent_space(directions, normal, tangent, bitangent)
    back = sum(found[:, k, None] * F.normalize(axis, dim=-1) for k, axis in enumerate((tangent, bitangent, normal)))
    torch.testing.assert_close(F.normalize(back, dim=-1), F.normalize(directions, dim=-1))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("lean, texel", [([1.0, 0, 1], [1, 0, 1]), ([0, 1.0, 1], [0, 1, 1]), ([0, -1.0, 1], [0, -1, 1])])
def test_red_is_right_in_the_picture_and_green_is_up(lean, texel, mirrored):
    """A square in the xy plane whose texture is upright, u along x and v along y: OpenGL's convention, which is glTF's."""

    def leaning(points, normals):
        return {"base_color": points * 0, "normal": F.normalize(torch.tensor(lean).expand(len(points), 3), dim=-1)}

    square = TriangleMesh(torch.from_numpy(CORNERS).float(), torch.from_numpy(FACES))
    atlas = UVAtlas((MIRRORED if mirrored else UVS).astype(np.float32), FACES, "user")
    wanted = np.array(texel) * ([-1, 1, 1] if mirrored else 1) / 2**0.5
    np.testing.assert_allclose(bake(square, atlas, leaning, 4)["normal"], np.broadcast_to(wanted, (4, 4, 3)), atol=1e-6)


def seen_by_a_viewer(glb, count=4000):
    """Random points of a GLB's surface as stored in it, their unit interpolated normals, and the shading normals that a viewer shows.

    Vertices have tangent, bitangent and normal; all three are interpolated and brought to unit length, as Khronos' sample viewer does.
    """
    document, views = parse_glb(glb.read_bytes())
    numbers = {
        name: document["accessors"][number]["bufferView"] for name, number in document["meshes"][0]["primitives"][0]["attributes"].items()
    }
    widths = {"POSITION": 3, "NORMAL": 3, "TEXCOORD_0": 2, "TANGENT": 4}
    read = {name: np.frombuffer(views[numbers[name]], "<f4").reshape(-1, width).astype(np.float64) for name, width in widths.items()}
    faces = np.frombuffer(views[0], "<u4").reshape(-1, 3)
    image = document["textures"][document["materials"][0]["normalTexture"]["index"]]["source"]
    picture = np.asarray(Image.open(io.BytesIO(views[document["images"][image]["bufferView"]])))

    generator = np.random.default_rng(0)
    face, weights = generator.integers(len(faces), size=count), generator.dirichlet([1, 1, 1], size=count)

    def interpolate(values):
        return (values[faces[face]] * weights[:, :, None]).sum(axis=1)

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    tangents = read["TANGENT"][:, :3]
    bitangents = np.cross(read["NORMAL"], tangents) * read["TANGENT"][:, 3:]
    frame = [unit(interpolate(values)) for values in (tangents, bitangents, read["NORMAL"])]
    texel = bilinear(picture, interpolate(read["TEXCOORD_0"]) * [1, -1] + [0, 1]) * 2 - 1
    shown = unit(sum(texel[:, k, None] * frame[k] for k in range(3)))
    return interpolate(read["POSITION"]), frame[2], shown


def some_mesh(kind, box, bare_sphere, tmp_path):
    if kind == "xatlas":
        return bare_sphere
    turn = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    box.frame = Similarity(turn, 3.0, np.array([1.0, 2, 3]))
    if kind == "mirrored":
        box.uvs = box.uvs * torch.tensor([-1, 1]) + torch.tensor([1, 0])
    if kind == "bunny":
        return normalize(load_mesh("builtin:bunny"))
    return box


@pytest.mark.parametrize("kind", ["xatlas", "user", "mirrored", "bunny"])
def test_a_viewer_sees_the_normals_that_were_baked(kind, box, bare_sphere, tmp_path):
    mesh = some_mesh(kind, box, bare_sphere, tmp_path)
    glb = export_textured_mesh(mesh, pbr_maps, tmp_path, "mesh", formats=["glb"], resolution=1024)["glb"]
    points, normals, shown = seen_by_a_viewer(glb)
    stored = torch.from_numpy(mesh.frame.invert(points)).float(), torch.from_numpy(normals @ mesh.frame.rotation).float()
    wanted = mesh.frame.rotate(pbr_maps(*stored)["normal"].numpy())
    degrees = np.degrees(np.arccos((shown * wanted).sum(axis=1).clip(-1, 1)))
    lean = np.degrees(np.arccos((normals * wanted).sum(axis=1).clip(-1, 1)))
    assert np.quantile(degrees, 0.99) < 1
    assert np.median(lean) > 10  # the surface's own normals would not do
