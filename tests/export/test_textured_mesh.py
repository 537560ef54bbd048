import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export.conftest import pbr_maps, position_color, position_maps
from tests.export.test_gltf import parse_glb
from tests.export.test_obj import parse_obj
from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.textured_mesh import export_textured_mesh
from threestudio_pgc.scene.mesh import TriangleMesh, load_mesh, normalize

ROTATION = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
ROTATION *= np.sign(np.linalg.det(ROTATION))


def write_input(path, box, *, uvs=True):
    """The box as a user's OBJ: turned, 40 units large, far off the origin. Returns its vertices as written."""
    vertices = (25 * box.vertices.double().numpy() @ ROTATION.T + [300, -50, 8]).round(6)
    lines = ["v {} {} {}".format(*vertex) for vertex in vertices.tolist()]
    if uvs:
        lines += ["vt {} {}".format(*uv) for uv in box.uvs.tolist()]
    for face, uv_face in zip(box.faces.tolist(), box.uv_faces.tolist()):
        lines.append("f " + " ".join(f"{v + 1}/{t + 1}" if uvs else f"{v + 1}" for v, t in zip(face, uv_face)))
    path.write_text("\n".join(lines))
    return vertices


def texture_lookup(picture, uvs):
    """Bilinear samples of an (H, W, 3) uint8 picture at (N, 2) texture coordinates with v = 1 at row 0."""
    height, width, _ = picture.shape
    x, y = uvs[:, 0] * width - 0.5, (1 - uvs[:, 1]) * height - 0.5
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    total = 0
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - right - (x - column)) * np.abs(1 - down - (y - row))
            texels = picture[(row + down).clip(0, height - 1), (column + right).clip(0, width - 1)]
            total = total + weight[:, None] * texels
    return total


def random_surface(corners, uvs, count=2000):
    """Random points (count, 3) of a triangle soup (F, 3, 3) and their texture coordinates."""
    generator = np.random.default_rng(0)
    face = generator.integers(len(corners), size=count)
    weights = generator.dirichlet([1, 1, 1], size=count)[..., None]
    return (corners[face] * weights).sum(axis=1), (uvs[face] * weights).sum(axis=1)


def test_nothing_to_export(tmp_path, maps_fn):
    empty = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(ExportError, match="no faces"):
        export_textured_mesh(empty, maps_fn, tmp_path, "mesh")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name=" "), "name: found ' '"),
        (dict(name="../up"), "name: found '../up'"),
        (dict(formats=["glb", "fbx"]), "formats: found 'fbx', wanted some of glb, obj"),
        (dict(formats=[]), "formats: found none"),
        (dict(resolution=0), "resolution: found 0"),
        (dict(resolution=20000, image_format="webp"), "resolution: found 20000, wanted at most 16383 for webp"),
        (dict(samples=3), "samples: found 3"),
        (dict(preset="godot"), "preset: found 'godot', wanted one of gltf, unreal, unity-hdrp, blender"),
        (dict(image_format="tga"), "image_format: found 'tga', wanted one of png, jpeg, webp"),
        (dict(quality=0), "quality: found 0, wanted 1 to 100"),
        (dict(unwrap_seconds=0.0), "unwrap_seconds: found 0.0, wanted more than 0"),
        (dict(maps_fn=lambda points, normals: points), "maps_fn: found Tensor, wanted a dict of maps with 'base_color'"),
        (dict(maps_fn=lambda points, normals: {}), "maps_fn: found none, wanted a dict of maps with 'base_color'"),
        (dict(maps_fn=lambda points, normals: {"roughness": points[:, :1]}), "maps_fn: found roughness, wanted .* 'base_color'"),
        (dict(maps_fn=lambda points, normals: {"base_color": points, "gloss": points}), "found a map 'gloss', wanted some of base_color"),
        (
            dict(maps_fn=lambda points, normals: {"base_color": points[:, :2]}),
            r"maps_fn base_color: found shape \(1, 2\) at 1 points, wanted \(1, 3\)",
        ),
        (
            dict(maps_fn=lambda points, normals: {"base_color": points * float("nan")}),
            r"maps_fn base_color: found NaN or infinity at (\d+) of \1 points",
        ),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(box, tmp_path, arguments, message):
    with pytest.raises(ExportError, match=message):
        export_textured_mesh(box, **{**dict(maps_fn=position_maps, directory=tmp_path, name="mesh", resolution=32), **arguments})
    assert os.listdir(tmp_path) == []


def test_files_and_progress(box, tmp_path, maps_fn):
    seen = []
    written = export_textured_mesh(box, maps_fn, tmp_path / "new", "a red box", resolution=32, progress=lambda *state: seen.append(state))
    assert {key: path.name for key, path in written.items()} == {
        "glb": "a_red_box.glb",
        "obj": "a_red_box.obj",
        "mtl": "a_red_box.mtl",
        "png": "a_red_box.png",
    }
    assert sorted(os.listdir(tmp_path / "new")) == sorted(path.name for path in written.values())
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[0] == 0 and seen[-1] == ("done", 1.0)
    assert Image.open(written["png"]).size == (32, 32)
    only = export_textured_mesh(box, maps_fn, tmp_path / "glb", "box", formats=["glb"], resolution=32)
    assert list(only) == ["glb"] and os.listdir(tmp_path / "glb") == ["box.glb"]


@pytest.mark.parametrize("up", ["y", "z"])
def test_export_comes_back_in_the_users_frame_and_topology_with_his_uvs(box, tmp_path, maps_fn, up):
    expected = write_input(tmp_path / "input.obj", box)
    mesh = normalize(load_mesh(tmp_path / "input.obj", up=up))
    written = export_textured_mesh(mesh, maps_fn, tmp_path / "out", "box", resolution=64)

    numbers, faces, _ = parse_obj(written["obj"])
    rounding = 1e-7 * np.abs(expected).max()  # a mesh is stored in float32
    np.testing.assert_allclose(numbers["v"][faces[..., 0]], expected[box.faces], rtol=0, atol=rounding)
    assert np.array_equal(numbers["vt"].astype(np.float32)[faces[..., 1]], box.uvs.numpy()[box.uv_faces])
    assert len(numbers["v"]) == 8 and len(numbers["vt"]) == 24
    outward = expected - [300, -50, 8]
    cosine = (numbers["vn"][faces[..., 2]] * outward[box.faces]).sum(-1) / np.linalg.norm(outward[box.faces], axis=-1)
    assert cosine.min() > 0.9  # the corners' normals point away from the centre

    _, views = parse_glb(written["glb"].read_bytes())
    split_faces = np.frombuffer(views[0], "<u4").reshape(-1, 3)
    positions, normals = (np.frombuffer(view, "<f4").reshape(-1, 3) for view in views[1:3])
    top_down = np.frombuffer(views[3], "<f4").reshape(-1, 2)
    np.testing.assert_allclose(positions[split_faces], expected[box.faces], rtol=0, atol=rounding)
    np.testing.assert_allclose(1 - top_down[split_faces][..., 1], box.uvs.numpy()[box.uv_faces][..., 1], atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-6)
    assert len(positions) == 24


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda uvs: uvs + 0.5, "beyond"),
        (lambda uvs: (uvs * 3 % 1) / 3, "lie over others"),
        (lambda uvs: uvs * 0 + 0.5, "of the texture"),
    ],
)
def test_texture_coordinates_that_cannot_hold_a_texture_are_replaced_and_that_is_said(box, tmp_path, maps_fn, spoil, reason):
    own = box.uvs.clone()
    box.uvs = spoil(own)
    with pytest.warns(UserWarning, match=f"the mesh's own texture coordinates are replaced: .*{reason}"):
        files = export_textured_mesh(box, maps_fn, tmp_path, "box", formats=["obj"], resolution=64, samples=1)
    numbers, faces = parse_obj(files["obj"])[:2]
    assert np.array_equal(faces[..., 0], box.faces) and numbers["vt"].min() >= 0 and numbers["vt"].max() <= 1


def test_no_word_of_texture_coordinates_where_there_were_none(bare_sphere, tmp_path, maps_fn, recwarn):
    export_textured_mesh(bare_sphere, maps_fn, tmp_path, "sphere", formats=["glb"], resolution=64, samples=1)
    assert not [warning for warning in recwarn if "texture coordinates" in str(warning.message)]


def test_positions_of_an_untouched_mesh_come_back_bit_for_bit(box, tmp_path, maps_fn):
    box.vertices += torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    written = export_textured_mesh(box, maps_fn, tmp_path, "box", resolution=32)
    numbers, faces, _ = parse_obj(written["obj"])
    assert np.array_equal(numbers["v"].astype(np.float32), box.vertices)
    assert np.array_equal(faces[..., 0], box.faces) and np.array_equal(faces[..., 1], box.uv_faces)
    _, views = parse_glb(written["glb"].read_bytes())
    split_faces = np.frombuffer(views[0], "<u4").reshape(-1, 3)
    assert np.array_equal(np.frombuffer(views[1], "<f4").reshape(-1, 3)[split_faces], box.vertices[box.faces])


def test_a_glb_that_is_read_and_exported_again_is_where_it_was(box, tmp_path, maps_fn):
    import trimesh

    first = export_textured_mesh(box, maps_fn, tmp_path / "first", "box", formats=["glb"], resolution=32)["glb"]
    mesh = normalize(load_mesh(first))
    second = export_textured_mesh(mesh, maps_fn, tmp_path / "second", "box", formats=["glb"], resolution=32)["glb"]
    before, after = (trimesh.load(path, process=False, force="mesh") for path in (first, second))
    np.testing.assert_allclose(after.vertices[after.faces], before.vertices[before.faces], atol=1e-6)
    np.testing.assert_allclose(after.visual.uv[after.faces], before.visual.uv[before.faces], atol=1e-6)


@pytest.mark.parametrize("up", ["y", "z"])
def test_a_glb_stands_upright_whatever_the_users_up_is(box, tmp_path, maps_fn, up):
    """glTF's up is y: what was up for the user must be up for the viewer, and nothing is mirrored."""
    import trimesh

    expected = write_input(tmp_path / "input.obj", box)
    mesh = normalize(load_mesh(tmp_path / "input.obj", up=up))
    glb = export_textured_mesh(mesh, maps_fn, tmp_path / "out", "box", formats=["glb"], resolution=32)["glb"]
    seen = trimesh.load(glb, process=False, force="mesh")
    x, y, z = np.moveaxis(expected[box.faces], -1, 0)
    wanted = np.stack([x, y, z] if up == "y" else [x, z, -y], axis=-1)
    np.testing.assert_allclose(seen.vertices[seen.faces], wanted, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_reloaded_texture_shows_the_colour_of_every_point(box, tmp_path, maps_fn, kept, kind):
    import trimesh

    write_input(tmp_path / "input.obj", box, uvs=kept)
    mesh = normalize(load_mesh(tmp_path / "input.obj", up="y"))
    assert (mesh.uvs is not None) == kept
    path = export_textured_mesh(mesh, maps_fn, tmp_path / "out", "box", formats=[kind], resolution=256)[kind]
    loaded = trimesh.load(path, process=False, force="mesh")
    material = loaded.visual.material
    picture = np.asarray((material.baseColorTexture if kind == "glb" else material.image).convert("RGB"))
    assert picture.shape == (256, 256, 3)
    points, uvs = random_surface(loaded.vertices[loaded.faces], loaded.visual.uv[loaded.faces])
    colors = position_color(torch.from_numpy(mesh.frame.invert(points))).numpy() * 255
    # At the charts' rims a texel shows the nearest point, up to a texel away: 1.6 / 77 units times 0.4 per unit of colour.
    assert np.abs(texture_lookup(picture, uvs) - colors).max() < 1 + 255 * 0.4 * 1.6 / 77


def test_texture_reads_the_right_way_round(tmp_path):
    """A letter F painted on a square, in a picture with its top row at v = 1: neither mirrored nor upside down."""
    letter = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).float()

    def paint(points, normals):
        column = ((points[:, 0] + 1) * 2).long().clamp(0, 3)
        row = ((1 - points[:, 1]) * 2).long().clamp(0, 3)
        return {"base_color": letter[row, column][:, None].expand(-1, 3)}

    square = TriangleMesh(
        torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]),
        torch.tensor([[0, 1, 2], [0, 2, 3]]),
        uvs=torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]]),
        uv_faces=torch.tensor([[0, 1, 2], [0, 2, 3]]),
    )
    written = export_textured_mesh(square, paint, tmp_path, "letter", resolution=4)
    _, views = parse_glb(written["glb"].read_bytes())
    for picture in (Image.open(written["png"]), Image.open(io.BytesIO(views[4]))):
        assert np.array_equal(np.asarray(picture)[..., 0], letter.numpy() * 255)


def test_too_little_space_is_said_before_the_work(box, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))

    def never(points, normals):
        assert len(points) == 1, "the colours were computed"
        return {"base_color": points}

    with pytest.raises(ExportError, match="about 25 MB are needed, 10 MB are free"):
        export_textured_mesh(box, never, tmp_path, "box", resolution=2048)


@pytest.mark.parametrize("image_format, suffix", [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
@pytest.mark.parametrize(
    "preset, expected",
    [
        ("gltf", {"orm": "_orm", "normal": "_normal", "roughness": "_roughness", "metallic": "_metallic"}),
        ("unreal", {"orm": "_ORM", "normal": "_Normal"}),
        ("unity-hdrp", {"maskmap": "_MaskMap", "normal": "_Normal"}),
        ("blender", {"occlusion": "_Occlusion", "roughness": "_Roughness", "metallic": "_Metallic", "normal": "_Normal"}),
    ],
)
def test_presets_name_their_pictures_as_artists_expect(box, tmp_path, preset, expected, image_format, suffix):
    base = {"gltf": "", "unity-hdrp": "_BaseMap"}.get(preset, "_BaseColor")
    written = export_textured_mesh(box, pbr_maps, tmp_path, "box", resolution=32, samples=1, preset=preset, image_format=image_format)
    names = {key: path.name for key, path in written.items() if key not in ("glb", "obj", "mtl")}
    names_expected = {image_format: base, **expected}
    ends = {key: "png" if (key, image_format) == ("maskmap", "jpeg") else suffix for key in names_expected}
    assert names == {key: f"box{name}.{ends[key]}" for key, name in names_expected.items()}
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in written.values())
    for key in names:
        assert Image.open(written[key]).size == (32, 32)


def test_pictures_beside_have_the_channels_of_their_preset(box, tmp_path):
    def read(preset, *keys):
        written = export_textured_mesh(box, pbr_maps, tmp_path / preset, "box", formats=["glb"], resolution=32, preset=preset)
        return [np.asarray(Image.open(written[key])).astype(int) for key in keys]

    occlusion, roughness, metallic, normal = read("blender", "occlusion", "roughness", "metallic", "normal")
    orm, directx = read("unreal", "orm", "normal")
    (mask,) = read("unity-hdrp", "maskmap")
    assert roughness.shape == (32, 32) and orm.shape == (32, 32, 3) and mask.shape == (32, 32, 4)
    assert np.array_equal(orm, np.stack([occlusion, roughness, metallic], -1))
    assert np.array_equal(mask[..., :3], np.stack([metallic, occlusion, np.full_like(metallic, 255)], -1))
    assert np.abs(mask[..., 3] - (255 - roughness)).max() <= 1
    assert np.array_equal(directx[..., [0, 2]], normal[..., [0, 2]])
    assert np.abs(directx[..., 1] - (255 - normal[..., 1])).max() <= 1


def test_a_glb_is_packed_as_gltf_wants_it_whatever_the_preset(box, tmp_path):
    written = [
        export_textured_mesh(box, pbr_maps, tmp_path / preset, "box", formats=["glb"], resolution=32, preset=preset)["glb"]
        for preset in ("gltf", "unreal", "unity-hdrp", "blender")
    ]
    assert len({path.read_bytes() for path in written}) == 1
    assert os.listdir(tmp_path / "gltf") == ["box.glb"]


def test_an_obj_refers_to_the_pictures_that_its_format_knows(box, tmp_path):
    expected = {
        "gltf": {"map_Kd": "box.png", "map_Pr": "box_roughness.png", "map_Pm": "box_metallic.png", "norm": "box_normal.png"},
        "unreal": {"map_Kd": "box_BaseColor.png"},  # no packed channels, no DirectX normals
        "unity-hdrp": {"map_Kd": "box_BaseMap.png", "norm": "box_Normal.png"},
    }
    for preset, pictures in expected.items():
        written = export_textured_mesh(box, pbr_maps, tmp_path / preset, "box", formats=["obj"], resolution=32, preset=preset)
        lines = dict(line.split(maxsplit=1) for line in written["mtl"].read_text().splitlines())
        assert {keyword: name for keyword, name in lines.items() if "map" in keyword or keyword == "norm"} == pictures


def test_an_asset_with_a_base_colour_alone_writes_one_picture(box, tmp_path):
    for preset in ("unreal", "unity-hdrp", "blender"):
        written = export_textured_mesh(box, position_maps, tmp_path / preset, "box", resolution=32, preset=preset)
        assert list(written) == ["glb", "png", "obj", "mtl"]


def test_an_unlit_glb_carries_the_base_colour_alone(box, tmp_path):
    glb = export_textured_mesh(box, pbr_maps, tmp_path, "box", formats=["glb"], resolution=32, unlit=True)["glb"]
    document, _ = parse_glb(glb.read_bytes())
    assert document["extensionsUsed"] == ["KHR_materials_unlit"] and len(document["images"]) == 1
    assert "TANGENT" not in document["meshes"][0]["primitives"][0]["attributes"]


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_lossy_pictures_in_a_glb_open_in_trimesh(box, tmp_path, image_format):
    import trimesh

    exact, lossy = (
        export_textured_mesh(box, pbr_maps, tmp_path / kind, "box", formats=["glb"], resolution=64, image_format=kind)["glb"]
        for kind in ("png", image_format)
    )
    assert lossy.stat().st_size < exact.stat().st_size
    materials = [trimesh.load(path, process=False, force="mesh").visual.material for path in (exact, lossy)]
    for slot in ("baseColorTexture", "metallicRoughnessTexture", "normalTexture", "occlusionTexture"):
        wanted, found = (np.asarray(getattr(material, slot).convert("RGB")).astype(int) for material in materials)
        assert found.shape == (64, 64, 3) and np.abs(found - wanted).mean() < 4


def test_a_full_disk_keeps_the_files_that_were_there(box, tmp_path, limit_file_size):
    before = export_textured_mesh(box, position_maps, tmp_path, "box", resolution=32)
    contents = {path.name: path.read_bytes() for path in before.values()}
    with limit_file_size(10_000), pytest.raises(ExportError, match="box.glb: cannot be written .*; the file that was there is unchanged"):
        export_textured_mesh(box, pbr_maps, tmp_path, "box", resolution=256)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_a_field_through_a_material_exports(bare_sphere, tmp_path):
    """The colour function the system uses, on a mesh without texture coordinates."""
    from threestudio_pgc.scene.fields import HashGridField
    from threestudio_pgc.scene.materials import AlbedoMaterial

    torch.manual_seed(0)
    field, material = HashGridField.from_preset("pocket", log2_hashmap_size=10), AlbedoMaterial()
    written = export_textured_mesh(
        bare_sphere, lambda points, normals: {"base_color": material(field(points))}, tmp_path, "sphere", resolution=64
    )
    picture = np.asarray(Image.open(written["png"]))
    assert picture.min() >= 0.05 * 255 - 1 and picture.max() <= 0.95 * 255 + 1
