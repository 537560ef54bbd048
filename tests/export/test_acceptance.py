"""Eleven meshes through the whole export, with every map: what a user's program finds in the files.

All are written at 256 texels a side and looked at by Khronos' validator and by trimesh. What is only true at a real resolution, that the
asset looks like its maps and that no seam shows, is measured at 2048 for four: charts of xatlas, with faces that it leaves out too, the
user's texture coordinates, and the user's, mirrored.
"""

import numpy as np
import pytest
import torch
import trimesh

from tests.export import validator
from tests.export.conftest import pbr_maps, textured_box
from tests.export.test_obj import parse_obj
from tests.export.test_textured_mesh import write_input
from threestudio_pgc.export.textured_mesh import export_textured_mesh
from threestudio_pgc.scene.cameras import orbit_cameras
from threestudio_pgc.scene.mesh import load_mesh, normalize
from threestudio_pgc.scene.mesh_colors import bilinear
from threestudio_pgc.scene.raster import make_rasterizer

pytestmark = pytest.mark.filterwarnings("ignore:unwrap. xatlas was not done")


def box_with_uvs(folder):
    write_input(folder / "box.obj", textured_box())
    return folder / "box.obj"


def mirrored_uvs(folder):
    box = textured_box()
    box.uvs = box.uvs * torch.tensor([-1, 1]) + torch.tensor([1, 0])
    write_input(folder / "mirrored.obj", box)
    return folder / "mirrored.obj"


def written(mesh, path):
    mesh.export(path)
    return path


def sphere(folder):
    return written(trimesh.creation.icosphere(subdivisions=3, radius=0.02), folder / "sphere.ply")


def half_a_cylinder(folder):
    """A surface with a rim, of one sheet."""
    turn, height = (grid.ravel() for grid in np.meshgrid(np.linspace(0, np.pi, 24), np.linspace(-1, 1, 9)))
    first = np.arange(8 * 24).reshape(8, 24)[:, :-1].ravel()
    faces = np.concatenate([np.stack([first, first + 1, first + 25], 1), np.stack([first, first + 25, first + 24], 1)])
    points = np.stack([np.cos(turn), np.sin(turn), height], axis=1)
    return written(trimesh.Trimesh(points, faces, process=False), folder / "half.ply")


def two_pieces(folder):
    ring = trimesh.creation.torus(major_radius=2.0, minor_radius=0.5)
    ball = trimesh.creation.icosphere(subdivisions=2)
    ball.apply_translation([5, 1, 2])
    return written(trimesh.util.concatenate([ring, ball]), folder / "pieces.stl")


def tiny_triangles(folder):
    """A dome whose rings shrink to a millionth of it towards its top."""
    polar, turn = np.geomspace(1e-6, 2.5, 60)[:, None], np.linspace(0, 2 * np.pi, 24, endpoint=False)
    rings = np.stack([np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn), np.cos(polar) + 0 * turn], axis=-1).reshape(-1, 3)
    first = np.arange(59)[:, None] * 24
    here, after = first + np.arange(24), first + (np.arange(24) + 1) % 24
    faces = np.concatenate([np.stack([here, here + 24, after + 24], -1), np.stack([here, after + 24, after], -1)]).reshape(-1, 3)
    return written(trimesh.Trimesh(rings, faces, process=False), folder / "dome.ply")


def many_faces(folder):
    bumpy = trimesh.creation.torus(major_radius=2.0, minor_radius=0.7, major_sections=400, minor_sections=250)
    bumpy.vertices *= 1 + 0.05 * np.sin(9 * bumpy.vertices).prod(axis=1)[:, None]
    assert len(bumpy.faces) == 200_000
    return written(bumpy, folder / "many.ply")


def several_materials(folder):
    """Two boxes in one OBJ, each with a material of its own, each covering the whole texture."""
    lines, count = ["mtllib two.mtl"], 0
    for number, shift in enumerate((0, 3)):
        box = textured_box()
        lines += [f"o part{number}", f"usemtl m{number}"]
        lines += ["v {} {} {}".format(*vertex) for vertex in (box.vertices + torch.tensor([shift, 0, 0])).tolist()]
        lines += ["vt {} {}".format(*uv) for uv in box.uvs.tolist()]
        rows = zip((box.faces + 1 + 8 * count).tolist(), (box.uv_faces + 1 + 24 * count).tolist())
        lines += ["f " + " ".join(f"{v}/{t}" for v, t in zip(*row)) for row in rows]
        count += 1
    (folder / "two.mtl").write_text("newmtl m0\nKd 1 0 0\nnewmtl m1\nKd 0 1 0\n")
    (folder / "two.obj").write_text("\n".join(lines))
    return folder / "two.obj"


def y_up_glb(folder):
    capsule = trimesh.creation.capsule(height=3.0, radius=0.5)
    capsule.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0]))
    capsule.apply_translation([10, 20, 30])
    return written(capsule, folder / "capsule.glb")


def bunny(folder):
    return "builtin:bunny"


def lettered(folder):
    return "builtin:lettered"


MESHES = (
    box_with_uvs,
    mirrored_uvs,
    sphere,
    half_a_cylinder,
    two_pieces,
    tiny_triangles,
    many_faces,
    several_materials,
    y_up_glb,
    bunny,
    lettered,
)
FINE = (bunny, lettered, mirrored_uvs, tiny_triangles)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Mesh, files and parsed OBJ of each of MESHES, by its name; the coarse export."""
    found = {}
    for make in MESHES:
        folder = tmp_path_factory.mktemp(make.__name__)
        mesh = normalize(load_mesh(make(folder)))
        # xatlas takes some 10 s for the 200k faces, which then come by their texture coordinates in the other way
        options = {"resolution": 256, "samples": 1, "unwrap_seconds": 1.0 if make is many_faces else 30.0}
        files = export_textured_mesh(mesh, pbr_maps, folder / "out", "asset", **options)
        found[make.__name__] = mesh, files, parse_obj(files["obj"])[:2]
    return found


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    """Mesh, and its GLB at 2048 as trimesh reads it, of each of FINE, by its name."""
    found = {}
    for make in FINE:
        folder = tmp_path_factory.mktemp(make.__name__)
        mesh = normalize(load_mesh(make(folder)))
        found[make.__name__] = mesh, reload(export_textured_mesh(mesh, pbr_maps, folder, "asset", formats=["glb"])["glb"])
    return found


def reload(glb):
    """The one mesh of a GLB, in the coordinates in which it is stored."""
    scene = trimesh.load(glb, process=False)
    (mesh,) = scene.geometry.values()
    return mesh


def test_khronos_validator_finds_nothing(exported):
    try:
        found = validator.issues([files["glb"] for _, files, _ in exported.values()])
    except validator.Unavailable as reason:
        pytest.skip(str(reason))
    assert list(found.values()) == [[]] * len(MESHES)


def test_khronos_validator_finds_nothing_in_variants(tmp_path):
    mesh = normalize(load_mesh(box_with_uvs(tmp_path)))
    paths = [
        export_textured_mesh(mesh, pbr_maps, tmp_path / kind, "asset", formats=["glb"], resolution=64, image_format=kind)["glb"]
        for kind in ("jpeg", "webp")
    ]
    paths += [export_textured_mesh(mesh, pbr_maps, tmp_path / "unlit", "asset", formats=["glb"], resolution=64, unlit=True)["glb"]]
    albedo = lambda points, normals: {"base_color": pbr_maps(points, normals)["base_color"]}  # noqa: E731
    paths += [export_textured_mesh(mesh, albedo, tmp_path / "albedo", "asset", formats=["glb"], resolution=64)["glb"]]
    try:
        found = validator.issues(paths)
    except validator.Unavailable as reason:
        pytest.skip(str(reason))
    assert list(found.values()) == [[]] * 4


def test_the_validator_does_find_what_is_wrong(tmp_path, exported):
    broken = tmp_path / "broken.glb"
    broken.write_bytes(exported["sphere"][1]["glb"].read_bytes().replace(b'"TANGENT":4', b'"_ANGENT":4'))
    try:
        found = validator.issues([broken])
    except validator.Unavailable as reason:
        pytest.skip(str(reason))
    assert found[broken]


@pytest.mark.parametrize("make", MESHES)
def test_the_obj_has_the_inputs_topology_in_its_own_frame(make, exported):
    mesh, _, (numbers, faces) = exported[make.__name__]
    assert np.array_equal(faces[..., 0], mesh.faces) and len(numbers["v"]) == len(mesh.vertices)
    np.testing.assert_allclose(numbers["v"], mesh.user_vertices(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("make", MESHES)
def test_the_reloaded_glb_has_the_same_positions_faces_and_texture_coordinates(make, exported):
    mesh, files, (numbers, faces) = exported[make.__name__]
    loaded = reload(files["glb"])
    assert loaded.faces.shape == tuple(mesh.faces.shape)
    assert np.array_equal(loaded.vertices[loaded.faces].astype(np.float32), mesh.user_vertices().astype(np.float32)[mesh.faces])
    np.testing.assert_allclose(loaded.visual.uv[loaded.faces], numbers["vt"][faces[..., 1]], atol=2e-7)
    if make in (box_with_uvs, mirrored_uvs, lettered):
        assert np.array_equal(numbers["vt"].astype(np.float32)[faces[..., 1]], mesh.uvs[mesh.uv_faces])
    else:
        assert numbers["vt"].min() >= 0 and numbers["vt"].max() <= 1


def test_the_users_numbers_come_back(exported, tmp_path):
    """Frame and units are the file's own, far off the origin, y up or z up."""
    for make in (box_with_uvs, sphere, y_up_glb):
        given = trimesh.load(make(tmp_path), force="mesh")
        loaded = trimesh.load(exported[make.__name__][1]["glb"], process=False, force="mesh")  # upright: the node's turn included
        wanted = given.bounds if make is y_up_glb else given.bounds @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
        np.testing.assert_allclose(loaded.bounds, np.sort(wanted, axis=0), rtol=0, atol=2e-7 * np.abs(given.bounds).max())


def textures(loaded):
    """Base colour and ORM of a mesh that trimesh read, (H, W, 3) uint8."""
    material = loaded.visual.material
    return [np.asarray(picture.convert("RGB")) for picture in (material.baseColorTexture, material.metallicRoughnessTexture)]


def wanted_texels(points):
    """What base colour and ORM are to show at stored points (N, 3)."""
    maps = pbr_maps(points, points)
    return maps["base_color"].numpy(), torch.cat([maps[name] for name in ("occlusion", "roughness", "metallic")], dim=1).numpy()


@pytest.mark.parametrize("make", FINE)
def test_the_reloaded_glb_looks_like_the_maps(make, fine):
    """Drawn at 512 pixels from four sides with its own texture coordinates: PSNR of what is seen, at least 35 dB."""
    mesh, loaded = fine[make.__name__]
    points = torch.from_numpy(mesh.frame.invert(loaded.vertices)).float()
    faces, uvs = torch.from_numpy(loaded.faces.astype(np.int64)), torch.from_numpy(loaded.visual.uv).float()
    rasterizer, errors = make_rasterizer("cpu"), []
    for matrix in orbit_cameras(4).mvp.float():
        clip = torch.cat([points, torch.ones(len(points), 1)], dim=1) @ matrix.T
        rast = rasterizer.rasterize(clip[None], faces, 512, 512)
        seen = rast[0, ..., 3] > 0
        assert seen.float().mean() > 0.05
        there = rasterizer.interpolate(torch.cat([points, uvs], dim=1), rast, faces)[0][seen]
        pairs = zip(textures(loaded), wanted_texels(there[:, :3]))
        errors.append([np.square(bilinear(picture, there[:, 3:].numpy()) - wanted).mean() for picture, wanted in pairs])
    assert (-10 * np.log10(np.mean(errors, axis=0)) >= 35).all()


@pytest.mark.parametrize("make", FINE)
def test_no_seam_shows(make, fine):
    """Along the edges whose two sides lie apart in the texture, both sides show the same: p99 at most 2 of 255."""
    mesh, loaded = fine[make.__name__]
    uvs = loaded.visual.uv[loaded.faces]
    first, second = (mesh.faces.numpy()[:, order].ravel() for order in ([0, 1, 2], [1, 2, 0]))
    ends = np.stack([uvs.reshape(-1, 2), uvs[:, [1, 2, 0]].reshape(-1, 2)], axis=1)  # (edges, 2, 2)
    flipped = first > second
    ends[flipped] = ends[flipped][:, ::-1]
    order = np.lexsort((np.maximum(first, second), np.minimum(first, second)))
    key = np.sort(np.stack([first, second], 1), axis=1)[order]
    pair = np.flatnonzero((key[1:] == key[:-1]).all(axis=1))
    one, other = ends[order][pair], ends[order][pair + 1]
    seam = np.abs(one - other).max(axis=(1, 2)) > 1e-6
    assert seam.sum() > 10
    for share in np.linspace(0.05, 0.95, 7):
        places = [(1 - share) * side[seam, 0] + share * side[seam, 1] for side in (one, other)]
        for picture in textures(loaded):
            apart = np.abs(bilinear(picture, places[0]) - bilinear(picture, places[1]))
            assert np.quantile(apart, 0.99) <= 2 / 255
