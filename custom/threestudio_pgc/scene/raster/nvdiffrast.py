"""The one file that knows nvdiffrast: `RasterizerBackend` on CUDA, float32 only.

nvdiffrast has a licence of its own (non-commercial), so it is never required and never shipped. Its tensor layout is the protocol's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import CpuRasterizer
from .protocol import RasterError


class NvdiffrastRasterizer:
    """See `protocol.RasterizerBackend`. Raises RasterError if nvdiffrast is not installed or `device` is not CUDA.

    With `walk` silhouettes are antialiased by the CPU rasteriser, on copies of the tensors: nvdiffrast's own rule misses a silhouette
    edge unless it belongs to the very triangle at the pixel's centre, and so loses most of the gradient of a fine mesh.
    """

    name = "nvdiffrast"

    def __init__(self, device: str | torch.device = "cuda", walk: bool = False):
        device = torch.device(device)
        if device.type != "cuda":
            raise RasterError(f"rasterizer: nvdiffrast wants a CUDA device, got {device}; use 'cpu' or 'auto'")
        try:
            import nvdiffrast.torch as dr
        except ImportError as error:
            raise RasterError(
                f"rasterizer: nvdiffrast cannot be imported ({error}); install it from https://github.com/NVlabs/nvdiffrast "
                "or use 'cpu' or 'auto'"
            ) from error
        self._dr = dr
        self._context = dr.RasterizeCudaContext(device=device)
        self._walk = CpuRasterizer() if walk else None

    def rasterize(self, clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
        # grad_db: the image-space derivatives of u, v are for texture filtering, which nothing here does
        rast, _ = self._dr.rasterize(self._context, clip.float().contiguous(), _int32(faces), (height, width), grad_db=False)
        return rast

    def interpolate(self, attributes: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        if attributes.ndim == 2:
            attributes = attributes[None]
        values, _ = self._dr.interpolate(attributes.float().contiguous(), rast.contiguous(), _int32(faces))
        return values

    def smooth_mask(self, clip: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        with torch.no_grad():
            mask = (rast[..., 3:] > 0).float()
            return self._dr.antialias(mask, rast.contiguous(), clip.float().contiguous(), _int32(faces)).clamp(0, 1)

    def antialias(self, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, adjacency: Tensor) -> Tensor:
        if self._walk is not None:
            return self._walk.antialias(color, rast, clip, faces, adjacency)
        color = color.float().contiguous()
        blended = self._dr.antialias(color, rast.contiguous(), clip.float().contiguous(), _int32(faces))
        if color.numel() == 0:
            return blended
        # what arrives from several neighbours is added up, and may amount to more than all of their colour
        return blended.clamp(float(color.detach().min()), float(color.detach().max()))


def _int32(faces: Tensor) -> Tensor:
    return faces.to(torch.int32).contiguous()
