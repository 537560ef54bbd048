"""The plain torch twin of the CPU rasteriser: the same rules in ordinary tensor operations, gradients by autograd.

Every triangle is expanded into the pixels of its bounding box, all pairs are tested at once, and the nearest pair of each pixel is kept.
An oracle for tests and a reference for benchmarks; far slower than `cpu`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SUBPIXEL = 4096
FIXED_LIMIT = 1 << 29
SUPERSAMPLING = 4
SNAPPING = 1 / 32
PAIRS_AT_ONCE = 1 << 22  # bounds the memory
NOTHING, SILHOUETTE, CONNECTED = 0, 1, 2  # what a walk across the surface found, see `_walk`


class ReferenceRasterizer:
    """See `protocol.RasterizerBackend`, and `cpu.CpuRasterizer` for `walk_steps`."""

    name = "reference"

    def __init__(self, walk_steps: int = 64):
        self.walk_steps = walk_steps

    def rasterize(self, clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
        ids = [visible_triangles(view, faces, height, width) for view in clip.detach().double()]
        ids = torch.stack(ids) if ids else torch.zeros(0, height, width, dtype=torch.int64)
        batch, row, column = (ids >= 0).nonzero(as_tuple=True)
        triangle = ids[batch, row, column]
        corners = clip[batch[:, None], faces.long()[triangle]].double()  # (N, 3, 4)
        edges, sign = edge_functions(corners)
        centre = _centres(row, column, height, width)
        inside = (sign[:, None] * (edges * centre[:, None]).sum(-1)).clamp(min=0)
        total = inside.sum(-1, keepdim=True)
        weights = torch.where(total > 0, inside / torch.where(total > 0, total, 1.0), 1 / 3)
        depth = (weights.detach() * corners.detach()[..., 2]).sum(-1) / (weights.detach() * corners.detach()[..., 3]).sum(-1)
        found = torch.stack([weights[:, 0], weights[:, 1], depth, triangle + 1.0], dim=-1).to(clip.dtype)
        empty = torch.zeros(len(clip), height, width, 4, dtype=clip.dtype)
        return empty.index_put((batch, row, column), found)

    def interpolate(self, attributes: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        if attributes.ndim == 2:
            attributes = attributes[None]
        attributes = attributes.expand(len(rast), -1, -1)
        batch, row, column = (rast[..., 3] > 0).nonzero(as_tuple=True)
        found = rast[batch, row, column]
        corners = attributes[batch[:, None], faces.long()[found[:, 3].long() - 1]]  # (N, 3, C)
        u, v = found[:, 0:1], found[:, 1:2]
        values = u * corners[:, 0] + v * corners[:, 1] + (1 - u - v) * corners[:, 2]
        empty = torch.zeros(*rast.shape[:3], attributes.shape[-1], dtype=attributes.dtype)
        return empty.index_put((batch, row, column), values)

    def smooth_mask(self, clip: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        height, width = rast.shape[1] * SUPERSAMPLING, rast.shape[2] * SUPERSAMPLING
        covered = self.rasterize(clip.detach(), faces, height, width)[..., 3] > 0
        return F.avg_pool2d(covered[:, None].to(clip.dtype), SUPERSAMPLING).permute(0, 2, 3, 1)

    def antialias(self, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, adjacency: Tensor) -> Tensor:
        channels, size = color.shape[-1], color.shape[1:3]
        number = torch.arange(color[..., 0].numel()).reshape(color.shape[:3])
        pixels, sources, weights = [], [], []
        for u in (0, 1):
            before, after = (number[:, :, :-1], number[:, :, 1:]) if u == 0 else (number[:, :-1], number[:, 1:])
            near, far, view, above, below, direction = _silhouettes_between(
                before.reshape(-1), after.reshape(-1), rast, clip.detach().double(), faces.long(), adjacency.long(), u, self.walk_steps
            )
            line, start, width = _places(near, size, u)
            a, b = clip[view, above].double(), clip[view, below].double()
            s_a, s_b = a[:, 1 - u] - line * a[:, 3], b[:, 1 - u] - line * b[:, 3]
            crossing = (s_a * b[:, u] - s_b * a[:, u]) / (s_a * b[:, 3] - s_b * a[:, 3])
            distance = direction * ((crossing * 0.5 + 0.5) * width - 0.5 - start)
            # the bound is one of values only, as in the kernel
            distance = distance + (distance.clamp(0, 1) - distance).detach()
            outwards = distance > 0.5
            pixels.append(torch.where(outwards, far, near))
            sources.append(torch.where(outwards, near, far))
            weights.append(torch.where(outwards, distance - 0.5, 0.5 - distance))
        pixel, source, weight = torch.cat(pixels), torch.cat(sources), torch.cat(weights)
        flat = color.reshape(-1, channels)
        total = weight.new_zeros(len(flat)).index_add(0, pixel, weight).clamp(min=1)
        share = (weight / total[pixel]).to(color.dtype)[:, None]
        return flat.index_add(0, pixel, share * (flat[source] - flat[pixel])).reshape(color.shape)


def _places(pixel: Tensor, size: torch.Size, u: int) -> tuple[Tensor, Tensor, int]:
    """Of pixels numbered through (B, H, W): v in [-1, 1], the index along u, and how many pixels there are along u."""
    row, column = pixel // size[1] % size[0], pixel % size[1]
    across, along = (row, column) if u == 0 else (column, row)
    return (2 * across + 1).double() / size[u] - 1, along, size[1 - u]


def _silhouettes_between(before, after, rast, clip, faces, adjacency, u, steps) -> tuple[Tensor, ...]:
    """Of the pairs of pixels, those with a silhouette edge between them: the nearer and the farther pixel, the view, the edge's vertices
    above and below the line between the pixels, and whether u grows (1) or falls (-1) from the nearer to the farther."""
    ids, depth = rast[..., 3].detach().reshape(-1).long() - 1, rast[..., 2].detach().reshape(-1)
    differ = ids[before] != ids[after]
    before, after = before[differ], after[differ]
    forwards = (ids[after] < 0) | ((ids[before] >= 0) & (depth[before] <= depth[after]))
    found = _walk(before, after, forwards, rast.shape, ids, clip, faces, adjacency, u, steps)
    again = _walk(before, after, ~forwards, rast.shape, ids, clip, faces, adjacency, u, steps)
    second = found[0] == NOTHING
    kind, above, below = (torch.where(second, y, x) for x, y in zip(found, again))
    forwards = forwards ^ second
    view = before // (rast.shape[1] * rast.shape[2])
    a, b = (clip[view, vertex.clamp(min=0)] for vertex in (above, below))
    n_u = a[:, 1 - u] * b[:, 3] - a[:, 3] * b[:, 1 - u]
    n_v = a[:, 3] * b[:, u] - a[:, u] * b[:, 3]
    across, along = n_u.abs() * rast.shape[1 + u], n_v.abs() * rast.shape[2 - u]
    kept = (kind == SILHOUETTE) & (across >= along if u == 0 else across > along)
    near, far = torch.where(forwards, before, after), torch.where(forwards, after, before)
    return near[kept], far[kept], view[kept], above[kept], below[kept], forwards[kept] * 2 - 1


def _walk(before, after, forwards, shape, ids, clip, faces, adjacency, u, steps) -> tuple[Tensor, Tensor, Tensor]:
    """All walks at once, from `before` where `forwards`, else from `after`: what was found and the edge's vertices above and below."""
    first, last = torch.where(forwards, before, after), torch.where(forwards, after, before)
    direction = forwards * 2 - 1
    line, start, width = _places(first, shape[1:3], u)
    view, face, target = first // (shape[1] * shape[2]), ids[first], ids[last]
    going = face >= 0
    face = face.clamp(min=0)
    kind, above, below, corner = (torch.full_like(first, value) for value in (NOTHING, -1, -1, -1))

    def height(vertex):
        p = clip[view, vertex]
        return p[:, 1 - u] - line * p[:, 3]

    def beyond(a, b, c):
        """True, by direction of the walk, where c lies behind the edge from a to b; and where it lies before it."""
        p = torch.stack([clip[view, vertex][:, [u, 1 - u, 3]] for vertex in (a, b, c)], dim=1)
        side = direction * (p[:, 2] * torch.linalg.cross(p[:, 0], p[:, 1])).sum(-1)
        return side > 0, side < 0

    def crosses(a, b):
        p, q = clip[view, a], clip[view, b]
        scale = height(a) * q[:, 3] - height(b) * p[:, 3]
        crossing = (height(a) * q[:, u] - height(b) * p[:, u]) / scale
        distance = direction * ((crossing * 0.5 + 0.5) * width - 0.5 - start)
        return scale > 0, distance <= 1 + SNAPPING

    if len(faces) == 0:
        return kind, above, below
    for k in range(3):
        a, b, c = faces[face].roll(-k, dims=1).unbind(1)
        upwards = height(b) > 0
        crossing = (height(a) > 0) != upwards
        a, b = torch.where(upwards, b, a), torch.where(upwards, a, b)
        leaves = crossing & crosses(a, b)[0] & beyond(a, b, c)[1]
        above, below, corner = torch.where(leaves, a, above), torch.where(leaves, b, below), torch.where(leaves, k, corner)
    going &= corner >= 0
    for _ in range(steps + 1):
        before_eye, within = crosses(above, below)
        going &= before_eye & within
        neighbour = adjacency[face, corner]
        corners = faces[neighbour]
        apart = (corners != above[:, None]) & (corners != below[:, None])
        apex_corner = torch.where(apart, torch.arange(3), -1).amax(1)
        apex = corners.gather(1, apex_corner.clamp(min=0)[:, None]).squeeze(1)
        ends = going & ((neighbour < 0) | (apex_corner < 0) | beyond(above, below, apex)[1])
        kind = torch.where(ends, SILHOUETTE, kind)
        meets = going & ~ends & (neighbour == target)
        kind = torch.where(meets, CONNECTED, kind)
        going &= ~ends & ~meets
        upwards = height(apex) > 0
        kept = torch.where(upwards, below, above)
        following = corners.gather(1, ((apex_corner + 1) % 3)[:, None]).squeeze(1) == kept
        above, below = torch.where(going & upwards, apex, above), torch.where(going & ~upwards, apex, below)
        corner = torch.where(going, torch.where(following, apex_corner, (apex_corner + 2) % 3), corner)
        face = torch.where(going, neighbour, face)
    return kind, above, below


def edge_functions(corners: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (N, 3, 3) of the homogeneous edge functions of triangles (N, 3, 4), and the sign of their determinants (N,)."""
    p = corners[..., [0, 1, 3]]
    edges = torch.linalg.cross(p.roll(-1, dims=1), p.roll(-2, dims=1))
    return edges, (p[:, 0] * edges[:, 0]).sum(-1).detach().sign()


def visible_triangles(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """Index of the nearest triangle at each pixel centre (H, W) of one view (V, 4) float64; -1 where there is none."""
    nearest = torch.full((height * width,), torch.inf, dtype=torch.float64)
    ids = torch.full((height * width,), len(faces), dtype=torch.int64)
    corners = clip[faces.long()]  # (F, 3, 4)
    w = corners[..., 3]
    screen = (corners[..., :2] / w[..., None] * 0.5 + 0.5) * torch.tensor([width, height]) * SUBPIXEL
    fixed_ok = ((w > 0) & (screen.abs() < FIXED_LIMIT).all(-1)).all(-1)
    snapped = torch.where(fixed_ok[:, None, None], (screen + 0.5).floor(), 0.0).long()

    size = torch.tensor([width, height])
    first = ((snapped.amin(1) + SUBPIXEL // 2 - 1).div(SUBPIXEL, rounding_mode="floor")).clamp(min=0)
    last = torch.minimum((snapped.amax(1) - SUBPIXEL // 2).div(SUBPIXEL, rounding_mode="floor"), size - 1)
    a, b, c = snapped.unbind(1)
    fixed_ok &= _cross(b - a, c - a) != 0
    homogeneous_ok = ~(((w > 0) & (screen.abs() < FIXED_LIMIT).all(-1)).all(-1)) & corners.isfinite().all(-1).all(-1)
    homogeneous_ok &= (w > 0).any(-1)
    first[homogeneous_ok], last[homogeneous_ok] = 0, size - 1
    extent = (last - first + 1).clamp(min=0)
    counts = extent.prod(-1) * (fixed_ok | homogeneous_ok)

    for chunk in _chunks(counts):
        triangle = torch.repeat_interleave(chunk, counts[chunk])
        starts = torch.repeat_interleave(counts[chunk].cumsum(0) - counts[chunk], counts[chunk])
        within = torch.arange(len(triangle)) - starts
        column = first[triangle, 0] + within % extent[triangle, 0]
        row = first[triangle, 1] + within // extent[triangle, 0]
        in_fixed, depth_fixed = _test_fixed(snapped[triangle], corners[triangle], row, column)
        in_homogeneous, depth_homogeneous = _test_homogeneous(corners[triangle], row, column, height, width)
        fixed = fixed_ok[triangle]
        depth = torch.where(fixed, depth_fixed, depth_homogeneous)
        hit = torch.where(fixed, in_fixed, in_homogeneous) & (depth >= -1) & (depth <= 1)
        pixel, triangle, depth = (row * width + column)[hit], triangle[hit], depth[hit]
        before = nearest.clone()
        nearest.scatter_reduce_(0, pixel, depth, "amin")
        ids[nearest < before] = len(faces)
        wins = (depth == nearest[pixel]) & (depth < before[pixel])
        ids.scatter_reduce_(0, pixel[wins], triangle[wins], "amin")
    return torch.where(ids < len(faces), ids, -1).reshape(height, width)


def _chunks(counts: Tensor) -> list[Tensor]:
    """Ranges of triangle indices whose pairs number about PAIRS_AT_ONCE."""
    if len(counts) == 0:
        return []
    group = counts.cumsum(0) // PAIRS_AT_ONCE
    return list(torch.arange(len(counts)).split(torch.unique_consecutive(group, return_counts=True)[1].tolist()))


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _centres(row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """(N, 3): x/w, y/w and 1 of pixel centres."""
    one = torch.ones(len(row), dtype=torch.float64)
    return torch.stack([(2 * column + 1) / one.new_tensor(width) - 1, (2 * row + 1) / one.new_tensor(height) - 1, one], dim=-1)


def _test_fixed(snapped: Tensor, corners: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each pair (N,) is covered under the top-left rule, and z/w there, from snapped corners (N, 3, 2)."""
    a, b, c = snapped.unbind(1)
    z = corners[..., 2] / corners[..., 3]
    area = _cross(b - a, c - a)
    turned = (area < 0)[:, None]
    b, c = torch.where(turned, c, b), torch.where(turned, b, c)
    za, zb, zc = z[:, 0], torch.where(area < 0, z[:, 2], z[:, 1]), torch.where(area < 0, z[:, 1], z[:, 2])
    centre = torch.stack([column, row], dim=-1) * SUBPIXEL + SUBPIXEL // 2
    covered = torch.ones(len(row), dtype=torch.bool)
    for start, end in ((a, b), (b, c), (c, a)):
        edge = end - start
        value = _cross(edge, centre - start)
        top_left = (edge[:, 1] < 0) | ((edge[:, 1] == 0) & (edge[:, 0] > 0))
        covered &= (value > 0) | ((value == 0) & top_left)
    zb, zc, area = zb - za, zc - za, area.abs()
    ab, ac = (b - a).double(), (c - a).double()
    z_x = (zb * ac[:, 1] - zc * ab[:, 1]) / area
    z_y = (zc * ab[:, 0] - zb * ac[:, 0]) / area
    offset = (centre - a).double()
    depth = za + z_y * offset[:, 1] + z_x * offset[:, 0]
    return covered & depth.isfinite(), depth


def _test_homogeneous(corners: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """As `_test_fixed` for triangles that cannot be snapped, with half a fixed-point step of slack against holes at their edges."""
    edges, sign = edge_functions(corners)
    edges = edges * sign[:, None, None]
    value = (edges * _centres(row, column, height, width)[:, None]).sum(-1)
    slack = (edges[..., :2].abs() / torch.tensor([width, height]) / SUBPIXEL).sum(-1)
    w = (value * corners[..., 3]).sum(-1)
    depth = (value * corners[..., 2]).sum(-1) / w
    return (value + slack >= 0).all(-1) & (w > 0) & (sign != 0), depth
