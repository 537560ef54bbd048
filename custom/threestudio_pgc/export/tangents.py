"""Tangent space: the frame at a surface point in which a normal map says where the normal points.

It is the one that glTF viewers build: tangent T and normal N of every vertex, bitangent B = w (N x T), all three interpolated over the
face and brought to unit length. A normal map's colour (x, y, z) then stands for the direction x T + y B + z N. T runs along +u, and B
along +v, upwards in the picture (glTF, OpenGL); w = -1 where the texture is mirrored.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .atlas import split_vertices, uv_areas


def vertex_tangents(
    vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray, uvs: np.ndarray, uv_faces: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tangents of a mesh whose vertices are split at texture seams, and where a mirrored face meets one that is not.

    As in MikkTSpace (Mikkelsen 2008), a vertex has the mean of its corners' tangents, each projected into the plane of the vertex normal
    and weighted by the corner's angle in that plane. A vertex of faces without texture area alone has some tangent, always the same.

    Args:
        vertices, normals: (V, 3), normals of unit length.
        uvs: (T, 2), v = 1 at row 0 of the texture.
        faces, uv_faces: (F, 3) into vertices and into uvs.
    Returns:
        vertex, uv, faces: as `split_vertices`.
        tangents: (N, 4) float32; x, y, z of unit length and orthogonal to the normal, and w = +-1.
    """
    areas = uv_areas(uvs, uv_faces)
    mirrored = areas < 0
    vertex, uv, split_faces = split_vertices(faces, uv_faces, mirrored)
    normal = np.asarray(normals, np.float64)[vertex]
    summed = np.zeros((len(vertex), 3))
    drawn = areas != 0
    corners, texels = np.asarray(vertices, np.float64)[faces[drawn]], np.asarray(uvs, np.float64)[uv_faces[drawn]]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    rise_first, rise_second = (texels[:, k, 1:] - texels[:, 0, 1:] for k in (1, 2))
    # dP/du up to a positive factor, which is 1 / |doubled area in the texture|
    along_u = (first * rise_second - second * rise_first) * np.sign(areas[drawn])[:, None]
    for k in range(3):
        index = split_faces[drawn, k]
        here = normal[index]
        edges = [_unit(_in_plane(corners[:, (k + step) % 3] - corners[:, k], here)) for step in (1, 2)]
        angle = np.arccos((edges[0] * edges[1]).sum(axis=1).clip(-1, 1))
        tangent = _unit(_in_plane(along_u, here)) * angle[:, None]
        for axis in range(3):
            summed[:, axis] += np.bincount(index, tangent[:, axis], minlength=len(vertex))
    summed = _in_plane(summed, normal)
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    # where nothing is left of the sum, the axis that is least along the normal
    axis = np.eye(3)[np.abs(normal).argmin(axis=1)]
    tangents = np.ones((len(vertex), 4), np.float32)
    tangents[:, :3] = np.where(length > 1e-9, summed / np.maximum(length, 1e-300), _unit(_in_plane(axis, normal)))
    tangents[split_faces[mirrored], 3] = -1
    return vertex, uv, split_faces, tangents


def to_tangent_space(directions: Tensor, normal: Tensor, tangent: Tensor, bitangent: Tensor) -> Tensor:
    """Unit (x, y, z) for which x T + y B + z N is parallel to `directions`, with T, B and N brought to unit length.

    Args:
        directions, normal, tangent, bitangent: (N, 3), the latter three interpolated, not orthogonal in general.
    Returns:
        (N, 3); (0, 0, 1) where the frame has no volume or the direction no length.
    """
    t, b, n = (F.normalize(vectors, dim=-1) for vectors in (tangent, bitangent, normal))
    # the inverse of the matrix [t b n], whose rows are cross products over the determinant
    rows = torch.linalg.cross(b, n), torch.linalg.cross(n, t), torch.linalg.cross(t, b)
    volume = (t * rows[0]).sum(dim=-1, keepdim=True)
    found = torch.cat([(row * directions).sum(dim=-1, keepdim=True) for row in rows], dim=-1) * volume.sign()
    length = found.norm(dim=-1, keepdim=True)
    usable = (volume.abs() > 1e-6) & (length > 1e-6)
    return torch.where(usable, found / length.clamp(min=1e-12), found.new_tensor([0.0, 0.0, 1.0]))


def _in_plane(vectors: np.ndarray, normals: np.ndarray) -> np.ndarray:
    return vectors - (vectors * normals).sum(axis=1, keepdims=True) * normals


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Of unit length; a vector without length stays as it is."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
