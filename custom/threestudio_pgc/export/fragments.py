"""Small loose pieces of a surface, which an optimised signed distance leaves inside and around the object."""

from __future__ import annotations

import numpy as np
import torch

from ..scene.mesh import TriangleMesh
from .files import ExportError


def check_min_share(found: float, key: str) -> None:
    """Raises ExportError, naming `key`, for a share outside [0, 1)."""
    if not 0 <= found < 1:
        raise ExportError(f"{key}: found {found}, wanted at least 0, which keeps everything, and less than 1")


def remove_fragments(mesh: TriangleMesh, min_share: float) -> tuple[TriangleMesh, int]:
    """The mesh without the pieces whose surface is below `min_share` of the largest piece's; a piece is what hangs together by vertices.

    Vertices and texture coordinates that no face uses any more are dropped, and all others keep their order.

    Args:
        min_share: in [0, 1); 0 keeps everything.
    Returns:
        the mesh, the very same where nothing is removed, and the number of pieces removed. A new one has vertices, faces, texture
        coordinates, vertex colours, frame and source path, and no gradient.
    Raises:
        ExportError: `min_share` is out of range.
    """
    check_min_share(min_share, "remove_fragments min_share")
    if min_share == 0 or len(mesh.faces) == 0:
        return mesh, 0
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    vertices, faces = mesh.vertices.detach().cpu().double().numpy(), mesh.faces.cpu().numpy()
    start, end = faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel()
    links = coo_array((np.ones(len(start), np.int8), (start, end)), shape=(len(vertices),) * 2)
    _, piece_of_vertex = connected_components(links, directed=False)
    piece = piece_of_vertex[faces[:, 0]]
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    area = np.bincount(piece, weights=np.linalg.norm(np.cross(b - a, c - a), axis=-1) / 2)
    small = area < min_share * area.max()
    small[np.bincount(piece) == 0] = False  # vertices without a face are no piece
    if not small.any():
        return mesh, 0

    kept = torch.from_numpy(~small[piece]).to(mesh.faces.device)
    used, faces = torch.unique(mesh.faces[kept], return_inverse=True)
    result = TriangleMesh(mesh.vertices.detach()[used], faces, frame=mesh.frame, source_path=mesh.source_path)
    if mesh.vertex_colors is not None:
        result.vertex_colors = mesh.vertex_colors[used]
    if mesh.uvs is not None and mesh.uv_faces is not None:
        used, result.uv_faces = torch.unique(mesh.uv_faces[kept], return_inverse=True)
        result.uvs = mesh.uvs[used]
    return result, int(small.sum())
