"""Baking: a colour for every texel of a texture."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..scene.fields import evaluate_in_chunks
from ..scene.mesh import TriangleMesh
from ..scene.raster import make_rasterizer
from .files import ExportError
from .unwrap import UVAtlas, uv_to_clip


@torch.no_grad()
def bake(
    mesh: TriangleMesh,
    atlas: UVAtlas,
    color_fn: Callable[[Tensor], Tensor],
    resolution: int = 2048,
    *,
    samples: int = 1,
    chunk: int = 2**16,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Evaluate a colour at the surface point of every texel; texels without one take the nearest that has.

    Filling all of them, not only a rim, keeps every bilinear or mip-mapped lookup at a seam free of foreign colours.

    Args:
        color_fn: (N, 3) points in the mesh's stored frame, on its device -> (N, C).
        samples: points per texel, a square number, averaged.
        progress: called with the share done, in (0, 1].
    Returns:
        (resolution, resolution, C) float32, row 0 is v = 1.
    Raises:
        ExportError: no texel's centre lies in any face, or an argument is out of range.
    """
    side = math.isqrt(max(samples, 0))
    if samples < 1 or side * side != samples:
        raise ExportError(f"bake samples: found {samples}, wanted a square number such as 1, 4 or 9")
    if resolution < 1:
        raise ExportError(f"bake resolution: found {resolution}, wanted at least 1")
    if len(mesh.faces) == 0:
        raise ExportError("bake: the mesh has no faces, wanted at least one triangle")
    rasterizer = make_rasterizer("cpu")  # exact, everywhere, and a fraction of the time the colours take
    uv_faces = torch.from_numpy(np.ascontiguousarray(atlas.uv_faces))
    vertices, faces = mesh.vertices.detach().float().cpu(), mesh.faces.cpu()

    total, count = None, torch.zeros(resolution * resolution, 1)
    for sample in range(samples):
        offset = ((sample % side + 0.5) / side - 0.5, (sample // side + 0.5) / side - 0.5)
        # Both windings are drawn: half of the charts of an atlas are mirrored.
        rast = rasterizer.rasterize(uv_to_clip(atlas.uvs, resolution, offset), uv_faces, resolution, resolution)
        covered = (rast[..., 3] > 0).view(-1).nonzero()[:, 0]
        points = rasterizer.interpolate(vertices, rast, faces).view(-1, 3)[covered].to(mesh.vertices.device)
        del rast

        def report(done: int, of: int, sample=sample) -> None:
            if progress is not None:
                progress((sample + done / of) / samples)

        colors = evaluate_in_chunks(color_fn, points, chunk=chunk, progress=report).float().cpu()
        if total is None:
            total = torch.zeros(resolution * resolution, colors.shape[-1])
        total.index_add_(0, covered, colors)
        count.index_add_(0, covered, torch.ones(len(covered), 1))
    texture = (total / count.clamp(min=1)).view(resolution, resolution, -1).numpy()
    return fill_nearest(texture, count.view(resolution, resolution).numpy() > 0)


def fill_nearest(texture: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """texture (H, W, C) with every texel that is not covered (H, W) bool replaced by the nearest covered one.

    Raises ExportError if none is covered.
    """
    from scipy.ndimage import distance_transform_edt

    if not covered.any():
        raise ExportError("bake: no texel lies in any face, wanted texture coordinates with an area or a higher resolution")
    if covered.all():
        return texture
    rows, columns = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    filled = texture.copy()
    empty = ~covered
    filled[empty] = texture[rows[empty], columns[empty]]
    return filled
