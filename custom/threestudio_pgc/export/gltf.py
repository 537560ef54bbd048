"""Binary glTF 2.0 (GLB): one mesh, one material, its textures inside the file."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import write_bytes

_FLOAT, _UNSIGNED_INT = 5126, 5125
_VERTEX_BUFFER, _INDEX_BUFFER = 34962, 34963
_TRIANGLES = 4
_Z_UP_TO_Y_UP = [-(0.5**0.5), 0.0, 0.0, 0.5**0.5]  # quaternion x, y, z, w: a quarter turn about x
_LINEAR, _LINEAR_MIPMAP_LINEAR, _CLAMP_TO_EDGE = 9729, 9987, 33071


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """A picture file's bytes."""

    data: bytes
    mime_type: str = "image/png"  # or "image/jpeg", "image/webp"


@dataclass(frozen=True)
class GltfMaterial:
    """A metallic-roughness material, seen from both sides. One picture in several slots is stored once.

    Without `metallic_roughness` it is matte: metallic 0, roughness 1.
    """

    base_color: EncodedPicture  # display RGB (sRGB)
    metallic_roughness: EncodedPicture | None = None  # linear: green is roughness, blue metallic
    occlusion: EncodedPicture | None = None  # linear: red
    normal: EncodedPicture | None = None  # tangent space, green is up
    unlit: bool = False  # show the base colour as it is (KHR_materials_unlit)


def write_glb(
    path: str | Path,
    vertices: np.ndarray,
    faces: np.ndarray,
    normals: np.ndarray,
    uvs: np.ndarray,
    material: GltfMaterial,
    *,
    tangents: np.ndarray | None = None,
    name: str = "mesh",
    z_up: bool = False,
) -> Path:
    """Write a textured mesh as GLB, atomically.

    Args:
        vertices, normals: (N, 3), normals of unit length.
        faces: (F, 3) indices of vertices.
        uvs: (N, 2) with v = 1 at row 0 of the textures; glTF counts v from the top, so 1 - v is written.
        tangents: (N, 4) of `tangents.vertex_tangents`, which a normal map needs.
        z_up: the vertices' up is z. glTF's is y, so the node that carries the mesh turns it upright; the vertices stay as given, and
            programs whose own up is z, such as Blender, turn it back to exactly them.
    Raises:
        ExportError: the file cannot be written.
    """
    positions = np.ascontiguousarray(vertices, "<f4")
    top_down = np.asarray(uvs, np.float32) * [1, -1] + [0, 1]
    attributes = {"POSITION": positions, "NORMAL": normals, "TEXCOORD_0": top_down}
    if tangents is not None:
        attributes["TANGENT"] = tangents
    views = [(np.ascontiguousarray(faces, "<u4").tobytes(), _INDEX_BUFFER)]
    views += [(np.ascontiguousarray(values, "<f4").tobytes(), _VERTEX_BUFFER) for values in attributes.values()]
    accessors = [{"bufferView": 0, "componentType": _UNSIGNED_INT, "count": faces.size, "type": "SCALAR"}]
    for values in attributes.values():
        kind = f"VEC{np.shape(values)[1]}"
        accessors.append({"bufferView": len(accessors), "componentType": _FLOAT, "count": len(positions), "type": kind})
    accessors[1] |= {"min": positions.min(axis=0).tolist(), "max": positions.max(axis=0).tolist()}

    pictures = _Pictures(len(views))
    shading = {"baseColorTexture": pictures.slot(material.base_color), "metallicFactor": 0, "roughnessFactor": 1}
    look = {"name": name, "doubleSided": True, "pbrMetallicRoughness": shading}
    if material.metallic_roughness is not None:
        shading |= {"metallicRoughnessTexture": pictures.slot(material.metallic_roughness), "metallicFactor": 1}
    if material.normal is not None:
        look["normalTexture"] = pictures.slot(material.normal)
    if material.occlusion is not None:
        look["occlusionTexture"] = pictures.slot(material.occlusion)
    if material.unlit:
        look["extensions"] = {"KHR_materials_unlit": {}}
    views += [(picture.data, None) for picture in pictures.stored]
    buffer_views, chunks, offset = [], [], 0
    for data, target in views:
        view = {"buffer": 0, "byteOffset": offset, "byteLength": len(data)}
        buffer_views.append(view if target is None else {**view, "target": target})
        chunks.append(data + bytes(-len(data) % 4))  # every view starts on a multiple of four
        offset += len(chunks[-1])

    numbers = {attribute: number for number, attribute in enumerate(attributes, start=1)}
    primitive = {"attributes": numbers, "indices": 0, "material": 0, "mode": _TRIANGLES}
    sampler = {"magFilter": _LINEAR, "minFilter": _LINEAR_MIPMAP_LINEAR, "wrapS": _CLAMP_TO_EDGE, "wrapT": _CLAMP_TO_EDGE}
    webp = ["EXT_texture_webp"] if pictures.has_webp else []
    used = webp + (["KHR_materials_unlit"] if material.unlit else [])
    document = {
        "asset": {"version": "2.0", "generator": "threestudio_pgc"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name} | ({"rotation": _Z_UP_TO_Y_UP} if z_up else {})],
        "meshes": [{"name": name, "primitives": [primitive]}],
        "materials": [look],
        "textures": pictures.textures,
        "images": pictures.images,
        "samplers": [sampler],
        "accessors": accessors,
        "bufferViews": buffer_views,
        "buffers": [{"byteLength": offset}],
    }
    document |= {"extensionsUsed": used} if used else {}
    document |= {"extensionsRequired": webp} if webp else {}  # there is no other picture to fall back to
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    size = 12 + 8 + len(text) + 8 + offset
    header = struct.pack("<4sII", b"glTF", 2, size) + struct.pack("<I4s", len(text), b"JSON")
    return write_bytes(path, header, text, struct.pack("<I4s", offset, b"BIN\0"), *chunks)


class _Pictures:
    """The document's textures and images; buffer views of pictures follow the `first` ones."""

    def __init__(self, first: int):
        self.first = first
        self.stored: list[EncodedPicture] = []

    def slot(self, picture: EncodedPicture) -> dict:
        """A material's reference to the picture, which is stored if it is not yet."""
        if picture not in self.stored:
            self.stored.append(picture)
        return {"index": self.stored.index(picture)}

    @property
    def has_webp(self) -> bool:
        return any(picture.mime_type == "image/webp" for picture in self.stored)

    @property
    def images(self) -> list[dict]:
        return [{"bufferView": self.first + number, "mimeType": picture.mime_type} for number, picture in enumerate(self.stored)]

    @property
    def textures(self) -> list[dict]:
        plain, webp = lambda number: {"source": number}, lambda number: {"extensions": {"EXT_texture_webp": {"source": number}}}
        kinds = [webp if picture.mime_type == "image/webp" else plain for picture in self.stored]
        return [{"sampler": 0} | kind(number) for number, kind in enumerate(kinds)]
