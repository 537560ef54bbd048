"""Fewer faces, on request only."""

from __future__ import annotations

import numpy as np
import torch

from ..scene.mesh import TriangleMesh
from .files import ExportError

LEAST_FACES = 4  # of a closed surface


def simplify(mesh: TriangleMesh, faces: int) -> TriangleMesh:
    """The mesh with at most `faces` faces, by collapsing the edges that cost least (quadric error metric, Garland and Heckbert 1997).

    Args:
        faces: wanted, at least 4.
    Returns:
        the mesh itself where it has no more faces than that. Else a new one without texture coordinates and colours, which belong to the
        vertices that go; it keeps the frame, the source path and the device, its equal positions are welded, it has no faces without
        area and no gradient.
    Raises:
        ExportError: `faces` is below 4, fast_simplification is not installed, or no face with an area would be left.
    """
    if faces < LEAST_FACES:
        raise ExportError(f"simplify faces: found {faces}, wanted at least {LEAST_FACES}")
    if len(mesh.faces) <= faces:
        return mesh
    try:
        import fast_simplification
    except ImportError as error:
        raise ExportError("simplify: found no fast_simplification, wanted it installed: pip install fast-simplification") from error

    points, triangles = mesh.vertices.detach().cpu().numpy(), mesh.faces.cpu().numpy().astype(np.int32)
    points, triangles = fast_simplification.simplify(points, triangles, target_count=faces)
    # in the precision they are stored in, so that what is welded and what has an area is so afterwards
    corners = points.astype(np.float32)[triangles].reshape(-1, 3)
    points, triangles = np.unique(corners, axis=0, return_inverse=True)
    triangles = triangles.reshape(-1, 3)
    a, b, c = np.moveaxis(points.astype(np.float64)[triangles], 1, 0)
    triangles = triangles[np.cross(b - a, c - a).any(axis=1)]
    if len(triangles) == 0:
        raise ExportError(f"simplify faces: found {faces}, of which none would have an area; wanted more")
    used, triangles = np.unique(triangles, return_inverse=True)
    vertices, kept = torch.from_numpy(points[used]), torch.from_numpy(triangles.reshape(-1, 3))
    device = mesh.vertices.device
    return TriangleMesh(vertices.to(device), kept.to(device), frame=mesh.frame, source_path=mesh.source_path)
