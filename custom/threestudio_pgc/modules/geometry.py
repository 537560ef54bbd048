"""A fixed mesh with a texture field on its surface."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..host import BaseExplicitGeometry, Mesh, info, register
from ..scene.fields import HashGridField, field_config
from ..scene.mesh import TriangleMesh, load_mesh, normalize


@register("pgc-textured-mesh")
class TexturedMesh(BaseExplicitGeometry):
    """The paper's texture stage: the mesh stays, a multi-resolution hash grid and an MLP give each surface point its features.

    Config:
        mesh: path of any mesh trimesh reads, or `builtin:NAME` (bunny, teapot, vase, knot, lettered).
        up: axis that points up in the file, "y" or "z"; null takes the format's own (y for glTF, z otherwise).
        extent: the mesh is centred and scaled into [-extent, extent]^3, never mirrored; export undoes it.
        max_faces: refuse larger meshes.
        texture: size of the field: `preset` ("reference", "fantasia3d", "pocket") and any field of `FieldConfig` to override.
    """

    @dataclass
    class Config(BaseExplicitGeometry.Config):
        mesh: str = "builtin:bunny"
        up: Any = None
        extent: float = 0.8
        max_faces: int = 1_000_000
        texture: dict = field(default_factory=lambda: {"preset": "reference"})

    cfg: Config

    def configure(self) -> None:
        super().configure()
        self._mesh = normalize(load_mesh(self.cfg.mesh, max_faces=self.cfg.max_faces, up=self.cfg.up), self.cfg.extent)
        self.texture = HashGridField(field_config(**dict(self.cfg.texture)))
        info(f"Mesh {self.cfg.mesh}: {len(self._mesh.vertices)} vertices, {len(self._mesh.faces)} faces")

    def triangle_mesh(self) -> TriangleMesh:
        """The normalised mesh, on the field's device."""
        device = next(self.texture.parameters()).device
        if self._mesh.vertices.device != device:
            self._mesh = self._mesh.to(device)
        return self._mesh

    def isosurface(self) -> Mesh:
        """The same mesh as the host's type, for the host's own renderers and exporters."""
        mesh = self.triangle_mesh()
        return Mesh(v_pos=mesh.vertices, t_pos_idx=mesh.faces)

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        """(*N, 3) points on the surface -> {"features": (*N, F)}. Normals come from the mesh; `output_normal` is the host's signature."""
        if output_normal:
            raise NotImplementedError("pgc-textured-mesh takes normals from the mesh, not from the field")
        return {"features": self.texture(points.reshape(-1, 3)).view(*points.shape[:-1], -1)}

    @torch.no_grad()
    def export(self, points: Tensor, **kwargs) -> dict[str, Tensor]:
        return self(points)
