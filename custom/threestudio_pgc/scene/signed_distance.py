"""Signed distances of the shapes that a field starts from: sphere, ellipsoid, any mesh. Negative inside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .fields import evaluate_in_chunks
from .mesh import MeshError, TriangleMesh, load_mesh, normalize, sample_surface

Progress = Callable[[int, int], None]  # called with the points done and the points in all

CHUNK = 2**17  # each builds the tree of the mesh again: a second for a million faces
DEFAULT_RADIUS = 0.5
DEFAULT_EXTENT = 0.8
SIZE_RANGE = (0.1, 0.95)  # of extents, and of radii: smaller ones slip between the grid's vertices, larger ones leave the cube

# Where a mesh is examined: distances from the surface, in units of half its extent. Two of them, for thin walls and for coarse faces.
PROBE_OFFSETS = (1e-2, 1e-3)
PROBE_POINTS = 2000
WINDING_TOLERANCE = 0.05  # the fast winding number errs by up to 0.003
GUESS_TOLERANCE = 0.25  # a winding number farther than this from an integer is a guess


class SignedDistance(Protocol):
    """What a field can be fitted to."""

    def __call__(self, points: Tensor, *, progress: Progress | None = None) -> Tensor:
        """(N, 3) points -> (N,) float32 on the points' device: distance to the surface, negative inside."""

    def surface_points(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3) float32 points on the surface, on the CPU as `generator` is."""


class SphereDistance:
    """|x| - radius, around the origin."""

    def __init__(self, radius: float = DEFAULT_RADIUS):
        self.radius = radius

    def __call__(self, points: Tensor, *, progress: Progress | None = None) -> Tensor:
        return points.float().norm(dim=-1) - self.radius

    def surface_points(self, count: int, generator: torch.Generator) -> Tensor:
        return _unit_vectors(count, generator) * self.radius


class EllipsoidDistance:
    """The exact distance to an ellipsoid around the origin, axes along the coordinates'.

    The closest point to p is x_i = r_i^2 p_i / (t + r_i^2), where t is the largest root of sum_i (r_i p_i / (t + r_i^2))^2 = 1
    (Eberly: "Distance from a Point to an Ellipse, an Ellipsoid, or a Hyperellipsoid", 2013). It is bisected in float64, to about 1e-8.
    """

    BISECTIONS = 64

    def __init__(self, radii: Sequence[float]):
        self.radii = torch.tensor(radii, dtype=torch.float64)

    def __call__(self, points: Tensor, *, progress: Progress | None = None) -> Tensor:
        return evaluate_in_chunks(self._evaluate, points, chunk=CHUNK, progress=progress)

    def _evaluate(self, points: Tensor) -> Tensor:
        radii = self.radii.to(points.device)
        shortest = radii.min()
        # By symmetry in one octant. Off its walls by a hair, where the closest point would be 0 / 0.
        points = points.double().abs().clamp(min=1e-9 * float(shortest))
        scaled, beyond = radii * points, radii.square() - shortest.square()
        # s = t + shortest^2 is positive, so that no digits cancel where the root lies next to the pole t = -shortest^2
        low = scaled[:, radii.argmin()]
        high = scaled.norm(dim=-1)
        for _ in range(self.BISECTIONS):
            middle = (low + high) / 2
            outward = (scaled / (middle[:, None] + beyond)).square().sum(dim=-1) > 1
            low, high = torch.where(outward, middle, low), torch.where(outward, high, middle)
        closest = radii * scaled / ((low + high)[:, None] / 2 + beyond)
        inside = (points / radii).square().sum(dim=-1) < 1
        distances = (points - closest).norm(dim=-1)
        return torch.where(inside, -distances, distances).float()

    def surface_points(self, count: int, generator: torch.Generator) -> Tensor:
        """Points that lie denser where the surface is curved more."""
        return _unit_vectors(count, generator) * self.radii.float()


class MeshDistance:
    """Distance to the nearest triangle; inside is where the mesh winds around the point.

    A point is inside where the generalised winding number w (Jacobson, Kavan, Sorkine-Hornung: "Robust Inside-Outside Segmentation using
    Generalized Winding Numbers", SIGGRAPH 2013; its fast form by Barill et al., SIGGRAPH 2018) has |w| > 1/2. Holes are closed by that as
    well as they can be, parts that overlap count once, and a mesh that was turned inside out has an inside all the same.

    Attributes:
        mesh: as given.
        notes: what is wrong with it and what was made of that, in words; each is a warning, too.

    Raises:
        MeshError: no faces; nothing is inside: a flat open sheet, or one with faces on both sides.
    """

    def __init__(self, mesh: TriangleMesh):
        if not len(mesh.faces):
            raise MeshError(f"{mesh.source_path or 'mesh'}: has no faces; want a body, closed or nearly so")
        self.mesh = mesh
        self._vertices = mesh.vertices.detach().cpu().numpy().astype(np.float64)
        self._faces = np.ascontiguousarray(mesh.faces.cpu().numpy(), np.int64)
        self.notes = self._examine()
        for note in self.notes:
            warnings.warn(note, stacklevel=2)

    def __call__(self, points: Tensor, *, progress: Progress | None = None) -> Tensor:
        import igl

        def evaluate(chunk: Tensor) -> Tensor:
            if not len(chunk):
                return chunk.new_zeros(0, dtype=torch.float32)
            queries = np.ascontiguousarray(chunk.detach().cpu().numpy(), np.float64)
            distances = np.sqrt(igl.point_mesh_squared_distance(queries, self._vertices, self._faces)[0])
            signed = np.where(np.abs(self._winding(queries)) > 0.5, -distances, distances)
            return torch.from_numpy(signed.astype(np.float32)).to(chunk.device)

        return evaluate_in_chunks(evaluate, points, chunk=CHUNK, progress=progress)

    def surface_points(self, count: int, generator: torch.Generator) -> Tensor:
        return sample_surface(self.mesh, count, generator)[0].cpu()

    def _winding(self, queries: np.ndarray) -> np.ndarray:
        import igl

        # libigl 2.6 has another name for it. threestudio itself imports the older one, so both are out there.
        winding_number = getattr(igl, "fast_winding_number", None) or igl.fast_winding_number_for_meshes
        return winding_number(self._vertices, self._faces, queries)

    def _examine(self) -> list[str]:
        name = str(self.mesh.source_path or "mesh")
        winding = self._winding(self._probe())
        if np.abs(winding).max() <= 0.5 + WINDING_TOLERANCE:
            raise MeshError(
                f"{name}: encloses nothing (winding number {winding.min():.2f} to {winding.max():.2f} around the surface, where one beyond "
                f"0.5 is inside): it is an open sheet, or has faces on both sides; want a body, closed or nearly so"
            )
        notes = []
        open_share = self._open_edges()
        if open_share > 0:
            guessed = np.mean(np.abs(winding - np.rint(winding)) > GUESS_TOLERANCE)
            notes.append(
                f"{name}: not watertight: {_percent(open_share)} of the edges lack a neighbour that is wound alike (holes, or faces turned "
                f"over); inside and outside were told apart by the winding number, which is a guess at {_percent(guessed)} of the points "
                f"next to the surface"
            )
        inward = np.mean(winding[np.abs(winding) > 0.5 + WINDING_TOLERANCE] < 0)
        if inward > 0.5:
            notes.append(f"{name}: inside-out: its faces look inward; it was turned over")
        elif inward > 0:
            notes.append(
                f"{name}: partly inside-out: {_percent(inward)} of the inside is behind faces that look inward; it counts as inside"
            )
        overlap = np.mean(np.abs(winding) > 1.5)
        if overlap > 0:
            notes.append(
                f"{name}: intersects itself or has parts within parts: {_percent(overlap)} of the points next to the surface are inside "
                f"twice or more; they count as inside"
            )
        return notes

    def _probe(self) -> np.ndarray:
        """(P, 3) points on both sides of the surface."""
        points, faces, _ = sample_surface(self.mesh, PROBE_POINTS, torch.Generator().manual_seed(0))
        half = float(np.ptp(self._vertices, axis=0).max()) / 2
        points, normals = points.cpu().double().numpy(), self.mesh.face_normals()[faces].detach().cpu().double().numpy()
        return np.concatenate([points + side * offset * half * normals for offset in PROBE_OFFSETS for side in (-1, 1)])

    def _open_edges(self) -> float:
        """Share of the faces' sides that do not meet one which runs the other way."""
        start, end = self._faces, np.roll(self._faces, -1, axis=1)
        keys = np.minimum(start, end) * len(self._vertices) + np.maximum(start, end)
        _, edges = np.unique(keys, return_inverse=True)
        unpaired = np.abs(np.bincount(edges.ravel(), weights=np.where(start < end, 1, -1).ravel()))
        return float(unpaired.sum() / start.size)


def initial_distance(shape: str, params: Any = None, *, up: str | None = None) -> SphereDistance | EllipsoidDistance | MeshDistance:
    """The shape that a run starts from, inside the cube [-1, 1]^3, as `geometry.shape_init` and `shape_init_params` spell it.

    Args:
        shape: "sphere", "ellipsoid", "mesh:PATH" or "mesh:builtin:NAME". A mesh is centred and scaled, never mirrored.
        params: of a sphere its radius (default 0.5); of an ellipsoid [rx, ry, rz]; of a mesh its extent, max |coordinate| (default 0.8).
            All within 0.1 to 0.95.
        up: of a mesh, see `load_mesh`.

    Raises:
        ValueError: unknown shape or a size out of range, naming the key. MeshError is one, too: see `load_mesh` and `MeshDistance`.
    """
    shape = str(shape)
    if shape == "sphere":
        return SphereDistance(_size(params, DEFAULT_RADIUS, "the radius of the sphere"))
    if shape == "ellipsoid":
        if not isinstance(params, Sequence) or isinstance(params, str) or len(params) != 3:
            raise ValueError(f"geometry.shape_init_params: found {params!r}, wanted the three radii of the ellipsoid, [rx, ry, rz]")
        return EllipsoidDistance([_size(radius, None, "each radius of the ellipsoid") for radius in params])
    path = shape.removeprefix("mesh:")
    if path == shape or not path:
        raise ValueError(f"geometry.shape_init: found {shape!r}, wanted sphere, ellipsoid, mesh:PATH or mesh:builtin:NAME")
    extent = _size(params, DEFAULT_EXTENT, "the extent of the mesh")
    try:
        return MeshDistance(normalize(load_mesh(path, up=up), extent))
    except MeshError as error:
        raise MeshError(f"geometry.shape_init: {error}") from error


def _size(value: Any, default: float | None, what: str) -> float:
    low, high = SIZE_RANGE
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"geometry.shape_init_params: found {value!r}, wanted {what}, a number from {low} to {high}")
    return float(value)


def _unit_vectors(count: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "less than 0.1 %"
