"""Which triangles of a mesh touch along an edge."""

from __future__ import annotations

import torch
from torch import Tensor


def face_adjacency(faces: Tensor) -> Tensor:
    """Neighbour of every triangle across each of its edges.

    Args:
        faces: (F, 3) integer vertex indices. Positions must be shared: along a seam of duplicated vertices nothing touches.

    Returns:
        (F, 3) int32 on the same device: [f, k] is the triangle on the other side of the edge from corner k to corner (k + 1) % 3, in
        whichever direction it runs along it; -1 where there is none (an open edge) or more than one (a non-manifold edge), and at an edge
        that joins a vertex to itself.
    """
    adjacency = torch.full((faces.shape[0] * 3,), -1, dtype=torch.int32, device=faces.device)
    if len(faces) == 0:
        return adjacency.reshape(-1, 3)
    start, end = faces.long(), faces.long().roll(-1, dims=1)
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    key, half_edge = torch.sort((low * (high.max() + 1) + high).reshape(-1))
    face = half_edge.div(3, rounding_mode="floor")
    repeats = key[1:] == key[:-1]  # [i]: half-edges i and i + 1 lie on one edge
    alone = repeats.new_ones(1)
    pair = repeats & torch.cat([alone, ~repeats[:-1]]) & torch.cat([~repeats[1:], alone])
    pair &= face[1:] != face[:-1]  # a triangle that names a vertex twice meets itself
    pair &= (low != high).reshape(-1)[half_edge[1:]]
    first = pair.nonzero().squeeze(-1)
    adjacency[half_edge[first]] = face[first + 1].int()
    adjacency[half_edge[first + 1]] = face[first].int()
    return adjacency.reshape(-1, 3)


def surface_edges(faces: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
    """Edges of a mesh, each once (a non-manifold edge once for every triangle that has it).

    Args:
        faces: (F, 3) integer vertex indices.
        adjacency: (F, 3) of `face_adjacency`.

    Returns:
        The edges' vertices (E, 2), in the direction of their first triangle; and their triangles (E, 2), the second -1 where there is
        none. Both in the type of `faces`.
    """
    face, corner = ((adjacency < 0) | (adjacency > torch.arange(len(faces), device=faces.device)[:, None])).nonzero(as_tuple=True)
    edges = torch.stack([faces[face, corner], faces[face, (corner + 1) % 3]], dim=-1)
    return edges, torch.stack([face.to(faces.dtype), adjacency[face, corner].to(faces.dtype)], dim=-1)
