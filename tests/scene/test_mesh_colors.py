"""A mesh file's own colours: from wherever its format keeps them, the right way up, at the right place of the normalised mesh."""

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from threestudio_pgc.scene.mesh import MeshError, TriangleMesh, linear_to_srgb, load_mesh, normalize, srgb_to_linear
from threestudio_pgc.scene.mesh_colors import bilinear, surface_colors

RED, GREEN, BLUE, YELLOW = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float64)  # x and y are its texture coordinates
SQUARE_FACES = np.array([[0, 1, 2], [0, 2, 3]])
CORNERS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float64)  # a tetrahedron, each corner of the colour of its position
CORNER_FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def quarters() -> Image.Image:
    """Red and green above, blue and yellow below."""
    return Image.fromarray(np.array([[RED, GREEN], [BLUE, YELLOW]]).repeat(8, axis=0).repeat(8, axis=1))


def textured_square(**material) -> trimesh.Trimesh:
    visual = TextureVisuals(uv=SQUARE[:, :2], material=PBRMaterial(baseColorTexture=quarters(), **material))
    return trimesh.Trimesh(SQUARE, SQUARE_FACES, visual=visual, process=False)


def sampled(path, count=2000, **options) -> tuple[np.ndarray, np.ndarray]:
    """Points in the file's own coordinates, and their colours, read through `normalize`."""
    mesh = normalize(load_mesh(path, **options), 0.7)
    points, colors = surface_colors(mesh).sample(count, torch.Generator().manual_seed(0))
    assert points.shape == colors.shape == (count, 3) and points.dtype == colors.dtype == torch.float32
    assert points.abs().max() <= 0.7 + 1e-6 and colors.min() >= 0 and colors.max() <= 1
    return mesh.frame.apply(points.numpy()), colors.numpy()


def assert_quarters(points, colors):
    """The picture stands upright on the square: row 0 is at y = 1."""
    inner = (np.abs(points[:, :2] - 0.5).min(axis=1) > 0.05) & (np.abs(points[:, :2] - 0.5).max(axis=1) < 0.45)
    right, above = points[inner, 0] > 0.5, points[inner, 1] > 0.5
    expected = np.where(above[:, None], np.where(right[:, None], GREEN, RED), np.where(right[:, None], YELLOW, BLUE)) / 255
    assert inner.sum() > 500
    np.testing.assert_allclose(colors[inner], expected, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- without colours


def test_a_mesh_made_here_has_no_colours():
    assert surface_colors(TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))) is None


@pytest.mark.parametrize("suffix", ["obj", "glb", "ply", "stl", "off"])
def test_a_file_without_colours_has_none(tmp_path, suffix):
    trimesh.Trimesh(CORNERS, CORNER_FACES, process=False).export(tmp_path / f"mesh.{suffix}")
    assert surface_colors(load_mesh(tmp_path / f"mesh.{suffix}")) is None


def test_texture_coordinates_alone_are_no_colours(tmp_path):
    assert surface_colors(load_mesh("builtin:lettered")) is None
    (tmp_path / "mesh.obj").write_text("mtllib gone.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl red\nf 1/1 2/2 3/3\n")
    assert surface_colors(load_mesh(tmp_path / "mesh.obj")) is None


# --------------------------------------------------------------------------------------------------------------------- pictures


def test_bilinear_takes_texels_at_their_centres_and_repeats():
    picture = np.array([[[0, 0, 0], [100, 0, 0]], [[0, 200, 0], [0, 0, 240]]], np.uint8)
    uvs = np.array([[0.25, 0.75], [0.75, 0.75], [0.25, 0.25], [0.5, 0.75], [0.0, 0.75], [0.25, 0.5], [1.25, -0.25], [0.5, 0.5]])
    expected = [[0, 0, 0], [100, 0, 0], [0, 200, 0], [50, 0, 0], [50, 0, 0], [0, 100, 0], [0, 0, 0], [25, 50, 60]]
    np.testing.assert_allclose(bilinear(picture, uvs) * 255, expected, atol=1e-9)
    assert bilinear(picture, np.zeros((0, 2))).shape == (0, 3)


def test_picture_of_a_glb(tmp_path):
    textured_square().export(tmp_path / "mesh.glb")
    for up in ("y", "z"):
        assert_quarters(*sampled(tmp_path / "mesh.glb", up=up))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_picture_of_an_obj(tmp_path, mode):
    quarters().convert(mode).save(tmp_path / "picture.png")
    (tmp_path / "mesh.mtl").write_text("newmtl painted\nKd 0 0 0\nmap_Kd picture.png\n")
    corners = "".join(f"v {x} {y} {z}\nvt {x} {y}\n" for x, y, z in SQUARE)
    (tmp_path / "mesh.obj").write_text(f"mtllib mesh.mtl\n{corners}usemtl painted\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n")
    assert_quarters(*sampled(tmp_path / "mesh.obj"))


def test_picture_of_a_ply(tmp_path):
    quarters().save(tmp_path / "picture.png")
    (tmp_path / "mesh.ply").write_text(
        "ply\nformat ascii 1.0\ncomment TextureFile picture.png\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
        "property float u\nproperty float v\nelement face 2\nproperty list uchar int vertex_indices\nend_header\n"
        + "".join(f"{x} {y} {z} {x} {y}\n" for x, y, z in SQUARE)
        + "3 0 1 2\n3 0 2 3\n"
    )
    assert_quarters(*sampled(tmp_path / "mesh.ply"))


def test_the_factor_of_a_glb_multiplies_its_picture_in_linear_light(tmp_path):
    grey = Image.new("RGB", (4, 4), (188, 188, 188))  # half of the light
    visual = TextureVisuals(uv=SQUARE[:, :2], material=PBRMaterial(baseColorTexture=grey, baseColorFactor=[1.0, 0.4, 0.0, 1.0]))
    trimesh.Trimesh(SQUARE, SQUARE_FACES, visual=visual, process=False).export(tmp_path / "mesh.glb")
    _, colors = sampled(tmp_path / "mesh.glb")
    light = srgb_to_linear(np.float64(188 / 255)) * np.array([1, 0.4, 0])
    np.testing.assert_allclose(colors, np.tile(linear_to_srgb(light), (len(colors), 1)), atol=1e-5)


def test_a_picture_cut_short_is_refused_where_it_is_wanted(tmp_path):
    quarters().resize((300, 300)).save(tmp_path / "picture.png")
    whole = (tmp_path / "picture.png").read_bytes()
    (tmp_path / "picture.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "mesh.mtl").write_text("newmtl painted\nmap_Kd picture.png\n")
    (tmp_path / "mesh.obj").write_text(
        "mtllib mesh.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl painted\nf 1/1 2/2 3/3\n"
    )
    mesh = load_mesh(tmp_path / "mesh.obj")
    with pytest.raises(MeshError, match=r"mesh\.obj: its picture 0 cannot be read"):
        surface_colors(mesh)


# ------------------------------------------------------------------------------------------------------------------ flat colours


def test_flat_factor_of_a_glb_is_linear(tmp_path):
    visual = TextureVisuals(material=PBRMaterial(baseColorFactor=[0.2, 1.0, 0.0, 1.0]))
    trimesh.Trimesh(CORNERS, CORNER_FACES, visual=visual, process=False).export(tmp_path / "mesh.glb")
    _, colors = sampled(tmp_path / "mesh.glb")
    np.testing.assert_allclose(colors, np.tile([linear_to_srgb(np.float64(0.2)), 1, 0], (len(colors), 1)), atol=1e-5)
    assert colors[0, 0] == pytest.approx(0.485, abs=1e-3)


def test_an_obj_with_two_materials_and_a_part_without(tmp_path):
    """A painted square at z = 0, one of a flat colour at z = 1, a bare one at z = 2."""
    quarters().save(tmp_path / "picture.png")
    (tmp_path / "mesh.mtl").write_text("newmtl painted\nmap_Kd picture.png\nnewmtl flat\nKd 0.2 0.4 0.6\n")
    corners = "".join(f"v {x} {y} {z}\nvt {x} {y}\n" for z in (0, 1, 2) for x, y, _ in SQUARE)
    (tmp_path / "mesh.obj").write_text(
        f"mtllib mesh.mtl\n{corners}f 9 10 11\nf 9 11 12\nusemtl painted\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\nusemtl flat\nf 5 6 7\nf 5 7 8\n"
    )
    with pytest.warns(UserWarning, match="parts lack texture coordinates"):
        points, colors = sampled(tmp_path / "mesh.obj", 4000)
    lower = points[:, 2] < 0.5
    assert points[:, 2].max() < 1.5 and abs(lower.mean() - 0.5) < 0.05
    assert_quarters(points[lower], colors[lower])
    np.testing.assert_allclose(colors[~lower], np.tile([0.2, 0.4, 0.6], ((~lower).sum(), 1)), atol=1e-6)


def test_parts_of_a_glb_with_pictures_of_their_own(tmp_path):
    """The second square is moved by its node and has the picture turned upside down."""
    other = textured_square()
    other.visual.material = PBRMaterial(baseColorTexture=quarters().transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    scene = trimesh.Scene([textured_square()])
    scene.add_geometry(other, transform=trimesh.transformations.translation_matrix([3, 0, 0]))
    scene.export(tmp_path / "mesh.glb")
    points, colors = sampled(tmp_path / "mesh.glb", 4000)
    first = points[:, 0] < 2
    assert_quarters(points[first], colors[first])
    upright = (points[~first] - [3, 0, 0]) * [1, -1, 1] + [0, 1, 0]
    assert_quarters(upright, colors[~first])


# --------------------------------------------------------------------------------------------------- colours of vertices and faces


@pytest.mark.parametrize("suffix", ["ply", "obj", "glb"])
@pytest.mark.parametrize("up", ["y", "z"])
def test_vertex_colours_are_interpolated(tmp_path, suffix, up):
    part = trimesh.Trimesh(CORNERS, CORNER_FACES, vertex_colors=(CORNERS * 255).astype(np.uint8), process=False)
    part.export(tmp_path / f"mesh.{suffix}")
    points, colors = sampled(tmp_path / f"mesh.{suffix}", up=up)
    np.testing.assert_allclose(colors, points, atol=1e-5)


def test_vertex_colours_of_a_mirrored_part_stay_at_their_vertices(tmp_path):
    part = trimesh.Trimesh(CORNERS, CORNER_FACES, vertex_colors=(CORNERS * 255).astype(np.uint8), process=False)
    scene = trimesh.Scene()
    scene.add_geometry(part, transform=np.diag([-1.0, 1, 1, 1]))
    scene.export(tmp_path / "mesh.glb")
    points, colors = sampled(tmp_path / "mesh.glb")
    np.testing.assert_allclose(colors, points * [-1, 1, 1], atol=1e-5)


def test_vertex_colours_of_a_glb_are_linear_and_multiply_its_material(tmp_path):
    visual = TextureVisuals(uv=CORNERS[:, :2], material=PBRMaterial(baseColorFactor=[0.4, 1.0, 1.0, 1.0]))
    visual.vertex_attributes["color"] = np.tile(np.array([128, 255, 0, 255], np.uint8), (4, 1))
    trimesh.Trimesh(CORNERS, CORNER_FACES, visual=visual, process=False).export(tmp_path / "mesh.glb")
    _, colors = sampled(tmp_path / "mesh.glb")
    expected = [linear_to_srgb(np.float64(0.4 * 128 / 255)), 1, 0]
    np.testing.assert_allclose(colors, np.tile(expected, (len(colors), 1)), atol=1e-5)


def test_face_colours(tmp_path):
    part = trimesh.Trimesh(SQUARE, SQUARE_FACES, process=False)
    part.visual.face_colors = np.array([[*RED, 255], [*BLUE, 255]])
    part.export(tmp_path / "mesh.ply")
    points, colors = sampled(tmp_path / "mesh.ply")
    np.testing.assert_allclose(colors, np.where((points[:, 0] > points[:, 1])[:, None], RED, BLUE) / 255, atol=1e-6)


def test_colours_keep_to_their_faces_where_others_were_left_out(tmp_path):
    colors = "".join(f"v {x} {y} {z} {x} {y} {z}\n" for x, y, z in CORNERS)
    (tmp_path / "mesh.obj").write_text(colors + "f 1 1 2\nf 1 3 2\nf 2 2 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    with pytest.warns(UserWarning, match="left out 2 of 6 faces"):
        points, colors = sampled(tmp_path / "mesh.obj")
    np.testing.assert_allclose(colors, points, atol=1e-5)


def test_display_and_linear_light_are_inverse_and_meet_the_standard():
    values = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(linear_to_srgb(srgb_to_linear(values)), values, atol=1e-6)
    np.testing.assert_allclose(srgb_to_linear(np.array([0, 0.04, 0.5, 1])), [0, 0.04 / 12.92, 0.21404, 1], atol=1e-5)
