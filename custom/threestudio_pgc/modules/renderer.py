"""Renders a mesh with a texture field: only the pixels that see the object are shaded."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host import Rasterizer, register
from ..scene.cameras import Cameras
from ..scene.gbuffer import composite, render_gbuffer
from ..scene.raster import make_rasterizer


@register("pgc-mesh-rasterizer")
class MeshRasterizer(Rasterizer):
    """Config: backend: "auto" (nvdiffrast on CUDA where it is installed, else the CPU rasteriser), "cpu" or "nvdiffrast"."""

    @dataclass
    class Config(Rasterizer.Config):
        backend: str = "auto"

    cfg: Config

    def configure(self, geometry: Any, material: Any, background: Any) -> None:
        super().configure(geometry, material, background)
        self._rasterizer = make_rasterizer(self.cfg.backend, self.device)

    def forward(
        self,
        mvp_mtx: Tensor,
        camera_positions: Tensor,
        light_positions: Tensor,
        height: int,
        width: int,
        c2w: Tensor,
        proj_mtx: Tensor,
        elevation: Tensor,
        azimuth: Tensor,
        camera_distances: Tensor,
        fovy: Tensor,
        render_rgb: bool = True,
        **kwargs,
    ) -> dict[str, Any]:
        """Views of the object.

        Returns:
            "opacity" (B, H, W, 1); "depth" (B, H, W, 1), positive along the viewing axis, 0 outside; "comp_normal" (B, H, W, 3), world
            normals as (n + 1) / 2, black outside, the host's encoding; "view_normal" (B, H, W, 3) in [-1, 1], camera space, 0 outside;
            "mesh"; and with `render_rgb` "comp_rgb" and "comp_rgb_bg" (B, H, W, 3) in [0, 1].
        """
        cameras = Cameras(c2w, proj_mtx, mvp_mtx, camera_positions, elevation, azimuth, camera_distances, fovy)
        mesh = self.geometry.triangle_mesh()
        buffers = render_gbuffer(mesh, cameras, height, width, self._rasterizer)
        out = {
            "mesh": mesh,
            "opacity": buffers.opacity,
            "depth": buffers.depth,
            "comp_normal": (buffers.normal * 0.5 + 0.5) * buffers.opacity,
            "view_normal": buffers.view_normal,
        }
        if render_rgb:
            positions = buffers.select(buffers.position)
            view_of_pixel = buffers.indices // (height * width)
            directions = F.normalize(positions - camera_positions[view_of_pixel], dim=-1)
            color = self.material(
                **self.geometry(positions),
                viewdirs=directions,
                positions=positions,
                shading_normal=buffers.select(buffers.normal),
                light_positions=light_positions[view_of_pixel],
            )
            background = self.background(dirs=torch.zeros_like(buffers.position))
            out |= {"comp_rgb": composite(color, buffers, background), "comp_rgb_bg": background}
        return out
