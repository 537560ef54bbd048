"""A shape that moves: DMTet with a texture field on its surface."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..host import get_seed, info, register
from ..scene.dmtet import REPRESENTATIONS, FieldShape, IsosurfaceMesh, VertexShape, read_out
from ..scene.fields import HashGridField, field_config
from ..scene.mesh import TriangleMesh
from ..scene.mesh_colors import surface_colors
from ..scene.regularizers import eikonal, laplacian, normal_consistency, sign_entropy
from ..scene.signed_distance import SignedDistance, initial_distance
from ..scene.tetrahedra import TetrahedralGrid, grid_memory, make_grid
from .geometry import TexturedSurface

REGULARIZERS = ("normal_consistency", "laplacian", "eikonal", "sdf_entropy")


@register("pgc-dmtet")
class TetrahedralShape(TexturedSurface):
    """The paper's second setting and Fantasia3D's geometry stage: the surface of a signed distance on a tetrahedral grid.

    Config:
        radius: the grid fills [-radius, radius]^3.
        resolution: of the grid, numbered as nvdiffrec's and threestudio's: 32, 64, 128, 256 or any between.
        grid_cache: folder of large generated grids; null takes $PGC_CACHE/grids, or .pgc_cache/grids in the current folder.
        representation: "field", distances from a hash grid and an MLP; "values", one of its own for every grid vertex.
        shape: size of that field: `preset` ("reference", "fantasia3d", "pocket") and any field of `FieldConfig` to override.
        deformable: the grid's vertices move too, never so far that a tetrahedron turns over.
        refresh_every: steps from one evaluation of all grid vertices to the next; between them only a band around the surface is.
        rings: width of that band, in edges of the grid on either side.
        shape_init: "sphere", "ellipsoid", "mesh:PATH" or "mesh:builtin:NAME", in the host's spelling.
        shape_init_params: radius; three radii; extent of the mesh.
        shape_init_steps: of fitting the field to it.
        texture: size of the texture field, as `shape`; null for a shape alone, which is grey clay.
        texture_init: start the texture from the colours of the mesh in shape_init.
    """

    @dataclass
    class Config(TexturedSurface.Config):
        resolution: int = 128
        grid_cache: Any = None
        representation: str = "field"
        shape: dict = field(default_factory=lambda: {"preset": "reference"})
        deformable: bool = True
        refresh_every: int = 10
        rings: int = 2
        shape_init: str = "sphere"
        shape_init_params: Any = None
        shape_init_steps: int = 500
        texture: Any = field(default_factory=lambda: {"preset": "reference"})
        texture_init: bool = False

    cfg: Config
    shape_moves = True

    def configure(self) -> None:
        super().configure()
        cfg = self.cfg
        if cfg.representation not in REPRESENTATIONS:
            raise ValueError(f"system.geometry.representation: found {cfg.representation!r}, wanted one of {', '.join(REPRESENTATIONS)}")
        if cfg.refresh_every < 1:
            raise ValueError(f"system.geometry.refresh_every: found {cfg.refresh_every}, wanted at least 1")
        if cfg.texture_init and (cfg.texture is None or not cfg.shape_init.startswith("mesh:")):
            raise ValueError("system.geometry.texture_init: found true, wanted false where there is no texture or shape_init is no mesh")
        self._grid = make_grid(cfg.resolution, cache_dir=None if cfg.grid_cache is None else Path(cfg.grid_cache))
        if cfg.representation == "field":
            size = field_config(**{"hidden_layers": 2, **dict(cfg.shape)})
            self.shape = FieldShape(replace(size, n_output=4, bound=cfg.radius), cfg.rings)
        else:
            self.shape = VertexShape(self._grid, cfg.radius)
        self.texture = None if cfg.texture is None else HashGridField(replace(field_config(**dict(cfg.texture)), bound=cfg.radius))
        self._distance: SignedDistance | None = None
        self._read: tuple[Any, IsosurfaceMesh] | None = None
        vertices, tets = len(self._grid.vertices), len(self._grid.tets)
        memory = grid_memory(cfg.resolution).resident_bytes / 2**20
        info(f"Tetrahedral grid {cfg.resolution}: {vertices} vertices, {tets} tetrahedra, {memory:.0f} MiB")

    # ----------------------------------------------------------------------------------------------------- the beginning

    def read_initial_shape(self) -> None:
        """Read what the shape and the texture start from. A checkpoint's shape needs none of it, nor the mesh that it once started from.

        Raises ValueError for a mesh that cannot be read, or has no colours where they are asked for.
        """
        if self._distance is not None:
            return
        self._distance = initial_distance(self.cfg.shape_init, self.cfg.shape_init_params)
        if self.cfg.texture_init:
            self._colors = surface_colors(self._distance.mesh)
            if self._colors is None:
                mesh = self.cfg.shape_init.removeprefix("mesh:")
                raise ValueError(f"system.geometry.texture_init: found true, but {mesh} has no colours")

    def initialize_shape(self) -> None:
        """Fit the shape to `shape_init`."""
        self.read_initial_shape()
        info(f"Shape: starting from {self.cfg.shape_init}")
        report = self.shape.fit(self._distance, self._grid_on_device(), steps=self.cfg.shape_init_steps, seed=get_seed())
        if report is not None:
            info(f"Shape: {report}")

    def initialize_texture(self, to_color: Callable[[Tensor], Tensor]) -> None:
        self.read_initial_shape()
        super().initialize_texture(to_color)

    def _grid_on_device(self) -> TetrahedralGrid:
        device = next(self.shape.parameters()).device
        if self._grid.vertices.device != device:
            self._grid = self._grid.to(device)
        return self._grid

    # ---------------------------------------------------------------------------------------------------------- the shape

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        if on_load_weights or global_step % self.cfg.refresh_every == 0:
            self.shape.refresh()

    def triangle_mesh(self) -> IsosurfaceMesh:
        """The surface, differentiable in the shape where gradients are on. Raises SurfaceError where there is none."""
        graph = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.shape.parameters())
        if graph and self.training:
            self._read = None
            return self._read_out()
        # Evaluation shows the same shape from many sides.
        state = tuple((id(parameter), parameter._version) for parameter in self.shape.parameters())
        if self._read is None or self._read[0] != state:
            with torch.no_grad():
                self._read = state, self._read_out()
        return self._read[1]

    def _read_out(self) -> IsosurfaceMesh:
        return read_out(self.shape, self._grid_on_device(), self.cfg.radius, deform=self.cfg.deformable)

    def export_mesh(self) -> TriangleMesh:
        """The surface as a plain mesh without a gradient."""
        with torch.no_grad():
            mesh = self._read_out()
        return TriangleMesh(mesh.vertices.detach(), mesh.faces, adjacency=mesh.adjacency)

    def regularizer(self, name: str, mesh: IsosurfaceMesh) -> Tensor:
        """One of REGULARIZERS of a surface that `triangle_mesh` returned, a scalar; see `scene.regularizers`."""
        if name == "normal_consistency":
            return normal_consistency(mesh.vertices, mesh.faces, mesh.adjacency)
        if name == "laplacian":
            return laplacian(mesh.vertices, mesh.faces, mesh.adjacency)
        if name == "eikonal":
            return eikonal(mesh.grid_positions, mesh.sdf, mesh.crossed_tets())
        return sign_entropy(mesh.sdf, mesh.grid.edges)
