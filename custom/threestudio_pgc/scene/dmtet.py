"""Shapes that move: signed distances and bounded deformations on a tetrahedral grid (DMTet, Shen et al. 2021), read out as a mesh.

Two representations give every grid vertex its distance (negative inside) and its deformation: `VertexShape` stores them, `FieldShape`
computes them by a hash grid and an MLP, as the paper and Fantasia3D do, in a narrow band around the surface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .fields import FieldConfig, HashGridField, evaluate_in_chunks
from .initial import FitReport, fit_sdf
from .marching_tetrahedra import close_at_boundary, marching_tetrahedra
from .mesh import TriangleMesh
from .tetrahedra import TetrahedralGrid

REPRESENTATIONS = ("field", "values")

# Share of the grid's own bound that a vertex may use. At the bound itself tetrahedra become flat.
DEFORMATION_SHARE = 0.9


@dataclass
class IsosurfaceMesh(TriangleMesh):
    """A mesh with what it was read out of."""

    sdf: Tensor | None = None  # (N,) signed distances at the grid's vertices
    grid_positions: Tensor | None = None  # (N, 3) where the grid's vertices are
    grid: TetrahedralGrid | None = None

    def crossed_tets(self) -> Tensor:
        """(M, 4) int64: tetrahedra that the surface goes through."""
        inside = self.sdf < 0
        tets = self.grid.tets.long()
        count = inside[tets].sum(dim=1)
        return tets[(count > 0) & (count < 4)]


class VertexShape(nn.Module):
    """A signed distance (N,) and a raw deformation (N, 3) of each grid vertex, as parameters."""

    def __init__(self, grid: TetrahedralGrid, radius: float = 1.0):
        super().__init__()
        self.radius = radius
        self.sdf = nn.Parameter(torch.ones(len(grid.vertices)))
        self.deformation = nn.Parameter(torch.zeros(len(grid.vertices), 3))

    def forward(self, grid: TetrahedralGrid) -> tuple[Tensor, Tensor]:
        return self.sdf, self.deformation

    def refresh(self) -> None:
        """Nothing is kept between steps."""

    @torch.no_grad()
    def fit(self, distance: Callable[[Tensor], Tensor], grid: TetrahedralGrid, **options) -> None:
        """Set the distances exactly. `options` are `fit_sdf`'s, of no use here."""
        self.sdf.copy_(distance(grid.vertices * self.radius))
        self.deformation.zero_()


class FieldShape(HashGridField):
    """Signed distance and raw deformation as a function of the point: hash grid and MLP with four outputs.

    While training, the field is evaluated with gradients in a narrow band only: the vertices of edges that the surface crosses, and
    `rings` rings of neighbours. All others keep the value of their last evaluation, which matters by its sign alone. The band follows the
    surface from step to step, as long as it moves by less than `rings` edges a step; what comes up elsewhere is seen at the next
    `refresh`, which evaluates all vertices. Outside of training every call evaluates all.
    """

    def __init__(self, config: FieldConfig, rings: int = 2):
        if config.n_output != 4:
            raise ValueError(f"shape field n_output: found {config.n_output}, wanted 4: a distance and a deformation")
        if not 1 <= rings <= 100:
            raise ValueError(f"shape field rings: found {rings}, wanted 1 to 100")
        super().__init__(config)
        self.rings = rings
        self._known: Tensor | None = None  # (N, 4) last values, without a gradient

    def refresh(self) -> None:
        """Make the next evaluation a full one."""
        self._known = None

    def forward(self, points: Tensor | TetrahedralGrid) -> Tensor | tuple[Tensor, Tensor]:
        """Points (N, 3) -> (N, 4); a grid -> distances (N,) and raw deformations (N, 3) at its vertices."""
        if isinstance(points, Tensor):
            return super().forward(points)
        vertices = points.vertices * self.config.bound
        if not (self.training and torch.is_grad_enabled()):
            values = evaluate_in_chunks(super().forward, vertices)
            return values[:, 0], values[:, 1:]
        if self._known is None or len(self._known) != len(vertices):
            self._known = evaluate_in_chunks(super().forward, vertices)
        band = band_vertices(self._known[:, 0], points.edges, self.rings)
        fresh = super().forward(vertices[band])
        values = self._known.index_copy(0, band, fresh)
        self._known = values.detach()
        return values[:, 0], values[:, 1:]

    def fit(self, distance: Callable[[Tensor], Tensor], grid: TetrahedralGrid, **options) -> FitReport:
        """Train towards the distances with `fit_sdf`, which see for `options`."""
        self.refresh()
        return fit_sdf(self, distance, bound=self.config.bound, **options)


def band_vertices(sdf: Tensor, edges: Tensor, rings: int) -> Tensor:
    """(M,) int64 vertices, ascending: the ends of edges (E, 2) between which sdf (N,) changes sign, and `rings` rings of neighbours."""
    if not sdf.is_cpu:
        return band_vertices_torch(sdf, edges, rings)
    from .marching_kernels import mark_band

    marked = torch.zeros(len(sdf), dtype=torch.uint8)
    mark_band((sdf < 0).numpy(), edges.numpy(), rings, marked.numpy())
    return marked.nonzero().squeeze(1)


def band_vertices_torch(sdf: Tensor, edges: Tensor, rings: int) -> Tensor:
    """The plain twin of `band_vertices`, on any device."""
    first, second = edges.long().unbind(1)
    inside = sdf < 0
    touched = inside[first] != inside[second]
    marked = torch.zeros(len(sdf), dtype=torch.bool, device=sdf.device)
    for _ in range(rings + 1):
        marked[first[touched]] = True
        marked[second[touched]] = True
        touched = marked[first] | marked[second]
    return marked.nonzero().squeeze(1)


def read_out(shape: VertexShape | FieldShape, grid: TetrahedralGrid, radius: float = 1.0, *, deform: bool = True) -> IsosurfaceMesh:
    """The surface where the distance is zero, closed also where the shape reaches the end of the grid; differentiable.

    grid: of [-1, 1]^3, scaled here to [-radius, radius]^3.

    Raises SurfaceError where there is none or a distance is not finite; see `marching_tetrahedra`.
    """
    # in half precision a surface would move by steps of a thousandth of the object
    with torch.autocast(grid.vertices.device.type, enabled=False):
        return _read_out(shape, grid, radius, deform)


def _read_out(shape: VertexShape | FieldShape, grid: TetrahedralGrid, radius: float, deform: bool) -> IsosurfaceMesh:
    sdf, deformation = shape(grid)
    positions = grid.vertices
    if deform:
        reach = grid.max_displacement * DEFORMATION_SHARE
        positions = positions + torch.where(grid.boundary[:, None], 0.0, reach * torch.tanh(deformation))
    positions = positions * radius
    # a cell's thousandth: enough to close the surface, too little to be seen
    sdf = close_at_boundary(sdf, grid, 1e-3 * radius * grid.max_displacement)
    found = marching_tetrahedra(positions, sdf, grid)
    return IsosurfaceMesh(found.vertices, found.faces, adjacency=found.adjacency, sdf=sdf, grid_positions=positions, grid=grid)
