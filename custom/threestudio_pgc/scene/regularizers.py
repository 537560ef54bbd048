"""Regularisers: of a surface's triangles and of the signed distances on a tetrahedral grid, where a shape moves; of a material's maps.

All are means, so that a weight keeps its meaning when the surface or the grid changes its size, and all are 0, with a gradient of
zeros, where there is nothing to average. Signed distances are negative inside, and zero counts as outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .adjacency import surface_edges


def normal_consistency(vertices: Tensor, faces: Tensor, adjacency: Tensor) -> Tensor:
    """Mean over the edges between two faces of 1 - cos(n_i, n_j), n the faces' normals: 0 on a plane, 2 in a sheet folded onto itself.

    PyTorch3D's regulariser (Ravi et al. 2020), which is the PGC authors' smoothness term. The edges of slivers do not count: the normal
    of a sliver is rounding, and its gradient grows without bound as the sliver gets thinner.

    Args:
        vertices: (V, 3) in any unit.
        faces: (F, 3) integer, counter-clockwise seen from outside.
        adjacency: (F, 3) integer; [f, k] is the face on the other side of the edge from corner k to corner (k + 1) % 3, -1 without one.
    Returns:
        () in [0, 2].
    """
    a, b, c = vertices[faces].unbind(1)
    doubled_area = torch.linalg.cross(b - a, c - a)
    longest = torch.stack([b - a, c - b, a - c]).detach().square().sum(-1).amax(0)
    sliver = doubled_area.detach().norm(dim=-1) <= _flatness(vertices) * longest
    # An edge is seen from both of its faces; the one with the lower number counts it.
    first, corner = (adjacency > torch.arange(len(faces), device=faces.device)[:, None]).nonzero(as_tuple=True)
    second = adjacency[first, corner].long()
    kept = ~(sliver[first] | sliver[second])
    return _mean(1 - F.cosine_similarity(doubled_area[first[kept]], doubled_area[second[kept]], dim=-1, eps=0.0))


def laplacian(vertices: Tensor, faces: Tensor, adjacency: Tensor) -> Tensor:
    """Mean over the surface's vertices of |mean of the neighbours - v|^2, the umbrella operator with uniform weights (Taubin 1995).

    It evens out the triangles as well as the surface, and shrinks: on a closed surface it is 0 only where all has become one point.
    Vertices of no face do not count.

    Args:
        vertices: (V, 3).
        faces: (F, 3) integer.
        adjacency: (F, 3) integer, as in `normal_consistency`.
    Returns:
        (), in the square of the vertices' unit.
    """
    edges, _ = surface_edges(faces, adjacency)
    here, there = torch.cat([edges, edges.flip(1)]).long().unbind(1)
    count = vertices.new_zeros(len(vertices)).index_add(0, here, vertices.new_ones(len(here)))
    # Summed as differences: a mean of positions far from the origin would lose their digits.
    total = torch.zeros_like(vertices).index_add(0, here, vertices[there] - vertices[here])
    used = count > 0
    return _mean((total[used] / count[used, None]).square().sum(-1))


def eikonal(vertices: Tensor, sdf: Tensor, tets: Tensor) -> Tensor:
    """Mean over the tetrahedra of (|grad s| - 1)^2 (Gropp et al. 2020, eq. 2), s interpolated linearly between the corners.

    The gradient of a linear function is exact: with the edge vectors e_k = p_k - p_0 and d_k = s_k - s_0,
    grad s = (d_1 e_2 x e_3 + d_2 e_3 x e_1 + d_3 e_1 x e_2) / (e_1 . (e_2 x e_3)). All tetrahedra weigh the same; flat ones do not count.

    Args:
        vertices: (N, 3).
        sdf: (N,) in the vertices' unit.
        tets: (M, 4) integer: all of a grid, or those near the surface.
    Returns:
        (), without unit.
    """
    origin, *ends = vertices[tets].unbind(1)
    first, *values = sdf[tets].unbind(1)
    e1, e2, e3 = (end - origin for end in ends)
    d1, d2, d3 = ((value - first)[:, None] for value in values)
    normal = torch.linalg.cross(e2, e3)
    volume = (e1 * normal).sum(-1, keepdim=True)  # six times, with a sign
    rise = d1 * normal + d2 * torch.linalg.cross(e3, e1) + d3 * torch.linalg.cross(e1, e2)
    longest = torch.stack([e1, e2, e3, e2 - e1, e3 - e2, e1 - e3]).detach().square().sum(-1).amax(0)
    solid = volume.detach()[:, 0].abs() > _flatness(vertices) * longest**1.5
    return _mean(((rise[solid] / volume[solid]).norm(dim=-1) - 1).square())


def sign_entropy(sdf: Tensor, edges: Tensor) -> Tensor:
    """Mean over the edges that cross the surface of BCE(sigmoid(s_i), sign s_j) + BCE(sigmoid(s_j), sign s_i).

    Munkberg et al. 2022, eq. 2: each end is pulled over to the other's side, which makes floaters and cavities shrink. Exchanging inside
    and outside changes nothing. The sigmoid reads s as a number of order 1: signed distances within a cube of half side 1 stay where it is
    nearly straight, and every crossing then pulls with about the same force, 1/2 per end. For a sharper choice give a multiple of s.

    Args:
        sdf: (N,).
        edges: (E, 2) integer, each edge once.
    Returns:
        (); 2 log 2 where both ends are about 0.
    """
    outside = sdf.detach() >= 0
    edges = edges[outside[edges[:, 0]] != outside[edges[:, 1]]]
    targets = outside[edges.flip(1)].to(sdf.dtype)
    return _mean(F.binary_cross_entropy_with_logits(sdf[edges], targets, reduction="none").sum(-1))


def smoothness(values: Tensor, nearby: Tensor) -> Tensor:
    """Mean |m(x) - m(x + d)| of a material's maps m over points x and small random steps d, nvdiffrec's regulariser of its textures.

    Args:
        values, nearby: (N, C) the maps at the points, and near each of them. Both get the gradient.
    """
    return _mean((values - nearby).abs().mean(-1))


def _mean(values: Tensor) -> Tensor:
    """() mean of (N,); 0, still part of the graph, for N = 0."""
    return values.sum() / max(len(values), 1)


def _flatness(vertices: Tensor) -> float:
    """Height by length below which a triangle or tetrahedron counts as flat: half of the digits of what is derived from it are rounding."""
    return torch.finfo(vertices.dtype).eps ** 0.5
