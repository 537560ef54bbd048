"""The kinds of parts a system is put together from, with threestudio's signatures."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .base import BaseModule, BaseObject
from .config import ConfigError


class Mesh:
    """A triangle mesh as geometries hand it to renderers and exporters.

    Args:
        v_pos: (V,3) positions.
        t_pos_idx: (F,3) integer indices into v_pos, counter-clockwise seen from outside.
        extras: anything else; reachable as `mesh.extras[name]` and passed on by `add_extra`.
    """

    def __init__(self, v_pos: Tensor, t_pos_idx: Tensor, **extras: Any) -> None:
        self.v_pos = v_pos
        self.t_pos_idx = t_pos_idx
        self.v_rgb: Tensor | None = None  # (V,3) in [0,1]
        self.v_tex: Tensor | None = None  # (T,2)
        self.t_tex_idx: Tensor | None = None  # (F,3) indices into v_tex
        self.extras: dict[str, Any] = {}
        for name, value in extras.items():
            self.add_extra(name, value)

    def add_extra(self, name: str, value: Any) -> None:
        self.extras[name] = value

    @property
    def requires_grad(self) -> bool:
        return self.v_pos.requires_grad

    @cached_property
    def v_nrm(self) -> Tensor:
        """(V,3) unit normals, faces weighted by area; (0,0,1) where no face gives a direction."""
        corners = self.v_pos[self.t_pos_idx]  # (F,3,3)
        weighted = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=-1)
        total = torch.zeros_like(self.v_pos)
        for corner in range(3):
            total = total.index_add(0, self.t_pos_idx[:, corner].long(), weighted)
        length = total.norm(dim=-1, keepdim=True)
        up = total.new_tensor([0.0, 0.0, 1.0]).expand_as(total)
        return torch.where(length > 1e-20, total / length.clamp_min(1e-20), up)

    @cached_property
    def edges(self) -> Tensor:
        """(E,2) each edge once, smaller index first."""
        pairs = torch.cat([self.t_pos_idx[:, [0, 1]], self.t_pos_idx[:, [1, 2]], self.t_pos_idx[:, [2, 0]]])
        return torch.unique(pairs.sort(dim=1).values, dim=0)

    def set_vertex_color(self, v_rgb: Tensor) -> None:
        self.v_rgb = v_rgb

    def set_uv(self, v_tex: Tensor, t_tex_idx: Tensor) -> None:
        self.v_tex, self.t_tex_idx = v_tex, t_tex_idx


def _box(radius: float) -> Tensor:
    """(2,3) lowest and highest corner of [-radius, radius]^3."""
    return torch.tensor([[-float(radius)] * 3, [float(radius)] * 3])


class BaseGeometry(BaseModule):
    """A shape, and features at points on it."""

    @dataclass
    class Config(BaseModule.Config):
        pass

    @staticmethod
    def create_from(other: "BaseGeometry", cfg: Any = None, **kwargs) -> "BaseGeometry":
        """Take over another geometry, an earlier stage's; `copy_net`: with its networks, as far as they fit."""
        raise ConfigError(f"a {type(other).__name__} cannot be turned into the geometry of this stage, which takes none over")

    def export(self, *args, **kwargs) -> dict[str, Any]:
        """Features for the exporter."""
        return {}


class BaseExplicitGeometry(BaseGeometry):
    """A surface: `isosurface()` gives the mesh, calling it gives `{"features": (*N,F)}` at points (*N,3)."""

    @dataclass
    class Config(BaseGeometry.Config):
        radius: float = 1.0

    bbox: Tensor  # (2,3)

    def configure(self) -> None:
        self.register_buffer("bbox", _box(self.cfg.radius))

    def initialize_shape(self) -> None:
        """Fit the initial shape, before training."""

    def isosurface(self) -> Mesh:
        raise NotImplementedError

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        raise NotImplementedError


class BaseMaterial(BaseModule):
    """Features (N,F) to colours (N,3) in [0,1]."""

    requires_normal: bool = False
    requires_tangent: bool = False

    @dataclass
    class Config(BaseModule.Config):
        pass

    def forward(self, *args, **kwargs) -> Tensor:
        raise NotImplementedError

    def export(self, *args, **kwargs) -> dict[str, Any]:
        """`{"albedo": (*N,3), ...}` for the exporter."""
        return {}


class BaseBackground(BaseModule):
    """Viewing directions (B,H,W,3) to colours (B,H,W,C)."""

    @dataclass
    class Config(BaseModule.Config):
        pass

    def forward(self, dirs: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass
class _Shared:
    """Parts that belong to the system: held outside nn.Module so that their parameters are counted once."""

    geometry: BaseGeometry
    material: BaseMaterial
    background: BaseBackground


class Renderer(BaseModule):
    """Sees geometry, material and background; `geometry`, `material` and `background` are the system's own."""

    @dataclass
    class Config(BaseModule.Config):
        radius: float = 1.0

    bbox: Tensor  # (2,3), in checkpoints as in threestudio's: a run can be resumed in either

    def configure(self, geometry: BaseGeometry, material: BaseMaterial, background: BaseBackground) -> None:
        self._shared = _Shared(geometry, material, background)
        self.register_buffer("bbox", _box(self.cfg.radius))

    def forward(self, *args, **kwargs) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def geometry(self) -> BaseGeometry:
        return self._shared.geometry

    @property
    def material(self) -> BaseMaterial:
        return self._shared.material

    @property
    def background(self) -> BaseBackground:
        return self._shared.background


class Rasterizer(Renderer):
    """A renderer of meshes: `forward(mvp_mtx, camera_positions, light_positions, height, width, render_rgb=True, **kwargs)`."""


@dataclass
class ExporterOutput:
    """One file to be written: `save_<save_type>(<folder>/<save_name>, **params)` of the system."""

    save_name: str
    save_type: str
    params: dict[str, Any] = field(default_factory=dict)


class Exporter(BaseObject):
    """Turns the trained parts into files: `__call__() -> list[ExporterOutput]`."""

    @dataclass
    class Config(BaseObject.Config):
        save_video: bool = False

    def configure(self, geometry: BaseGeometry, material: BaseMaterial, background: BaseBackground) -> None:
        self._shared = _Shared(geometry, material, background)

    geometry = property(lambda self: self._shared.geometry)
    material = property(lambda self: self._shared.material)
    background = property(lambda self: self._shared.background)

    def __call__(self, *args, **kwargs) -> list[ExporterOutput]:
        raise NotImplementedError
