"""What a rasteriser backend offers. Two exist: `cpu` (numba) and `nvdiffrast` (CUDA); `reference` is the plain torch twin."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RasterError(ValueError):
    """A rasteriser was asked for something it cannot do; the message names the argument, what was found and what is wanted."""


class RasterizerBackend(Protocol):
    """Visibility and attribute interpolation with nvdiffrast's tensor layout (Laine et al. 2020).

    Clip space follows OpenGL: a point is seen where -w <= x, y, z <= w and w > 0. Row 0 of every image is y/w = -1, column 0 is
    x/w = -1, and pixel centres lie at half-integers. Both sides of a triangle are seen (no culling).
    """

    name: str

    def rasterize(self, clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
        """Nearest triangle at every pixel centre.

        Args:
            clip: (B, V, 4) clip-space vertices, float32 or float64.
            faces: (F, 3) int32 or int64 vertex indices.

        Returns:
            (B, H, W, 4): u, v (perspective-correct weights of vertices 0 and 1), z/w in [-1, 1], triangle index + 1 (0 where empty).
            Differentiable with respect to `clip` through u and v only.
        """
        ...

    def interpolate(self, attributes: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        """Vertex attributes (V, C) or (B, V, C) at every pixel: (B, H, W, C), zero where empty.

        Differentiable with respect to `attributes` and to u and v of `rast`.
        """
        ...

    def smooth_mask(self, clip: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        """How much of every pixel is covered by the mesh: (B, H, W, 1) in [0, 1]. Carries no gradient."""
        ...

    def antialias(self, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, adjacency: Tensor) -> Tensor:
        """Blend pixels across silhouettes, which makes a picture differentiable in where its silhouettes lie (Laine et al. 2020, 3.5).

        Two horizontal or vertical neighbours see different surfaces where a silhouette edge of the nearer one, an edge that is open or
        whose two triangles lie on the same side of it on the screen, crosses the line between their centres. The pixel in which it
        crosses takes over the other's colour: none if it crosses half-way, half of it if it crosses at the pixel's own centre.

        Args:
            color: (B, H, W, C) one sample per pixel centre, unblended, float32 or float64.
            rast: (B, H, W, 4) of `rasterize`.
            clip: (B, V, 4) clip-space vertices.
            faces: (F, 3) vertex indices; vertices have to be shared, since along a seam every edge would count as open.
            adjacency: (F, 3) of `scene.adjacency.face_adjacency`.

        Returns:
            (B, H, W, C) within the range of `color`. Differentiable with respect to `color` and to x, y, w of `clip`.
        """
        ...
