import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.gltf import EncodedPicture, GltfMaterial, write_glb
from threestudio_pgc.export.pictures import encode_picture, encode_png

VERTICES = np.array([[0, 0, 0], [0.1, 0, 0], [0.1, 0.7, 1 / 3]], np.float64)
FACES = np.array([[0, 1, 2]])
NORMALS = np.array([[0, 0, 1.0]] * 3)
UVS = np.array([[0, 0], [1, 0.25], [1, 1]], np.float32)
TEXTURE = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
MATTE = GltfMaterial(EncodedPicture(encode_png(TEXTURE)))


def parse_glb(data: bytes):
    """The JSON document and the views of the binary chunk, after checking the container (glTF 2.0, section 4.4)."""
    magic, version, length, text_length, text_kind = struct.unpack_from("<4sIII4s", data)
    assert (magic, version, length, text_kind) == (b"glTF", 2, len(data), b"JSON")
    document = json.loads(data[20 : 20 + text_length])
    binary_length, binary_kind = struct.unpack_from("<I4s", data, 20 + text_length)
    binary = data[28 + text_length :]
    assert text_length % 4 == binary_length % 4 == 0 and binary_kind == b"BIN\0"
    assert len(binary) == binary_length == document["buffers"][0]["byteLength"]
    assert all(view["byteOffset"] % 4 == 0 for view in document["bufferViews"])
    views = [binary[view["byteOffset"] :][: view["byteLength"]] for view in document["bufferViews"]]
    return document, views


@pytest.mark.parametrize("padding", range(4))
def test_file_holds_what_was_given_bit_for_bit(tmp_path, padding):
    picture = encode_png(TEXTURE) + bytes(padding)  # readers ignore what follows; the container's alignment must not
    material = GltfMaterial(EncodedPicture(picture))
    path = write_glb(tmp_path / "a.glb", VERTICES, FACES, NORMALS, UVS, material, name="n" * padding)
    document, (faces, positions, normals, uvs, texture) = parse_glb(path.read_bytes())
    assert np.array_equal(np.frombuffer(faces, "<u4").reshape(-1, 3), FACES)
    assert np.array_equal(np.frombuffer(positions, "<f4").reshape(-1, 3), VERTICES.astype(np.float32))
    assert np.array_equal(np.frombuffer(normals, "<f4").reshape(-1, 3), NORMALS)
    assert np.array_equal(np.frombuffer(uvs, "<f4").reshape(-1, 2), [[0, 1], [1, 0.75], [1, 0]])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(texture))), TEXTURE)
    limits = document["accessors"][1]
    assert np.array_equal(np.float32(limits["min"]), [0, 0, 0])
    assert np.array_equal(np.float32(limits["max"]), VERTICES.astype(np.float32).max(axis=0))


def test_trimesh_reads_it(tmp_path):
    import trimesh

    path = write_glb(tmp_path / "a.glb", VERTICES, FACES, NORMALS, UVS, MATTE)
    mesh = trimesh.load(path, process=False, force="mesh")
    assert np.array_equal(mesh.vertices, VERTICES.astype(np.float32)) and np.array_equal(mesh.faces, FACES)
    assert np.array_equal(mesh.visual.uv, UVS)
    material = mesh.visual.material
    assert np.array_equal(np.asarray(material.baseColorTexture), TEXTURE)
    assert (material.metallicFactor, material.roughnessFactor, material.doubleSided) == (0, 1, True)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file/a.glb: cannot be written"):
        write_glb(tmp_path / "file" / "a.glb", VERTICES, FACES, NORMALS, UVS, MATTE)


def material_of(path):
    document, views = parse_glb(path.read_bytes())
    return document["materials"][0], document, views


def test_a_picture_in_two_slots_is_stored_once_and_a_normal_map_has_tangents(tmp_path):
    orm, normal = EncodedPicture(encode_png(TEXTURE[::-1])), EncodedPicture(encode_png(TEXTURE[:, ::-1]))
    material = GltfMaterial(MATTE.base_color, metallic_roughness=orm, occlusion=orm, normal=normal)
    tangents = np.array([[1, 0, 0, 1], [0, 1, 0, -1], [1, 0, 0, -1]], np.float32)
    path = write_glb(tmp_path / "a.glb", VERTICES, FACES, NORMALS, UVS, material, tangents=tangents)
    found, document, views = material_of(path)
    shading = found["pbrMetallicRoughness"]
    assert (shading["metallicFactor"], shading["roughnessFactor"]) == (1, 1)
    assert shading["metallicRoughnessTexture"] == found["occlusionTexture"] == {"index": 1}
    assert found["normalTexture"] == {"index": 2} and shading["baseColorTexture"] == {"index": 0}
    assert len(document["images"]) == len(document["textures"]) == 3
    accessor = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"]["TANGENT"]]
    assert accessor["type"] == "VEC4"
    assert np.array_equal(np.frombuffer(views[accessor["bufferView"]], "<f4").reshape(-1, 4), tangents)
    assert views[document["images"][2]["bufferView"]] == normal.data


def test_nothing_is_in_the_file_that_was_not_given(tmp_path):
    found, document, _ = material_of(write_glb(tmp_path / "a.glb", VERTICES, FACES, NORMALS, UVS, MATTE))
    assert set(found) == {"name", "doubleSided", "pbrMetallicRoughness"}
    assert "TANGENT" not in document["meshes"][0]["primitives"][0]["attributes"]
    assert "extensionsUsed" not in document and len(document["images"]) == 1


def test_unlit_is_said_as_an_extension_that_readers_may_ignore(tmp_path):
    material = GltfMaterial(MATTE.base_color, unlit=True)
    found, document, _ = material_of(write_glb(tmp_path / "a.glb", VERTICES, FACES, NORMALS, UVS, material))
    assert found["extensions"] == {"KHR_materials_unlit": {}}
    assert document["extensionsUsed"] == ["KHR_materials_unlit"] and "extensionsRequired" not in document


def test_webp_is_required_of_the_reader_and_jpeg_is_not(tmp_path):
    for kind, required in (("webp", ["EXT_texture_webp"]), ("jpeg", None)):
        picture = EncodedPicture(encode_picture(TEXTURE, kind), f"image/{kind}")
        _, document, views = material_of(write_glb(tmp_path / "a.glb", VERTICES, FACES, NORMALS, UVS, GltfMaterial(picture)))
        assert document.get("extensionsRequired") == document.get("extensionsUsed") == required
        texture = document["textures"][0]
        assert ("source" in texture) == (required is None)
        number = texture["source"] if required is None else texture["extensions"]["EXT_texture_webp"]["source"]
        image = document["images"][number]
        assert image["mimeType"] == f"image/{kind}" and views[image["bufferView"]] == picture.data
