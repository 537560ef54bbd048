"""Texture coordinates by projection along the axes, as from the six sides of a box: plain, but done in a known time."""

from __future__ import annotations

import numpy as np
import torch

from ..scene.adjacency import face_adjacency
from ..scene.mesh import TriangleMesh
from ..scene.raster import make_rasterizer
from .atlas import UVAtlas
from .files import ExportError

SMALL_SHARE = 1e-3  # of the surface; a smaller chart joins a larger neighbour's direction if all its faces can be seen from there
LEAST_COSINE = 0.3  # between a face that joins another direction and that direction: its texels are at most 3.3 times as long
JOINING_ROUNDS = 3
OVERLAP_RESOLUTION = 2048  # of the picture in which charts are looked over for texels covered twice
DEPTH_CUTS = 6  # rounds of cuts between the layers that cover a texel, before charts are cut in half instead
PADDING_SHARE = 0.5  # of the side of the texture that padding may use
SCALE_STEPS = 30


def box_projection(mesh: TriangleMesh, padding: int = 2, resolution: int = 2048) -> UVAtlas:
    """Project connected faces that look the same way along the axis they look along, and pack the charts on shelves.

    A face looks along the largest component of its normal, in one of six directions. Charts of less than 1/1000 of the surface join
    a larger neighbour where all their faces can be seen from its direction. A chart that covers a texel twice is cut at a depth between
    its layers, again and again, until none does. No chart is mirrored, all have one scale, and every face with an area keeps one, to
    the precision of float32.

    Args:
        padding: texels between charts in a texture of `resolution`; less where there are so many charts that it would take more than
            half of the texture's width and height.
    Returns:
        An atlas of source "box"; the same for the same mesh.
    Raises:
        ExportError: the mesh has no faces, no area, or vertices that are not finite.
    """
    vertices, faces = mesh.vertices.detach().cpu().double().numpy(), mesh.faces.cpu().numpy()
    if len(faces) == 0:
        raise ExportError("box_projection: the mesh has no faces, wanted at least one triangle")
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    with np.errstate(invalid="ignore"):  # infinite vertices are reported below
        normals = np.cross(b - a, c - a)
    doubled_areas = np.linalg.norm(normals, axis=1)
    if not (np.isfinite(doubled_areas).all() and doubled_areas.any()):
        raise ExportError(f"box_projection: the mesh has a surface of {doubled_areas.sum() / 2}, wanted a positive finite one")
    # a face without area may look anywhere
    normals = np.divide(normals, doubled_areas[:, None], out=np.zeros_like(normals), where=doubled_areas[:, None] > 0)

    adjacency = face_adjacency(torch.from_numpy(faces)).numpy()
    direction = 2 * np.abs(normals).argmax(axis=1)
    direction += np.take_along_axis(normals, direction[:, None] // 2, axis=1)[:, 0] < 0
    for _ in range(JOINING_ROUNDS):
        joined = _join_small(direction, adjacency, normals, doubled_areas)
        if np.array_equal(joined, direction):
            break
        direction = joined
    chart = _cut_until_flat(vertices, faces, adjacency, direction)
    uv_vertex, uv_direction, uv_chart, uv_faces = _split(faces, direction, chart)
    uvs = _pack(_project(vertices[uv_vertex], uv_direction), uv_chart, padding / resolution)
    return UVAtlas(uvs.clip(0, 1).astype(np.float32), uv_faces, "box")


def _connected(label: np.ndarray, adjacency: np.ndarray) -> np.ndarray:
    """(F,) number, from 0, of the piece of each face: faces of one label that hang together by edges."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    face, corner = np.nonzero((adjacency >= 0) & (label[:, None] == label[adjacency]))
    links = coo_array((np.ones(len(face), np.int8), (face, adjacency[face, corner])), shape=(len(label),) * 2)
    return connected_components(links, directed=False)[1]


def _join_small(direction: np.ndarray, adjacency: np.ndarray, normals: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Directions (F,) where each small piece has taken that of the large pieces it borders most, if every face can be seen from there."""
    piece = _connected(direction, adjacency)
    area = np.bincount(piece, weights=areas)
    small = area < SMALL_SHARE * areas.sum()
    face, corner = np.nonzero((adjacency >= 0) & small[piece][:, None] & ~small[piece[adjacency]])
    borders = np.zeros((len(area), 6))
    np.add.at(borders, (piece[face], direction[adjacency[face, corner]]), 1)
    candidates = np.flatnonzero(small[piece] & borders.any(axis=1)[piece])
    cosine = np.full((len(area), 6), np.inf)
    flat = ~normals[candidates].any(axis=1)
    for way in range(6):
        towards = normals[candidates, way // 2] * (1 - 2 * (way % 2))
        np.minimum.at(cosine[:, way], piece[candidates], np.where(flat, 1, towards))
    borders[cosine < LEAST_COSINE] = 0
    joins = borders.any(axis=1)
    return np.where(joins[piece], borders.argmax(axis=1)[piece], direction)


def _cut_until_flat(vertices: np.ndarray, faces: np.ndarray, adjacency: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """(F,) chart of each face: connected, of one direction, and covering no texel twice."""
    chart = _connected(direction, adjacency)
    depth = vertices[faces].mean(axis=1)[np.arange(len(faces)), direction // 2]
    pending = np.arange(len(faces))  # faces of charts not yet known to be flat
    cuts = 0
    while len(pending):
        first, second = _layers(vertices, faces[pending], direction[pending], chart[pending])
        if len(first) == 0:
            break
        first, second = pending[first], pending[second]
        folded = np.unique(chart[first])
        pending = pending[np.isin(chart[pending], folded)]
        if cuts < DEPTH_CUTS:
            limit = _medians(chart[first], (depth[first] + depth[second]) / 2)
            upper = depth[pending] > limit[np.searchsorted(folded, chart[pending])]
        else:
            upper = _upper_half(chart[pending], depth[pending])
        cuts += 1
        label = np.full(len(faces), -1)
        label[pending] = 2 * chart[pending] + upper
        pieces = _connected(label, adjacency)
        chart[pending] = chart.max() + 1 + pieces[pending]
    return chart


def _layers(vertices: np.ndarray, faces: np.ndarray, direction: np.ndarray, chart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two different faces of one chart at each texel that more than one covers: the foremost and the hindmost, (N,) each."""
    uv_vertex, uv_direction, uv_chart, uv_faces = _split(faces, direction, chart)
    uvs = _pack(_project(vertices[uv_vertex], uv_direction), uv_chart, 1 / OVERLAP_RESOLUTION)
    depth = vertices[uv_vertex, uv_direction // 2]
    low, high = vertices.min(), vertices.max()
    clip = np.ones((1, len(uvs), 4))
    clip[0, :, :2] = 2 * uvs - 1
    clip[0, :, 2] = 0.9 * (2 * (depth - low) / (high - low) - 1)
    rasterizer = make_rasterizer("cpu")
    found = []
    for triangles in (uv_faces, uv_faces[::-1]):  # the other way round too, for faces of the same depth
        rast = rasterizer.rasterize(torch.from_numpy(clip), torch.from_numpy(triangles.copy()), OVERLAP_RESOLUTION, OVERLAP_RESOLUTION)
        found.append(rast[0, ..., 3].numpy().astype(np.int64).ravel() - 1)
        clip[..., 2] *= -1
    covered = found[0] >= 0
    first, second = found[0][covered], len(faces) - 1 - found[1][covered]
    twice = (first != second) & (chart[first] == chart[second])
    return first[twice], second[twice]


def _medians(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Median of the values of each group, in ascending order of the groups."""
    order = np.lexsort((values, group))
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    counts = np.diff(np.append(starts, len(group)))
    return values[order][starts + counts // 2]


def _upper_half(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) bool, true for the larger half of each group's values; equal ones are told apart by their order."""
    order = np.lexsort((values, group))
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    counts = np.diff(np.append(starts, len(group)))
    upper = np.empty(len(group), bool)
    upper[order] = np.arange(len(group)) - np.repeat(starts, counts) >= np.repeat(counts // 2, counts)
    return upper


def _split(faces: np.ndarray, direction: np.ndarray, chart: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Vertices once per chart: vertex, direction and chart, from 0, of each (T,), and faces (F, 3) into them."""
    _, chart = np.unique(chart, return_inverse=True)
    key = chart[:, None] * (int(faces.max()) + 1) + faces
    _, corner, uv_faces = np.unique(key, return_index=True, return_inverse=True)
    face = corner // 3
    return faces.ravel()[corner], direction[face], chart[face], uv_faces.reshape(-1, 3)


def _project(points: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Points (T, 3) as seen against their direction, (T, 2): counter-clockwise faces stay so."""
    row = np.arange(len(points))
    first, second = (direction // 2 + 1) % 3, (direction // 2 + 2) % 3
    flip = np.where(direction % 2, -1, 1)
    return np.stack([flip * points[row, first], points[row, second]], axis=1)


def _pack(points: np.ndarray, chart: np.ndarray, padding: float) -> np.ndarray:
    """Points (T, 2) with their charts side by side in the unit square, as large as one scale for all allows.

    Args:
        chart: (T,) from 0, without gaps. padding: between charts, in units of the square's side.
    """
    order = np.argsort(chart, kind="stable")
    starts = np.flatnonzero(np.diff(chart[order], prepend=-1))
    low, high = np.minimum.reduceat(points[order], starts), np.maximum.reduceat(points[order], starts)
    extent = high - low
    # lying down, charts waste less of a shelf; a quarter turn, since a mirrored chart would turn its normal map
    turned = extent[:, 1] > extent[:, 0]
    points = points - low[chart]
    points = np.where(turned[chart, None], np.stack([extent[chart, 1] - points[:, 1], points[:, 0]], axis=1), points)
    extent = np.where(turned[:, None], extent[:, ::-1], extent)
    padding = min(padding, PADDING_SHARE / np.sqrt(len(extent)))

    shelf = np.lexsort((-extent[:, 0], -extent[:, 1]))
    sizes = extent[shelf]
    small, large = 0.0, (1 - padding) / extent.max()
    for _ in range(SCALE_STEPS):
        scale = (small + large) / 2
        fits = _shelves(sizes * scale + padding)[1] <= 1
        small, large = (scale, large) if fits else (small, scale)
    corners = np.empty_like(extent)
    corners[shelf] = _shelves(sizes * small + padding)[0]
    return points * small + corners[chart] + padding / 2


def _shelves(sizes: np.ndarray) -> tuple[np.ndarray, float]:
    """Lower left corners (N, 2) of boxes (N, 2), which come by descending height, in rows of width 1; and the height of all rows."""
    ends = np.cumsum(sizes[:, 0])
    corners = np.empty_like(sizes)
    first, height = 0, 0.0
    while first < len(sizes):
        begun = ends[first] - sizes[first, 0]
        last = max(int(np.searchsorted(ends, begun + 1, side="right")), first + 1)
        corners[first:last, 0] = ends[first:last] - sizes[first:last, 0] - begun
        corners[first:last, 1] = height
        height += sizes[first, 1]
        first = last
    return corners, height
