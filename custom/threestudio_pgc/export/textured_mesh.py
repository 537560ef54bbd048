"""The whole way from a coloured mesh to files a 3D program opens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..scene.mesh import TriangleMesh
from .bake import bake
from .files import ExportError, require_space
from .gltf import write_glb
from .obj import write_obj
from .pictures import encode_png
from .unwrap import atlas_for, split_vertices

FORMATS = ("glb", "obj")


def export_textured_mesh(
    mesh: TriangleMesh,
    color_fn: Callable[[Tensor], Tensor],
    directory: str | Path,
    name: str,
    *,
    formats: Sequence[str] = FORMATS,
    resolution: int = 2048,
    samples: int = 1,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Path]:
    """Bake the mesh's colour into a texture and write GLB and/or OBJ+MTL+PNG.

    Vertices come back in the user's frame and order, faces in theirs, and the user's texture coordinates where they can hold a
    texture. A GLB has to split vertices at texture seams; the OBJ has the input's topology.

    Args:
        color_fn: (N, 3) points in the mesh's stored frame, on its device -> (N, 3) display-space rgb in [0, 1].
        name: stem of the files; white space in it becomes "_".
        resolution: side of the texture in texels. samples: see `bake`.
        progress: called as progress(what is being done, share of the whole in [0, 1]).
    Returns:
        the files written, by "glb", "obj", "mtl", "png".
    Raises:
        ExportError: nothing to export, an argument out of range, too little space, or a file that cannot be written.
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
    if len(mesh.faces) == 0:
        raise ExportError("export: the mesh has no faces, wanted at least one triangle")
    directory = Path(directory)
    # An incompressible texture and some 150 bytes a face, for every format.
    require_space(directory, len(set(formats)) * (3 * resolution**2 + 150 * len(mesh.faces)))

    report("unwrapping", 0.0)
    atlas, _ = atlas_for(mesh, resolution=resolution)
    report("baking", 0.2)
    texture = bake(mesh, atlas, color_fn, resolution, samples=samples, progress=lambda share: report("baking", 0.2 + 0.6 * share))
    if texture.shape[-1] != 3:
        raise ExportError(f"export color_fn: found {texture.shape[-1]} channels, wanted 3")
    report("writing", 0.8)
    texture_png = encode_png(texture)
    faces, vertices = mesh.faces.cpu().numpy(), mesh.user_vertices()
    normals = mesh.frame.rotate(_unit_normals(mesh))
    written: dict[str, Path] = {}
    if "glb" in formats:
        vertex, uv, split_faces = split_vertices(faces, atlas.uv_faces)
        path = directory / f"{stem}.glb"
        corners = vertices[vertex], split_faces, normals[vertex], atlas.uvs[uv]
        z_up = bool(mesh.frame.rotation[2, 2] > 0.5)  # our own up, z, is the user's z and not his y
        written["glb"] = write_glb(path, *corners, texture_png, name=stem, z_up=z_up)
    if "obj" in formats:
        path = directory / f"{stem}.obj"
        written |= write_obj(path, vertices, faces, normals, atlas.uvs, atlas.uv_faces, texture_png)
    report("done", 1.0)
    return written


@torch.no_grad()
def _unit_normals(mesh: TriangleMesh):
    # Once more in float64: glTF asks for unit length to within 1e-5 or so after rotation.
    normals = mesh.vertex_normals().cpu().double()
    return torch.nn.functional.normalize(normals, dim=-1).numpy()
