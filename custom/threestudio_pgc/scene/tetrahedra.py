"""A regular tetrahedral grid of the cube [-1, 1]^3, with the numbering of edges and faces that marching tetrahedra needs.

The tiling is the body-centred cubic one: a lattice of n^3 cubes with a vertex at every corner and every centre. Where two cubes share
a face, each edge of that face and the two centres make a tetrahedron; at the surface of the grid the pyramid between a face and the
centre below it is cut in two. All 12 n^3 tetrahedra have the same volume, and every inner one is the same shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Corners of a tetrahedron's edges, and of its faces: face k is the one opposite of corner k.
EDGE_CORNERS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
FACE_CORNERS = ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2))

MIN_RESOLUTION = 8
KEY = "geometry.resolution"

FORMAT = "1"  # of a cached file: raised when numbering or contents change
CACHED_FROM = 4_000_000  # tetrahedra. A smaller grid is built in less than 0.3 s, which is not worth a file of 100 MB or more
SLAB = 32_768  # cells numbered at a time: their rows of the tables stay in the core's cache, which makes large grids 2 to 4 times faster
EDGE_COLUMNS, TRIANGLE_COLUMNS = 14, 36  # edges, and triangles, that have one given vertex as their lowest

# A tetrahedron's signed volume is affine in each coordinate of its vertices, so over a box of displacements it is smallest at a corner of
# the box. Half the distance 1/n from a centre to a cube face turns over an inner tetrahedron. A quarter of it would turn over one of those
# that fill the pyramids at the surface, so the vertices there are held. A thousandth is kept for the rounding of float32.
MAX_DISPLACEMENT = 0.5 * 0.999

Point = tuple[int, int, int]  # x, y, z in half cells from the first corner of a cell: even is a corner, odd a centre
Region = list[tuple[int, int]]  # the cells from (inclusive) and to (exclusive), for x, y and z


class GridError(ValueError):
    """A grid of that resolution cannot be had; the message names what was found and what is wanted."""


class GridMemory(NamedTuple):
    """Size of a grid: counts, bytes it holds, and the most bytes at a time while it is built."""

    vertices: int
    tets: int
    edges: int
    faces: int
    resident_bytes: int
    build_bytes: int


@dataclass(frozen=True)
class TetrahedralGrid:
    """Tetrahedra that fill [-1, 1]^3. All tensors lie on one device."""

    resolution: int
    vertices: Tensor  # (N, 3) float32 in [-1, 1]: corners of the cubes, then centres, x fastest
    tets: Tensor  # (T, 4) int32 into vertices; det[v1 - v0, v2 - v0, v3 - v0] > 0
    edges: Tensor  # (E, 2) int32 into vertices, the smaller first, in lexicographic order
    tet_edges: Tensor  # (T, 6) int32 into edges, in the order of EDGE_CORNERS
    tet_faces: Tensor  # (T, 4) int32 in [0, face_count), face k opposite of corner k; two tetrahedra at most have a number
    boundary: Tensor  # (N,) bool: on the surface of the cube
    max_displacement: float  # all but boundary vertices may move by up to this along each axis, at once: no tetrahedron turns over

    @property
    def face_count(self) -> int:
        """Number of different triangles, by Euler's formula for a ball, V - E + F - T = 1."""
        return 1 - len(self.vertices) + len(self.edges) + len(self.tets)

    def to(self, device: str | torch.device) -> TetrahedralGrid:
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: value for field in dataclasses.fields(self) if isinstance(value := getattr(self, field.name), Tensor)}


def default_cache_dir() -> Path:
    """`$PGC_CACHE/grids`, or `.pgc_cache/grids` in the current folder."""
    return Path(os.environ.get("PGC_CACHE") or ".pgc_cache") / "grids"


def make_grid(resolution: int, *, device: str | torch.device = "cpu", cache_dir: Path | None = None) -> TetrahedralGrid:
    """The grid of that resolution, read from the cache or built.

    Args:
        resolution: numbered like the grid files of nvdiffrec and threestudio, 8 or more. 32, 64, 128 and 256 have 26 thousand,
            0.19, 1.6 and 12.7 million tetrahedra.
        cache_dir: where grids of CACHED_FROM tetrahedra and more are kept, default `default_cache_dir()`.

    Warns:
        UserWarning: a cached file is damaged or of another version, and is built again; or the folder cannot be written.

    Raises:
        GridError: resolution is not a whole number of at least 8, or building would take more memory than there is.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < MIN_RESOLUTION:
        raise GridError(f"{KEY}: found {resolution!r}, wanted a whole number of at least {MIN_RESOLUTION}")
    _check_size(resolution)
    if grid_memory(resolution).tets < CACHED_FROM:
        return _build(resolution).to(device)
    path = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / f"tetrahedra-{resolution}.safetensors"
    grid = _read_cache(path, resolution)
    if grid is None:
        grid = _build(resolution)
        _write_cache(path, grid)
    return grid.to(device)


def cells_per_axis(resolution: int) -> int:
    """Cubes along each axis, n, for which 12 n^3 is nearest to the 6 (resolution / 2)^3 tetrahedra of a grid file of that name."""
    return round(resolution * 2 ** (-4 / 3))


def grid_memory(resolution: int) -> GridMemory:
    """Counts and bytes of a grid, from its resolution alone."""
    n = cells_per_axis(resolution)
    corners = (n + 1) ** 3
    vertices, tets, faces = corners + n**3, 12 * n**3, 24 * n**3 + 6 * n**2
    edges = vertices + faces - tets - 1
    resident = vertices * (12 + 1) + tets * 4 * (4 + 6 + 4) + edges * 8
    # The table of triangles is the largest thing that is let go again; vertices are numbered meanwhile.
    return GridMemory(vertices, tets, edges, faces, resident, resident + 4 * (corners * TRIANGLE_COLUMNS + vertices))


def _check_size(resolution: int) -> None:
    available = _available_memory()

    def fits(resolution: int) -> bool:
        size = grid_memory(resolution)
        return size.faces < 2**31 and (available is None or size.build_bytes <= available)

    if fits(resolution):
        return
    largest = MIN_RESOLUTION
    while fits(largest + 1):
        largest += 1
    found = f"{KEY}: found {resolution}, which needs {grid_memory(resolution).build_bytes / 2**30:,.1f} GiB"
    there = "an unknown amount is" if available is None else f"{available / 2**30:,.1f} GiB are"
    raise GridError(f"{found}; {there} available; wanted at most {largest}")


def _available_memory() -> int | None:
    """Bytes that can still be had, or None where that cannot be known."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return None


# -------------------------------------------------------------------------------------------------------------------- build


class _Slab(NamedTuple):
    """Cells that are cut alike."""

    region: Region
    stencils: list[tuple[Point, ...]]  # the tetrahedra of each cell, by their four corners


def _build(resolution: int) -> TetrahedralGrid:
    n = cells_per_axis(resolution)
    corners = np.arange((n + 1) ** 3, dtype=np.int32).reshape(n + 1, n + 1, n + 1)
    centres = np.arange(corners.size, corners.size + n**3, dtype=np.int32).reshape(n, n, n)
    numbers = (corners, centres)
    slabs = list(_slabs(n))

    tets = np.empty((12 * n**3, 4), np.int32)
    for slab, rows in _rows(slabs, tets):
        for i, stencil in enumerate(slab.stencils):
            for k, point in enumerate(stencil):
                rows[..., i, k] = _at(numbers, point, slab.region)

    tet_edges, edges = _number(slabs, numbers, EDGE_CORNERS, ends=True)
    tet_faces, _ = _number(slabs, numbers, FACE_CORNERS)
    vertices, boundary = _vertices(n)
    arrays = (vertices, tets, edges, tet_edges, tet_faces, boundary)
    return TetrahedralGrid(resolution, *map(torch.from_numpy, arrays), max_displacement=MAX_DISPLACEMENT / n)


def _vertices(n: int) -> tuple[np.ndarray, np.ndarray]:
    lines = np.arange(0, 2 * n + 1, 2, dtype=np.float64) / n - 1, np.arange(1, 2 * n, 2, dtype=np.float64) / n - 1
    vertices = np.concatenate([np.stack(np.meshgrid(x, x, x, indexing="ij")[::-1], -1, dtype=np.float32).reshape(-1, 3) for x in lines])
    return vertices, (np.abs(vertices) == 1).any(axis=1)


def _slabs(n: int) -> Iterator[_Slab]:
    """The tiling, in the order of the tetrahedra: a few layers of cells at a time."""
    layers = max(1, SLAB // n**2)
    step = 2 * np.eye(3, dtype=int)
    above = np.ones(3, dtype=int)
    for axis in range(3):
        # the face of a cell that is normal to the axis, counter-clockwise seen from the axis' far end; `above` is the cell's own centre
        along, across = step[(axis + 1) % 3], step[(axis + 2) % 3]
        low = [0 * along, along, along + across, across]
        high = [point + step[axis] for point in low]
        below = above - step[axis]
        for bounds, stencils in (
            ((1, n), [(low[k], low[(k + 1) % 4], below, above) for k in range(4)]),
            ((0, 1), [(low[0], low[1], low[2], above), (low[0], low[2], low[3], above)]),
            ((n - 1, n), [(high[0], high[2], high[1], above), (high[0], high[3], high[2], above)]),
        ):
            points = [tuple(tuple(map(int, point)) for point in stencil) for stencil in stencils]
            region = [(0, n), (0, n), (0, n)]
            region[axis] = bounds
            for first in range(*region[2], layers):
                yield _Slab([*region[:2], (first, min(first + layers, region[2][1]))], points)


def _rows(slabs: list[_Slab], table: np.ndarray) -> Iterator[tuple[_Slab, np.ndarray]]:
    """Each slab with its rows of a per-tetrahedron table, as (z, y, x, stencil, column)."""
    start = 0
    for slab in slabs:
        shape = [stop - first for first, stop in reversed(slab.region)] + [len(slab.stencils)]
        stop = start + int(np.prod(shape))
        yield slab, table[start:stop].reshape(*shape, -1)
        start = stop


def _at(lattices: tuple[np.ndarray, ...], point: Point, region: Region) -> np.ndarray:
    """What the (corner, centre) lattices, indexed (z, y, x), hold at that point of every cell of the region."""
    slices = [slice(first + offset // 2, stop + offset // 2) for offset, (first, stop) in zip(point, region)]
    return lattices[point[0] % 2][tuple(reversed(slices))]


def _order(point: Point) -> tuple[int, ...]:
    """Sorts points as their vertices are numbered."""
    x, y, z = point
    return x % 2, z, y, x


class _Simplex(NamedTuple):
    """An edge or a triangle, by its vertex of the lowest number and where the others lie from there."""

    lowest: Point
    highest: Point
    shape: tuple[Point, ...]


@functools.cache
def _simplex(points: tuple[Point, ...]) -> _Simplex:
    lowest, *others = sorted(points, key=_order)
    return _Simplex(lowest, others[-1], tuple(tuple(b - a for a, b in zip(lowest, point)) for point in others))


def _number(
    slabs: list[_Slab], numbers: tuple[np.ndarray, ...], subsets: tuple[tuple[int, ...], ...], ends: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Number the edges, or the triangles, of all tetrahedra.

    A simplex is known by its lowest vertex (the row of a table) and by its shape (the column). A column is filled where such a simplex
    exists, and counting the filled entries numbers them. Columns stand in the order of the highest vertex, so edges come out sorted.

    Args:
        numbers: vertex numbers on the (corner, centre) lattices.
        subsets: which corners of a tetrahedron make the simplices.
        ends: whether the second result is wanted.
    Returns:
        (T, len(subsets)) int32, the numbers of each tetrahedron's; (E, 2) int32, the lowest and highest vertex of each.
    """
    corners, centres = numbers
    used = {_simplex(tuple(stencil[i] for i in subset)) for slab in slabs for stencil in slab.stencils for subset in subsets}
    shapes = sorted({simplex.shape for simplex in used}, key=lambda shape: [_order(point) for point in shape])
    columns = {shape: column for column, shape in enumerate(shapes)}
    # every triangle has a corner of a cube, and corners come before centres
    rows = corners.size + (centres.size if any(simplex.lowest[0] % 2 for simplex in used) else 0)
    table = np.zeros((rows, len(columns)), np.int32)
    lattices = [table[: corners.size].reshape(*corners.shape, -1)]
    if rows > corners.size:
        lattices.append(table[corners.size :].reshape(*centres.shape, -1))

    for slab in slabs:
        for stencil, subset in itertools.product(slab.stencils, subsets):
            lowest, highest, shape = _simplex(tuple(stencil[i] for i in subset))
            _at(lattices, lowest, slab.region)[..., columns[shape]] = _at(numbers, highest, slab.region)
    exists = table > 0  # vertex 0 is never the highest
    pairs = None
    if ends:
        pairs = np.stack([np.repeat(np.arange(rows, dtype=np.int32), exists.sum(axis=1, dtype=np.int32)), table[exists]], axis=1)
    np.cumsum(exists, dtype=np.int32, out=table.reshape(-1))
    table -= 1
    del exists

    result = np.empty((12 * centres.size, len(subsets)), np.int32)
    for slab, block in _rows(slabs, result):
        for i, stencil in enumerate(slab.stencils):
            for k, subset in enumerate(subsets):
                simplex = _simplex(tuple(stencil[j] for j in subset))
                block[..., i, k] = _at(lattices, simplex.lowest, slab.region)[..., columns[simplex.shape]]
    return result, pairs


# -------------------------------------------------------------------------------------------------------------------- cache


def _read_cache(path: Path, resolution: int) -> TetrahedralGrid | None:
    """The grid of a cached file; None where there is none, or, with a warning, where it cannot be used."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != FORMAT:
                raise ValueError(f"found format {found}, wanted {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        grid = TetrahedralGrid(resolution, **tensors, max_displacement=MAX_DISPLACEMENT / cells_per_axis(resolution))
        _check_tables(grid)
    except Exception as error:  # cut short, overwritten, not ours: building again is always right
        warnings.warn(f"grid cache: {path} cannot be used ({error}); the grid is built again", stacklevel=3)
        return None
    return grid


def _check_tables(grid: TetrahedralGrid) -> None:
    """Raises ValueError unless the tables have the right shapes and point nowhere outside: compiled loops trust them."""
    size = grid_memory(grid.resolution)
    for name, shape, dtype, count in (
        ("vertices", (size.vertices, 3), torch.float32, None),
        ("boundary", (size.vertices,), torch.bool, None),
        ("tets", (size.tets, 4), torch.int32, size.vertices),
        ("edges", (size.edges, 2), torch.int32, size.vertices),
        ("tet_edges", (size.tets, 6), torch.int32, size.edges),
        ("tet_faces", (size.tets, 4), torch.int32, size.faces),
    ):
        table = getattr(grid, name)
        if table.shape != shape or table.dtype != dtype:
            raise ValueError(f"{name}: found {tuple(table.shape)} {table.dtype}, wanted {shape} {dtype}")
        if count is not None and (table.min() < 0 or table.max() >= count):
            raise ValueError(f"{name}: found numbers outside of 0 to {count - 1}")


def _write_cache(path: Path, grid: TetrahedralGrid) -> None:
    from safetensors.torch import save_file

    # Written under another name first: a second process, or a kill, never leaves half a file under the real one.
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        save_file(grid._tensors(), temporary, metadata={"format": FORMAT})
        os.replace(temporary, path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        warnings.warn(f"grid cache: {path.parent} cannot be written ({error}); the next run builds the grid again", stacklevel=3)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
