"""What a mesh looks like from some cameras, before any colour: mask, depth, positions and normals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import Cameras
from .mesh import TriangleMesh
from .raster.protocol import RasterizerBackend

SILHOUETTES = ("coverage", "antialias", "none")


@dataclass
class GBuffer:
    """Geometry buffers of B views. Row 0 is the top of the picture; everything is zero where `mask` is false.

    Only an opacity with antialiased silhouettes also reaches, by up to half, into the pixels along the outline whose centres the mesh
    misses.
    """

    mask: Tensor  # (B, H, W) bool: the pixel's centre is on the mesh
    opacity: Tensor  # (B, H, W, 1) in [0, 1]: see `render_gbuffer`
    depth: Tensor  # (B, H, W, 1) distance along the viewing axis, positive
    position: Tensor  # (B, H, W, 3) world
    normal: Tensor  # (B, H, W, 3) world, unit, outward (not turned towards the viewer on the back of a face)
    view_normal: Tensor  # (B, H, W, 3) camera space: x right, y up, z towards the viewer
    rast: Tensor  # (B, H, W, 4) see RasterizerBackend.rasterize
    clip: Tensor  # (B, V, 4) the vertices in clip space
    indices: Tensor  # (N,) int64: the masked pixels, as positions in the flattened (B, H, W)

    def select(self, buffer: Tensor) -> Tensor:
        """Values (N, C) of a (B, H, W, C) buffer at the masked pixels, in the order of `indices`."""
        return buffer.reshape(-1, buffer.shape[-1])[self.indices]


def render_gbuffer(
    mesh: TriangleMesh, cameras: Cameras, height: int, width: int, backend: RasterizerBackend, *, silhouette: str = "coverage"
) -> GBuffer:
    """Rasterise `mesh` from `cameras`. Differentiable with respect to mesh.vertices inside of the silhouette.

    Args:
        silhouette: what opacity means. "coverage": the share of the pixel that the mesh covers, without a gradient, for a shape that
            stands still. "antialias": the mask blended across the outline, differentiable with respect to mesh.vertices, for a shape
            that moves; `antialiased` and `composite` carry that gradient over to pictures. "none": the mask.

    Raises:
        ValueError: unknown `silhouette`.
    """
    if silhouette not in SILHOUETTES:
        raise ValueError(f"silhouette: found {silhouette!r}, wanted one of {', '.join(SILHOUETTES)}")
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
        opacity = coverage
        if silhouette == "coverage":
            opacity = backend.smooth_mask(clip, rast, mesh.faces) * coverage
        elif silhouette == "antialias":
            opacity = backend.antialias(coverage, rast, clip, mesh.faces, mesh.face_adjacency()).clamp(0, 1)  # rounding
    indices = mask.reshape(-1).nonzero().squeeze(-1)
    return GBuffer(mask, opacity, depth, position, normal, view_normal, rast, clip, indices)


def antialiased(image: Tensor, gbuffer: GBuffer, mesh: TriangleMesh, backend: RasterizerBackend) -> Tensor:
    """Picture (B, H, W, C) with blended silhouettes, differentiable in `image` and in where mesh.vertices put the silhouettes.

    Args:
        image: (B, H, W, C) one value per pixel, with a hard outline: `composite` without opacity, or a buffer as it is.
        mesh: the mesh that `gbuffer` shows.
    """
    return backend.antialias(image.to(gbuffer.clip.dtype), gbuffer.rast, gbuffer.clip, mesh.faces, mesh.face_adjacency())


def composite(
    values: Tensor,
    gbuffer: GBuffer,
    background: Tensor,
    mesh: TriangleMesh | None = None,
    backend: RasterizerBackend | None = None,
) -> Tensor:
    """Picture (B, H, W, C) of an object before a background, differentiable in values and background.

    Without a mesh: opacity * value + (1 - opacity) * background. A pixel that the mesh covers in part without reaching its centre has no
    value of its own, so it stays background: silhouettes come out smooth on their inner side only.

    With the mesh that `gbuffer` shows, and the backend: the value where the mask is true, else the background, and then `antialiased` as
    a whole. So inner silhouettes are blended too, and the picture's gradient moves them all; opacity is not used.

    Args:
        values: (N, C) at the masked pixels, in the order of `gbuffer.indices`.
        background: (B, H, W, C).
    """
    shape = background.shape
    flat = background.reshape(-1, shape[-1])
    if mesh is not None:
        image = flat.index_copy(0, gbuffer.indices, values.to(flat.dtype)).reshape(shape)
        return antialiased(image, gbuffer, mesh, backend)
    opacity = gbuffer.opacity.reshape(-1, 1)[gbuffer.indices]
    blended = opacity * values + (1 - opacity) * flat[gbuffer.indices]
    return flat.index_copy(0, gbuffer.indices, blended.to(flat.dtype)).reshape(shape)
