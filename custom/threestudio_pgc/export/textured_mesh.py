"""The whole way from a mesh and its maps to files a 3D program opens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..scene.mesh import TriangleMesh
from .atlas import UVAtlas, split_vertices
from .bake import MapsFn, bake, checked_maps, samples_a_side
from .files import ExportError, require_space, write_bytes
from .gltf import EncodedPicture, GltfMaterial, write_glb
from .maps import CONTENTS, MTL_KEYWORDS, PRESETS, exists, pack
from .obj import write_obj
from .pictures import PICTURE_SUFFIXES, WEBP_LIMIT, encode_picture
from .tangents import vertex_tangents
from .unwrap import atlas_for

FORMATS = ("glb", "obj")
GLB_CONTENTS = ("base_color", "orm", "normal")


def export_textured_mesh(
    mesh: TriangleMesh,
    maps_fn: MapsFn,
    directory: str | Path,
    name: str,
    *,
    formats: Sequence[str] = FORMATS,
    resolution: int = 2048,
    samples: int = 4,
    preset: str = "gltf",
    image_format: str = "png",
    quality: int = 90,
    unlit: bool = False,
    unwrap_seconds: float = 300.0,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Path]:
    """Bake a mesh's maps into pictures and write GLB and/or OBJ+MTL+pictures.

    Vertices come back in the user's frame and order, faces in theirs, and the user's texture coordinates where they can hold a
    texture. A GLB has to split vertices at texture seams; the OBJ has the input's topology.

    Args:
        maps_fn: see `bake.MapsFn`. It is called for a single point first, to see which maps there are.
        name: stem of the files; white space in it becomes "_".
        resolution: side of the textures in texels. samples: see `bake`.
        preset: packing and names of the pictures beside the mesh, see `maps.PRESETS`. Those of "gltf" are written with an OBJ, those of
            the others always. Inside a GLB they are packed as glTF wants it, whatever the preset.
        image_format, quality: of all pictures, see `pictures.encode_picture`; "jpeg" and "webp" lose precision, which roughness and
            normals may show. A picture with four channels is PNG where "jpeg" is asked for. Not every program opens a GLB with WebP.
        unlit: viewers of the GLB show the base colour as it is, without light; it then carries no other map.
        unwrap_seconds: after that long a simpler way of unwrapping is taken, see `unwrap.unwrap`.
        progress: called as progress(what is being done, share of the whole in [0, 1]).
    Returns:
        the files written: "glb", "obj", "mtl", the base colour under its format ("png", "jpeg", "webp"), and other pictures by their
        name in lower case, such as "orm", "normal", "maskmap".
    Warns:
        UserWarning: the mesh's own texture coordinates are not used, and why; others of `unwrap.unwrap`.
    Raises:
        ExportError: nothing to export, an argument out of range, maps_fn gives something else than maps, too little space, or a file
            that cannot be written.
    """
    report = progress or (lambda stage, share: None)
    stem = re.sub(r"\s+", "_", name.strip())
    if not stem or stem in (".", "..") or re.search(r"[/\\\0]", stem):
        raise ExportError(f"export name: found {name!r}, wanted a file name without folders")
    for found in formats:
        if found not in FORMATS:
            raise ExportError(f"export formats: found {found!r}, wanted some of {', '.join(FORMATS)}")
    if not formats:
        raise ExportError(f"export formats: found none, wanted some of {', '.join(FORMATS)}")
    if preset not in PRESETS:
        raise ExportError(f"export preset: found {preset!r}, wanted one of {', '.join(PRESETS)}")
    if image_format not in PICTURE_SUFFIXES:
        raise ExportError(f"export image_format: found {image_format!r}, wanted one of {', '.join(PICTURE_SUFFIXES)}")
    if not 1 <= quality <= 100:
        raise ExportError(f"export quality: found {quality}, wanted 1 to 100")
    if not unwrap_seconds > 0:
        raise ExportError(f"export unwrap_seconds: found {unwrap_seconds}, wanted more than 0")
    if len(mesh.faces) == 0:
        raise ExportError("export: the mesh has no faces, wanted at least one triangle")
    samples_a_side(resolution, samples)
    if image_format == "webp" and resolution > WEBP_LIMIT:
        raise ExportError(f"export resolution: found {resolution}, wanted at most {WEBP_LIMIT} for webp")
    directory = Path(directory)
    available = _available_maps(mesh, maps_fn)
    inside = [content for content in GLB_CONTENTS if "glb" in formats and exists(content, available)]
    inside = ["base_color"] if inside and unlit else inside
    beside = {suffix: content for suffix, content in PRESETS[preset].items() if exists(content, available)}
    beside = beside if "obj" in formats or preset != "gltf" else {}
    # Incompressible pictures and some 150 bytes a face, for every format.
    channels = sum(len(CONTENTS[content]) for content in (*inside, *beside.values()))
    require_space(directory, channels * resolution**2 + len(set(formats)) * 150 * len(mesh.faces))

    report("unwrapping", 0.0)
    unwrapped = {"time_limit": unwrap_seconds, "progress": lambda share: report("unwrapping", 0.2 * share)}
    atlas, reason = atlas_for(mesh, resolution=resolution, **unwrapped)
    if reason and mesh.uvs is not None:
        warnings.warn(f"export: the mesh's own texture coordinates are replaced: {reason}", stacklevel=2)
    report("baking", 0.2)
    maps = bake(mesh, atlas, maps_fn, resolution, samples=samples, progress=lambda share: report("baking", 0.2 + 0.5 * share))
    report("encoding", 0.7)
    encoded = _encode(maps, {*inside, *beside.values()}, image_format, quality)
    del maps
    report("writing", 0.9)
    written, textures = {}, {}
    if "glb" in formats:
        written["glb"] = _write_glb(directory / f"{stem}.glb", mesh, atlas, {content: encoded[content] for content in inside}, unlit)
    for suffix, content in beside.items():
        picture = encoded[content]
        path = directory / f"{stem}{suffix}{PICTURE_SUFFIXES[picture.mime_type.removeprefix('image/')]}"
        key = image_format if content == "base_color" else suffix.strip("_").lower()
        written[key] = write_bytes(path, picture.data)
        if content in MTL_KEYWORDS:
            textures[MTL_KEYWORDS[content]] = path.name
    if "obj" in formats:
        faces, vertices, normals = mesh.faces.cpu().numpy(), mesh.user_vertices(), mesh.frame.rotate(_unit_normals(mesh))
        written |= write_obj(directory / f"{stem}.obj", vertices, faces, normals, atlas.uvs, atlas.uv_faces, textures)
    report("done", 1.0)
    return written


def _available_maps(mesh: TriangleMesh, maps_fn: MapsFn) -> list[str]:
    """Names of the maps that maps_fn gives, asked at one point: whatever is wrong with it shows before the unwrapping."""
    with torch.no_grad():
        corner = mesh.faces[:1, 0]
        return list(checked_maps(maps_fn(mesh.vertices.detach()[corner], mesh.vertex_normals()[corner]), 1))


def _encode(maps: dict[str, np.ndarray], contents: set[str], image_format: str, quality: int) -> dict[str, EncodedPicture]:
    """The pictures of these contents, encoded side by side: Pillow lets other threads run meanwhile."""

    def encode(content: str) -> EncodedPicture:
        pixels = pack(maps, content)
        kind = "png" if pixels.shape[-1] == 4 and image_format == "jpeg" else image_format
        return EncodedPicture(encode_picture(pixels, kind, quality), f"image/{kind}")

    with ThreadPoolExecutor() as pool:
        return dict(zip(contents, pool.map(encode, contents)))


def _write_glb(path: Path, mesh: TriangleMesh, atlas: UVAtlas, pictures: dict[str, EncodedPicture], unlit: bool) -> Path:
    """Write the GLB with pictures by content, of GLB_CONTENTS."""
    faces, normals, tangents = mesh.faces.cpu().numpy(), _unit_normals(mesh), None
    if "normal" in pictures:
        stored = mesh.vertices.detach().cpu().numpy(), faces, normals, atlas.uvs, atlas.uv_faces
        vertex, uv, split_faces, tangents = vertex_tangents(*stored)
        tangents[:, :3] = mesh.frame.rotate(tangents[:, :3])
    else:
        vertex, uv, split_faces = split_vertices(faces, atlas.uv_faces)
    material = GltfMaterial(
        pictures["base_color"],
        metallic_roughness=pictures.get("orm"),
        occlusion=pictures.get("orm"),
        normal=pictures.get("normal"),
        unlit=unlit,
    )
    z_up = bool(mesh.frame.rotation[2, 2] > 0.5)  # our own up, z, is the user's z and not his y
    corners = mesh.user_vertices()[vertex], split_faces, mesh.frame.rotate(normals)[vertex], atlas.uvs[uv]
    return write_glb(path, *corners, material, tangents=tangents, name=path.stem, z_up=z_up)


@torch.no_grad()
def _unit_normals(mesh: TriangleMesh) -> np.ndarray:
    # Once more in float64: glTF asks for unit length to within 1e-5 or so after rotation.
    normals = mesh.vertex_normals().cpu().double()
    return torch.nn.functional.normalize(normals, dim=-1).numpy()
