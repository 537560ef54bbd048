"""The compiled loops of marching tetrahedra. `marching_tetrahedra._extract_torch` and the reference are their plain twins."""

from __future__ import annotations

import numpy as np

from .raster.jit import jit


@jit
def find_crossings(flags, tets, singles, doubles):
    """Write the crossed tetrahedra that hold one triangle into `singles`, those that hold two into `doubles`; return how many each.

    `flags` (N,) uint8 is 1 at the grid vertices that are inside.
    """
    single_count = double_count = 0
    for t in range(tets.shape[0]):
        count = flags[tets[t, 0]] + flags[tets[t, 1]] + flags[tets[t, 2]] + flags[tets[t, 3]]
        if count == 2:
            doubles[double_count] = t
            double_count += 1
        elif count == 1 or count == 3:
            singles[single_count] = t
            single_count += 1
    return single_count, double_count


@jit
def _case(flags, tets, t):
    return flags[tets[t, 0]] | flags[tets[t, 1]] << 1 | flags[tets[t, 2]] << 2 | flags[tets[t, 3]] << 3


@jit
def number_edges(flags, tets, tet_edges, polygons, singles, doubles, is_crossed, words, number):
    """The crossed edges in ascending order (V,) int64; `number` holds their positions in it.

    `is_crossed` is scratch, zero, one byte per edge up to a multiple of eight; `words` is the same memory as uint64.
    """
    for t in singles:
        case = _case(flags, tets, t)
        for k in range(3):
            is_crossed[tet_edges[t, polygons[case, k]]] = 1
    for t in doubles:
        case = _case(flags, tets, t)
        for k in range(4):
            is_crossed[tet_edges[t, polygons[case, k]]] = 1
    count = 0
    for word in words:
        while word:  # a bit for each set byte
            word &= word - np.uint64(1)
            count += 1
    crossed = np.empty(count, np.int64)
    count = 0
    for w in range(words.shape[0]):
        if words[w]:
            for edge in range(8 * w, 8 * w + 8):
                if is_crossed[edge]:
                    crossed[count] = edge
                    number[edge] = count
                    count += 1
    return crossed


@jit
def _meet(latest, adjacency, face, k, f):
    """Make triangle f (by its side k) and the triangle that came to this face of the grid before it, if any, neighbours."""
    side = 3 * f + k
    other = latest[face]
    if other != side:
        adjacency[f, k] = other // 3
        adjacency[other // 3, other % 3] = f


@jit
def extract_faces(flags, tets, tet_edges, tet_faces, polygons, sides, singles, doubles, number, latest, faces, adjacency):
    """Write faces (F, 3) and adjacency (F, 3), which comes filled with -1.

    `latest` is scratch, one entry per face of the grid, of any content: the last side (3 f + k) that lies in it. All sides are written
    first, then each looks up who was last.
    """
    split = singles.shape[0]
    for f in range(split):
        t = singles[f]
        case = _case(flags, tets, t)
        for k in range(3):
            faces[f, k] = number[tet_edges[t, polygons[case, k]]]
            latest[tet_faces[t, sides[case, k]]] = 3 * f + k
    for i in range(doubles.shape[0]):
        t, f, g = doubles[i], split + 2 * i, split + 2 * i + 1
        case = _case(flags, tets, t)
        faces[f, 0] = faces[g, 0] = number[tet_edges[t, polygons[case, 0]]]
        faces[f, 1] = number[tet_edges[t, polygons[case, 1]]]
        faces[f, 2] = faces[g, 1] = number[tet_edges[t, polygons[case, 2]]]
        faces[g, 2] = number[tet_edges[t, polygons[case, 3]]]
        adjacency[f, 2], adjacency[g, 0] = g, f
        latest[tet_faces[t, sides[case, 0]]] = 3 * f
        latest[tet_faces[t, sides[case, 1]]] = 3 * f + 1
        latest[tet_faces[t, sides[case, 2]]] = 3 * g + 1
        latest[tet_faces[t, sides[case, 3]]] = 3 * g + 2

    for f in range(split):
        t = singles[f]
        case = _case(flags, tets, t)
        for k in range(3):
            _meet(latest, adjacency, tet_faces[t, sides[case, k]], k, f)
    for i in range(doubles.shape[0]):
        t, f, g = doubles[i], split + 2 * i, split + 2 * i + 1
        case = _case(flags, tets, t)
        _meet(latest, adjacency, tet_faces[t, sides[case, 0]], 0, f)
        _meet(latest, adjacency, tet_faces[t, sides[case, 1]], 1, f)
        _meet(latest, adjacency, tet_faces[t, sides[case, 2]], 1, g)
        _meet(latest, adjacency, tet_faces[t, sides[case, 3]], 2, g)


@jit
def mark_band(inside, edges, rings, marked):
    """Write into marked (N,) uint8, which comes in as zeros: 1 at the ends of edges that cross the surface, r + 1 in ring r around them."""
    for e in range(edges.shape[0]):
        a, b = edges[e, 0], edges[e, 1]
        if inside[a] != inside[b]:
            marked[a] = 1
            marked[b] = 1
    for ring in range(1, rings + 1):
        for e in range(edges.shape[0]):
            a, b = marked[edges[e, 0]], marked[edges[e, 1]]
            if a == ring and b == 0:
                marked[edges[e, 1]] = ring + 1
            elif b == ring and a == 0:
                marked[edges[e, 0]] = ring + 1
