"""Binary glTF 2.0 (GLB): one mesh, one material, its texture inside the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from .files import write_bytes

_FLOAT, _UNSIGNED_INT = 5126, 5125
_VERTEX_BUFFER, _INDEX_BUFFER = 34962, 34963
_TRIANGLES = 4
_Z_UP_TO_Y_UP = [-(0.5**0.5), 0.0, 0.0, 0.5**0.5]  # quaternion x, y, z, w: a quarter turn about x
_LINEAR, _LINEAR_MIPMAP_LINEAR, _CLAMP_TO_EDGE = 9729, 9987, 33071


def write_glb(
    path: str | Path,
    vertices: np.ndarray,
    faces: np.ndarray,
    normals: np.ndarray,
    uvs: np.ndarray,
    texture_png: bytes,
    *,
    name: str = "mesh",
    z_up: bool = False,
) -> Path:
    """Write a textured mesh as GLB, atomically.

    The material is matte and seen from both sides, as the mesh was while it was optimised; the texture is its base colour (sRGB).

    Args:
        vertices, normals: (N, 3), normals of unit length.
        faces: (F, 3) indices of vertices.
        uvs: (N, 2) with v = 1 at row 0 of the texture; glTF counts v from the top, so 1 - v is written.
        texture_png: the encoded picture.
        z_up: the vertices' up is z. glTF's is y, so the node that carries the mesh turns it upright; the vertices stay as given, and
            programs whose own up is z, such as Blender, turn it back to exactly them.
    Raises:
        ExportError: the file cannot be written.
    """
    positions = np.ascontiguousarray(vertices, "<f4")
    top_down = np.asarray(uvs, np.float32) * [1, -1] + [0, 1]
    views = [
        (np.ascontiguousarray(faces, "<u4").tobytes(), _INDEX_BUFFER),
        (positions.tobytes(), _VERTEX_BUFFER),
        (np.ascontiguousarray(normals, "<f4").tobytes(), _VERTEX_BUFFER),
        (np.ascontiguousarray(top_down, "<f4").tobytes(), _VERTEX_BUFFER),
        (texture_png, None),
    ]
    buffer_views, chunks, offset = [], [], 0
    for data, target in views:
        view = {"buffer": 0, "byteOffset": offset, "byteLength": len(data)}
        buffer_views.append(view if target is None else {**view, "target": target})
        chunks.append(data + bytes(-len(data) % 4))  # every view starts on a multiple of four
        offset += len(chunks[-1])

    def accessor(view: int, component: int, kind: str, count: int, **limits) -> dict:
        return {"bufferView": view, "componentType": component, "count": count, "type": kind, **limits}

    limits = {"min": positions.min(axis=0).tolist(), "max": positions.max(axis=0).tolist()}
    material = {
        "name": name,
        "doubleSided": True,
        "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0, "roughnessFactor": 1},
    }
    primitive = {"attributes": {"POSITION": 1, "NORMAL": 2, "TEXCOORD_0": 3}, "indices": 0, "material": 0, "mode": _TRIANGLES}
    sampler = {"magFilter": _LINEAR, "minFilter": _LINEAR_MIPMAP_LINEAR, "wrapS": _CLAMP_TO_EDGE, "wrapT": _CLAMP_TO_EDGE}
    document = {
        "asset": {"version": "2.0", "generator": "threestudio_pgc"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name} | ({"rotation": _Z_UP_TO_Y_UP} if z_up else {})],
        "meshes": [{"name": name, "primitives": [primitive]}],
        "materials": [material],
        "textures": [{"source": 0, "sampler": 0}],
        "images": [{"bufferView": 4, "mimeType": "image/png"}],
        "samplers": [sampler],
        "accessors": [
            accessor(0, _UNSIGNED_INT, "SCALAR", faces.size),
            accessor(1, _FLOAT, "VEC3", len(positions), **limits),
            accessor(2, _FLOAT, "VEC3", len(positions)),
            accessor(3, _FLOAT, "VEC2", len(positions)),
        ],
        "bufferViews": buffer_views,
        "buffers": [{"byteLength": offset}],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    size = 12 + 8 + len(text) + 8 + offset
    header = struct.pack("<4sII", b"glTF", 2, size) + struct.pack("<I4s", len(text), b"JSON")
    return write_bytes(path, header, text, struct.pack("<I4s", offset, b"BIN\0"), *chunks)
