"""Texture coordinates of a mesh, and what is done with them everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class UVAtlas:
    """Texture coordinates of a mesh's faces, in the order of its faces. v = 1 is row 0 of the texture, as in OBJ."""

    uvs: np.ndarray  # (T, 2) float32 in [0, 1]
    uv_faces: np.ndarray  # (F, 3) int64 into uvs
    source: str  # "user", "xatlas" or "box"


def uv_areas(uvs: np.ndarray, uv_faces: np.ndarray) -> np.ndarray:
    """(F,) signed area of every face in texture space; negative where the face is mirrored there."""
    a, b, c = np.moveaxis(uvs.astype(np.float64)[uv_faces], 1, 0)
    return 0.5 * ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])


def split_vertices(faces: np.ndarray, uv_faces: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One index buffer for positions and texture coordinates, as glTF wants it.

    Args:
        faces, uv_faces: (F, 3), the same corners as indices of vertices and of texture coordinates.
        group: (F,) bool; faces of different groups share no vertex.
    Returns:
        (N,) vertex and (N,) texture coordinate of each split vertex, ordered by vertex, and (F, 3) faces into them.
    """
    pairs = np.stack([faces.ravel(), uv_faces.ravel()])
    key = pairs[0] * (int(uv_faces.max(initial=0)) + 1) + pairs[1]
    if group is not None:
        key = 2 * key + np.repeat(group, 3)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return pairs[0, first], pairs[1, first], inverse.reshape(faces.shape)


def uv_to_clip(uvs: np.ndarray, size: int, offset: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    """Texture coordinates (T, 2) as clip positions (1, T, 4) that a `size` x `size` picture shows as the texture, v = 1 on top.

    `offset` moves the sample of every texel by that much (x, y) of a texel, from its centre.
    """
    clip = np.zeros((1, len(uvs), 4), np.float32)
    clip[0, :, 0] = 2 * uvs[:, 0] - 1 - 2 * offset[0] / size
    clip[0, :, 1] = 1 - 2 * uvs[:, 1] - 2 * offset[1] / size
    clip[0, :, 3] = 1
    return torch.from_numpy(clip)
