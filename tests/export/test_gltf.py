import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.gltf import write_glb
from threestudio_pgc.export.pictures import encode_png

VERTICES = np.array([[0, 0, 0], [0.1, 0, 0], [0.1, 0.7, 1 / 3]], np.float64)
FACES = np.array([[0, 1, 2]])
NORMALS = np.array([[0, 0, 1.0]] * 3)
UVS = np.array([[0, 0], [1, 0.25], [1, 1]], np.float32)
TEXTURE = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


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
    path = write_glb(tmp_path / "a.glb", VERTICES, FACES, NORMALS, UVS, picture, name="n" * padding)
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

    path = write_glb(tmp_path / "a.glb", VERTICES, FACES, NORMALS, UVS, encode_png(TEXTURE))
    mesh = trimesh.load(path, process=False, force="mesh")
    assert np.array_equal(mesh.vertices, VERTICES.astype(np.float32)) and np.array_equal(mesh.faces, FACES)
    assert np.array_equal(mesh.visual.uv, UVS)
    material = mesh.visual.material
    assert np.array_equal(np.asarray(material.baseColorTexture), TEXTURE)
    assert (material.metallicFactor, material.roughnessFactor, material.doubleSided) == (0, 1, True)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file/a.glb: cannot be written"):
        write_glb(tmp_path / "file" / "a.glb", VERTICES, FACES, NORMALS, UVS, b"")
