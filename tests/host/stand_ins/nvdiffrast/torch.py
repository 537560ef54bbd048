"""The part of nvdiffrast.torch that threestudio calls, by this project's CPU rasteriser: pictures are real, derivatives of u and v absent.

Instance mode only: positions (B, V, 4), one list of triangles for all. Contexts hold nothing.
"""

import torch
import torch.nn.functional as F


class RasterizeGLContext:
    def __init__(self, device=None):
        pass


class RasterizeCudaContext(RasterizeGLContext):
    pass


def _rasterizer():
    # Not at import: threestudio imports this before it loads the extension.
    from threestudio_pgc.scene.raster.cpu import CpuRasterizer

    return CpuRasterizer()


def rasterize(glctx, pos, tri, resolution, ranges=None, grad_db=True):
    """(B, H, W, 4) of u, v, z/w, triangle + 1, and zeros for the derivatives of u and v."""
    rast = _rasterizer().rasterize(pos, tri, *resolution)
    return rast, torch.zeros_like(rast)


def interpolate(attr, rast, tri, rast_db=None, diff_attrs=None):
    values = _rasterizer().interpolate(attr, rast, tri)
    return values, torch.zeros_like(values)


def antialias(color, rast, pos, tri):
    from threestudio_pgc.scene.adjacency import face_adjacency

    return _rasterizer().antialias(color, rast, pos, tri, face_adjacency(tri))


def texture(tex, uv, filter_mode="linear", boundary_mode="clamp"):
    """tex (B, h, w, C) at uv (B, H, W, 2) in [0, 1]: (B, H, W, C). Bilinear, clamped at the edges."""
    if (filter_mode, boundary_mode) != ("linear", "clamp"):
        raise NotImplementedError(f"texture: found {filter_mode}, {boundary_mode}, wanted linear, clamp")
    values = F.grid_sample(tex.movedim(-1, 1), uv * 2 - 1, mode="bilinear", padding_mode="border", align_corners=False)
    return values.movedim(1, -1)
