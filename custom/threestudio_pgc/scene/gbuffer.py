"""What a mesh looks like from some cameras, before any colour: mask, depth, positions and normals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Cameras
from .mesh import TriangleMesh
from .raster.protocol import RasterizerBackend


@dataclass
class GBuffer:
    """Geometry buffers of B views. Row 0 is the top of the picture; everything is zero where `mask` is false."""

    mask: Tensor  # (B, H, W) bool: the pixel's centre is on the mesh
    opacity: Tensor  # (B, H, W, 1) in [0, 1]: share of the pixel that the mesh covers, zero where the mask is false
    depth: Tensor  # (B, H, W, 1) distance along the viewing axis, positive
    position: Tensor  # (B, H, W, 3) world
    normal: Tensor  # (B, H, W, 3) world, unit, outward (not turned towards the viewer on the back of a face)
    view_normal: Tensor  # (B, H, W, 3) camera space: x right, y up, z towards the viewer
    rast: Tensor  # (B, H, W, 4) see RasterizerBackend.rasterize
    indices: Tensor  # (N,) int64: the masked pixels, as positions in the flattened (B, H, W)

    def select(self, buffer: Tensor) -> Tensor:
        """Values (N, C) of a (B, H, W, C) buffer at the masked pixels, in the order of `indices`."""
        return buffer.reshape(-1, buffer.shape[-1])[self.indices]


def render_gbuffer(
    mesh: TriangleMesh, cameras: Cameras, height: int, width: int, backend: RasterizerBackend, *, smooth: bool = True
) -> GBuffer:
    """Rasterise `mesh` from `cameras`. Differentiable with respect to mesh.vertices inside of the silhouette.

    With `smooth` the opacity falls below 1 on pixels that the mesh covers partly; without, opacity equals the mask.
    """
    # autocast would turn the matrix products below into half precision, which moves vertices by whole pixels
    with torch.autocast(mesh.vertices.device.type, enabled=False):
        clip = cameras.clip(mesh.vertices)
        rast = backend.rasterize(clip, mesh.faces, height, width)
        surface = backend.interpolate(torch.cat([mesh.vertices, mesh.vertex_normals()], dim=-1), rast, mesh.faces)
        mask = rast[..., 3] > 0
        coverage = mask[..., None].to(clip.dtype)
        position, normal = surface[..., :3], F.normalize(surface[..., 3:], dim=-1)

        world_to_camera = cameras.c2w[:, :3, :3].to(clip.dtype)  # row vectors times this go to camera space
        offset = position - cameras.positions.to(clip.dtype)[:, None, None]
        depth = -torch.einsum("bhwi,bi->bhw", offset, world_to_camera[:, :, 2])[..., None] * coverage
        view_normal = torch.einsum("bhwi,bij->bhwj", normal, world_to_camera)
        opacity = backend.smooth_mask(clip, rast, mesh.faces) * coverage if smooth else coverage
    indices = mask.reshape(-1).nonzero().squeeze(-1)
    return GBuffer(mask, opacity, depth, position, normal, view_normal, rast, indices)


def composite(values: Tensor, gbuffer: GBuffer, background: Tensor) -> Tensor:
    """Picture (B, H, W, C) = opacity * value + (1 - opacity) * background, differentiable in values and background.

    A pixel that the mesh covers in part without reaching its centre has no value of its own, so it stays background: silhouettes come
    out smooth on their inner side only.

    Args:
        values: (N, C) at the masked pixels, in the order of `gbuffer.indices`.
        background: (B, H, W, C).
    """
    shape = background.shape
    flat = background.reshape(-1, shape[-1])
    opacity = gbuffer.opacity.reshape(-1, 1)[gbuffer.indices]
    blended = opacity * values + (1 - opacity) * flat[gbuffer.indices]
    return flat.index_copy(0, gbuffer.indices, blended.to(flat.dtype)).reshape(shape)
