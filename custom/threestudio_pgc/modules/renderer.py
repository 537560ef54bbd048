"""Renders a mesh with a texture field: only the pixels that see the object are shaded."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host import Rasterizer, register
from ..scene.cameras import Cameras
from ..scene.gbuffer import GBuffer, composite, render_gbuffer
from ..scene.mesh import TriangleMesh
from ..scene.raster import ANTIALIASING, make_rasterizer
from .geometry import surface_of
from .randomness import step_generator

NORMAL_SPACES = ("world", "camera")


@register("pgc-mesh-rasterizer")
class MeshRasterizer(Rasterizer):
    """Config:
    backend: "auto" (nvdiffrast on CUDA where it is installed, else the CPU rasteriser), "cpu" or "nvdiffrast".
    antialias: of the silhouettes of a shape that moves, where its gradient comes from: "auto" (the backend's own), "walk" (ours, which
        sees the silhouettes of fine meshes that nvdiffrast's misses), "nvdiffrast".
    perturb: in training each point whose colour is asked moves by up to this share of the object's largest side, uniformly in [-1, 1]
        along each axis (the paper's 5.2; the authors' code has U[0, 2e-3), which also shifts the texture).
    normal_space: of the picture of normals: "world", as the paper's authors and the host have it, or "camera", x to the right and z towards
        the viewer, where a side looks alike from everywhere.
    normal_background: [r, g, b] in [0, 1] behind it; the authors' is grey, the host's black.
    """

    @dataclass
    class Config(Rasterizer.Config):
        backend: str = "auto"
        antialias: str = "auto"
        perturb: float = 0.0
        normal_space: str = "world"
        normal_background: Any = field(default_factory=lambda: [0.5, 0.5, 0.5])

    cfg: Config

    def configure(self, geometry: Any, material: Any, background: Any) -> None:
        super().configure(geometry, material, background)
        cfg = self.cfg
        for key, known in (("antialias", ANTIALIASING), ("normal_space", NORMAL_SPACES)):
            if cfg[key] not in known:
                raise ValueError(f"system.renderer.{key}: found {cfg[key]!r}, wanted one of {', '.join(known)}")
        if not 0 <= cfg.perturb <= 0.1:
            raise ValueError(f"system.renderer.perturb: found {cfg.perturb}, wanted 0 to 0.1, a share of the object's size")
        color = list(cfg.normal_background)
        if len(color) != 3 or not all(0 <= channel <= 1 for channel in color):
            raise ValueError(f"system.renderer.normal_background: found {color}, wanted three numbers in [0, 1]")
        self._rasterizer = make_rasterizer(cfg.backend, self.device, antialias=cfg.antialias)
        self._step = 0

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._step = global_step

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
        render_normal: bool = False,
        render_maps: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Views of the object. The silhouettes of a shape that asks for a gradient are antialiased with one.

        Returns:
            "opacity" (B, H, W, 1); "depth" (B, H, W, 1), positive along the viewing axis, 0 outside; "comp_normal" (B, H, W, 3), world
            normals as (n + 1) / 2, black outside, the host's encoding; "view_normal" (B, H, W, 3) in [-1, 1], camera space, 0 outside;
            "mesh"; with `render_rgb` "comp_rgb" and "comp_rgb_bg" (B, H, W, 3) in [0, 1], and of the N pixels that see the object
            "positions" (N, 3) and "features" (N, F); with `render_normal` "normal_image" (B, H, W, 3) in [0, 1], as `normal_space` and
            `normal_background` say; with `render_maps` "maps", what the material would export, by name, (B, H, W, 3) in [0, 1] on white.
        """
        cameras = Cameras(c2w, proj_mtx, mvp_mtx, camera_positions, elevation, azimuth, camera_distances, fovy)
        mesh = surface_of(self.geometry)
        moves = mesh.vertices.requires_grad and torch.is_grad_enabled()
        silhouette = "antialias" if moves else "coverage"
        buffers = render_gbuffer(mesh, cameras, height, width, self._rasterizer, silhouette=silhouette)
        outline = (mesh, self._rasterizer) if moves else ()
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
            normals = buffers.select(buffers.normal)
            if getattr(self.material, "requires_normal", False):
                normals = _towards_viewer(normals, directions, mesh, buffers)
            found = self.geometry(self._perturbed(positions, mesh.vertices))
            color = self.material(
                **found,
                viewdirs=directions,
                positions=positions,
                shading_normal=normals,
                light_positions=light_positions[view_of_pixel],
            )
            background = self.background(dirs=torch.zeros_like(buffers.position))
            out |= {"comp_rgb": composite(color, buffers, background, *outline), "comp_rgb_bg": background}
            out |= {"positions": positions, "features": found["features"]}
            if render_maps:
                white = torch.ones_like(buffers.position)
                maps = self.material.export(**found, shading_normal=normals)
                out["maps"] = {name: composite(_as_picture(name, maps[name]), buffers, white) for name in maps}
        if render_normal:
            normal = buffers.normal if self.cfg.normal_space == "world" else buffers.view_normal
            background = torch.tensor(list(self.cfg.normal_background)).to(normal).expand_as(normal)
            out["normal_image"] = composite(buffers.select(normal) * 0.5 + 0.5, buffers, background, *outline)
        return out

    def _perturbed(self, positions: Tensor, vertices: Tensor) -> Tensor:
        """(N, 3) points with `perturb` applied; as they are outside of training."""
        if not self.cfg.perturb or not self.training or not torch.is_grad_enabled():
            return positions
        size = (vertices.detach().amax(dim=0) - vertices.detach().amin(dim=0)).max()
        noise = torch.rand(positions.shape, generator=step_generator("perturb", self._step, positions.device), device=positions.device)
        return positions + (2 * noise - 1) * self.cfg.perturb * size


def _towards_viewer(normals: Tensor, directions: Tensor, mesh: TriangleMesh, buffers: GBuffer) -> Tensor:
    """(N, 3) normals turned round where a face shows its back, as viewers light the two sides of an open surface."""
    face = buffers.select(buffers.rast)[:, 3].long() - 1
    back = (mesh.face_normals().detach()[face] * directions).sum(-1, keepdim=True) > 0
    return torch.where(back, -normals, normals)


def _as_picture(name: str, values: Tensor) -> Tensor:
    """(N, 3) in [0, 1] from a map's (N, 1) or (N, 3) values; normals as (n + 1) / 2."""
    return (values * 0.5 + 0.5 if name == "shading_normal" else values).expand(-1, 3)
