"""Wavefront OBJ with its MTL."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .files import write_bytes


def write_obj(
    path: str | Path,
    vertices: np.ndarray,
    faces: np.ndarray,
    normals: np.ndarray,
    uvs: np.ndarray,
    uv_faces: np.ndarray,
    pictures: dict[str, str],
) -> dict[str, Path]:
    """Write PATH.obj and, beside it under the same stem, .mtl; each atomically, the OBJ last.

    Positions and texture coordinates keep index buffers of their own, so the topology is the input's.

    Args:
        vertices: (V, 3). Normals: (V, 3), one per vertex. Faces: (F, 3).
        uvs: (T, 2), v = 1 at row 0 of the texture. uv_faces: (F, 3) into uvs.
        pictures: the material's pictures, names of files beside it, by MTL keyword: map_Kd, and of its extension for physically based
            materials map_Pr (roughness), map_Pm (metallic), norm (tangent space, green is up).
        path: without white space in its name, which MTL cannot quote.
    Returns:
        {"obj": ..., "mtl": ...}
    Raises:
        ExportError: a file cannot be written.
    """
    path = Path(path)
    material = path.with_suffix(".mtl")
    # No Tr: its meaning is opposite in different readers. d 1 is opaque in all of them.
    lines = [f"newmtl {path.stem}", "Ka 1 1 1", "Kd 1 1 1", "Ks 0 0 0", "d 1", "illum 1"]
    lines += [f"{keyword} {name}" for keyword, name in pictures.items()]
    write_bytes(material, "\n".join([*lines, ""]).encode())
    corners = np.stack([faces, uv_faces, faces], axis=-1) + 1
    write_bytes(
        path,
        f"mtllib {material.name}\nusemtl {path.stem}\n".encode(),
        # 12 digits: more than float32 has, and still half a millimetre on a geographic coordinate
        _rows("v %.12g %.12g %.12g\n", vertices),
        _rows("vt %.9g %.9g\n", uvs),
        _rows("vn %.6g %.6g %.6g\n", normals),
        _rows("f %d/%d/%d %d/%d/%d %d/%d/%d\n", corners),
    )
    return {"obj": path, "mtl": material}


def _rows(line: str, values: np.ndarray) -> bytes:
    """One formatting call for many rows: a hundred times faster than numpy's text writer."""
    return (line * len(values) % tuple(values.ravel().tolist())).encode()
