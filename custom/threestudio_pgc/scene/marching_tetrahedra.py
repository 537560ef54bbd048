"""Marching tetrahedra: the triangle mesh of a signed distance field's zero level, differentiable in the field and in the grid.

Doi and Koide 1991; as a differentiable layer Shen et al. 2021, "Deep Marching Tetrahedra", section 3.2. The usual implementations find
the shared vertices by `torch.unique` over the edges of all crossed tetrahedra, which takes 80 to 90 % of their time. The grid numbers
its edges and faces once instead, so that vertices and neighbours are found by counting.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .tetrahedra import EDGE_CORNERS, TetrahedralGrid

BACKENDS = ("auto", "torch", "numba")


class SurfaceError(ValueError):
    """The signed distance has no surface that could be read out."""


class EmptySurfaceError(SurfaceError):
    """It has the same sign everywhere."""


@dataclass
class Isosurface:
    """Triangles, counter-clockwise seen from outside (where the signed distance is positive)."""

    vertices: Tensor  # (V, 3), differentiable
    faces: Tensor  # (F, 3) int64 into vertices
    adjacency: Tensor  # (F, 3) int32: the triangle across the edge from corner k to corner (k + 1) % 3, -1 at the cube's surface


def marching_tetrahedra(vertices: Tensor, sdf: Tensor, grid: TetrahedralGrid, *, backend: str = "auto") -> Isosurface:
    """The surface where a signed distance field is zero.

    On a crossed edge (a, b) lies the vertex (p_a s_b - p_b s_a) / (s_b - s_a). Vertices stand in the order of `grid.edges`; triangles of
    tetrahedra with one triangle come first, then those of tetrahedra with two. Where the signed distance is exactly zero at a grid
    vertex several surface vertices coincide and triangles without area arise; the surface stays closed.

    Args:
        vertices: (N, 3) positions of the grid's vertices, moved or not; differentiable.
        sdf: (N,) signed distance, negative inside; zero counts as outside; differentiable.
        grid: where the N vertices are joined, on the same device.
        backend: "numba" (CPU only), "torch" (any device), or "auto": numba on a CPU, else torch. Their results are equal bit by bit.

    Returns:
        Isosurface in the wider of the two dtypes. It is open only where it meets the surface of the cube: see `close_at_boundary`.

    Raises:
        ValueError: shapes or devices do not fit; unknown or unfit backend.
        SurfaceError: sdf that is not finite, with the count.
        EmptySurfaceError: sdf with the same sign everywhere.
    """
    if vertices.shape != grid.vertices.shape or sdf.shape != grid.vertices.shape[:1]:
        count = len(grid.vertices)
        raise ValueError(f"vertices, sdf: found {tuple(vertices.shape)} and {tuple(sdf.shape)}, wanted ({count}, 3) and ({count},)")
    devices = [vertices.device, sdf.device, grid.tets.device]
    if len(set(devices)) > 1:
        raise ValueError(f"vertices, sdf, grid: found devices {', '.join(map(str, devices))}, wanted one")
    if backend not in BACKENDS:
        raise ValueError(f"backend: found {backend!r}, wanted one of {', '.join(BACKENDS)}")
    if backend == "numba" and not sdf.is_cpu:
        raise ValueError(f"backend: found 'numba' for tensors on {sdf.device}, wanted 'auto' or 'torch'")
    _check_values(sdf.detach())

    inside = sdf.detach() < 0
    extract = _extract_torch if backend == "torch" or not sdf.is_cpu else _extract_numba
    crossed, faces, adjacency = extract(inside, grid)

    ends = grid.edges.index_select(0, crossed).view(-1)
    points = vertices.index_select(0, ends).view(-1, 2, 3)
    values = sdf.index_select(0, ends).view(-1, 2).to(torch.promote_types(vertices.dtype, sdf.dtype))
    # As a weight between 0 and 1 the division keeps the vertex on its edge even for values that are denormal or overflow when subtracted.
    weight = values[:, 1:] / (values[:, 1:] - values[:, :1])
    points = points[:, 0] * weight + points[:, 1] * (1 - weight)
    return Isosurface(points, faces, adjacency)


def close_at_boundary(sdf: Tensor, grid: TetrahedralGrid, margin: float) -> Tensor:
    """The signed distance with values of at least `margin` on the surface of the cube, so that a shape that reaches it is closed there.

    Args:
        sdf: (N,)
        margin: a positive distance; how far inside of the cube's surface a cut shape ends.
    Returns:
        (N,), differentiable wherever a value was not raised.
    """
    if not margin > 0:
        raise ValueError(f"margin: found {margin}, wanted a positive number")
    return torch.where(grid.boundary, sdf.clamp(min=margin), sdf)


def marching_tetrahedra_reference(vertices: Tensor, sdf: Tensor, tets: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin, which needs no edge table: the same vertices (V, 3) and faces (F, 3) in the same order.

    Args:
        vertices: (N, 3); sdf: (N,); tets: (T, 4), of positive volume.
    """
    inside = sdf.detach() < 0
    corners = inside[tets.long()]
    crossing = corners.any(dim=1) & ~corners.all(dim=1)
    tets, corners = tets[crossing].long(), corners[crossing]
    ends = tets[:, torch.tensor(EDGE_CORNERS, device=tets.device)].sort(dim=-1).values
    edges, number = torch.unique(ends.view(-1, 2), dim=0, return_inverse=True)
    a, b = edges.unbind(1)
    crossed = inside[a] != inside[b]
    number = (crossed.cumsum(0) - 1)[number].view(-1, 6)
    a, b = a[crossed], b[crossed]
    weight = (sdf[b] / (sdf[b] - sdf[a])).unsqueeze(1)
    points = vertices[a] * weight + vertices[b] * (1 - weight)

    case = (corners * torch.tensor([1, 2, 4, 8], device=tets.device)).sum(dim=1)
    polygons = number.gather(1, _POLYGONS.to(tets.device)[case])
    single = corners.sum(dim=1) != 2
    triangles, quads = polygons[single, :3], polygons[~single]
    return points, torch.cat([triangles, quads[:, [0, 1, 2, 0, 2, 3]].view(-1, 3)])


def _check_values(sdf: Tensor) -> None:
    low, high = (value.item() for value in sdf.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~torch.isfinite(sdf)).sum())
        raise SurfaceError(f"sdf: found {bad} of {len(sdf)} values that are not finite, wanted none")
    if low < 0 <= high:
        return
    sign, side = ("negative", "outside") if low < 0 else ("positive" if low > 0 else "positive or zero", "inside")
    raise EmptySurfaceError(
        f"sdf: found it {sign} everywhere (nothing is {side}), from {low:.4g} to {high:.4g}; wanted both signs. Lower the learning rate of "
        "the shape or the weights of its regularisers, or start from a shape that lies well within the cube [-1, 1]^3"
    )


# ------------------------------------------------------------------------------------------------------------------- tables


def _cases() -> tuple[list[list[int]], list[list[int]]]:
    """How a surface cuts a tetrahedron of positive volume, for each set of corners that are inside (bit k: corner k).

    Returns:
        polygons: the crossed edges, counter-clockwise seen from outside, three (padded by a repetition) or four. A quad is cut into
            its corners 0 1 2 and 0 2 3.
        sides: the tetrahedron's face that holds the polygon's side from vertex k to the next.
    """
    points = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    polygons, sides = [[0] * 4], [[0] * 4]
    for case in range(1, 15):
        within = [k for k in range(4) if case >> k & 1]
        without = [k for k in range(4) if k not in within]
        ends = list(itertools.product(within, without))
        if len(ends) == 4:
            ends[2:] = ends[:1:-1]  # around the quad, not across it
        middles = [points[list(pair)].mean(axis=0) for pair in ends]
        normal = np.cross(middles[1] - middles[0], middles[2] - middles[0])
        if normal @ (points[without].mean(axis=0) - points[within].mean(axis=0)) < 0:
            ends.reverse()
        ring = [EDGE_CORNERS.index(tuple(sorted(pair))) for pair in ends]
        # two edges in one face have three corners between them; the face is named after the fourth
        across = [6 - sum({*pair, *following}) for pair, following in zip(ends, [*ends[1:], ends[0]])]
        polygons.append((ring + ring[:1])[:4])
        sides.append((across + across[:1])[:4])
    return [*polygons, [0] * 4], [*sides, [0] * 4]


_POLYGONS, _SIDES = (torch.tensor(table) for table in _cases())


# ----------------------------------------------------------------------------------------------------------------- backends


def _extract_torch(inside: Tensor, grid: TetrahedralGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the crossed edges (V,) in ascending order, faces (F, 3) int64, adjacency (F, 3) int32."""
    device = inside.device
    # the four corners' flags read as one number: quicker than adding them, and equal in all tetrahedra that are not crossed
    flags = inside.view(torch.uint8).index_select(0, grid.tets.view(-1)).view(-1, 4)
    words = flags.view(torch.int32).view(-1)
    crossing = ((words != 0) & (words != 0x01010101)).nonzero().view(-1)
    case = (flags[crossing] * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=device)).sum(dim=1)
    single = flags[crossing].sum(dim=1) != 2
    crossing = torch.cat([crossing[single], crossing[~single]])
    case = torch.cat([case[single], case[~single]])
    singles = int(single.sum())

    cut = grid.tet_edges.index_select(0, crossing).gather(1, _POLYGONS.to(device)[case]).long()
    is_crossed = torch.zeros(len(grid.edges), dtype=torch.bool, device=device)
    is_crossed[cut.view(-1)] = True
    crossed = is_crossed.nonzero().view(-1)
    number = torch.empty(len(grid.edges), dtype=torch.int64, device=device)
    number[crossed] = torch.arange(len(crossed), device=device)
    polygons = number[cut]
    faces = torch.cat([polygons[:singles, :3], polygons[singles:, [0, 1, 2, 0, 2, 3]].view(-1, 3)])

    # Each side of a polygon lies in a face of the grid, which one other polygon at most shares: whoever is written last is found by
    # both, and then the first writes itself.
    held = grid.tet_faces.index_select(0, crossing).gather(1, _SIDES.to(device)[case]).long()
    held = torch.cat([held[:singles, :3].reshape(-1), held[singles:].reshape(-1)])
    first = torch.arange(len(faces), device=device, dtype=torch.int32)
    owner = torch.cat([first[:singles].repeat_interleave(3), first[singles:].repeat_interleave(2)])
    latest = torch.empty(grid.face_count, dtype=torch.int32, device=device)
    latest[held] = owner
    neighbour = latest[held]
    early = neighbour != owner
    latest[held[early]] = owner[early]
    other = latest[held]
    neighbour = torch.where(early, neighbour, torch.where(other != owner, other, -1))

    adjacency = torch.empty(len(faces), 3, dtype=torch.int32, device=device)
    adjacency[:singles] = neighbour[: 3 * singles].view(-1, 3)
    quads, sides = first[singles:].view(-1, 2), neighbour[3 * singles :].view(-1, 4)
    adjacency[singles::2] = torch.stack([sides[:, 0], sides[:, 1], quads[:, 1]], dim=1)
    adjacency[singles + 1 :: 2] = torch.stack([quads[:, 0], sides[:, 2], sides[:, 3]], dim=1)
    return crossed, faces, adjacency


def _extract_numba(inside: Tensor, grid: TetrahedralGrid) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `_extract_torch`, by compiled loops."""
    from .marching_kernels import extract_faces, find_crossings, number_edges

    # compiled code need not look for negative indices if they are unsigned, which halves the time of the longest loop
    tets, tet_edges, tet_faces = (table.numpy().view(np.uint32) for table in (grid.tets, grid.tet_edges, grid.tet_faces))
    polygons, sides = _POLYGONS.numpy(), _SIDES.numpy()
    flags = inside.numpy().view(np.uint8)
    # arrays of the grid's size are left uninitialised, so that only what is used of them takes memory
    singles, doubles = np.empty(len(tets), np.uint32), np.empty(len(tets), np.uint32)
    single_count, double_count = find_crossings(flags, tets, singles, doubles)
    singles, doubles = singles[:single_count], doubles[:double_count]
    # eight flags are skipped at a time
    is_crossed = np.zeros((len(grid.edges) + 7) // 8 * 8, np.uint8)
    number = np.empty(len(grid.edges), np.int32)
    crossed = number_edges(flags, tets, tet_edges, polygons, singles, doubles, is_crossed, is_crossed.view(np.uint64), number)
    faces = np.empty((single_count + 2 * double_count, 3), np.int64)
    adjacency = np.full((len(faces), 3), -1, np.int32)
    latest = np.empty(grid.face_count, np.int32)
    extract_faces(flags, tets, tet_edges, tet_faces, polygons, sides, singles, doubles, number, latest, faces, adjacency)
    return torch.from_numpy(crossed), torch.from_numpy(faces), torch.from_numpy(adjacency)
