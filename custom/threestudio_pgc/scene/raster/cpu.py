"""The CPU rasteriser: exact fixed-point visibility in numba, with analytic gradients.

Coverage is decided by integer edge functions on a grid of 1/4096 pixel with a top-left fill rule, so that two triangles sharing an edge
neither overlap nor leave a hole. Weights are then computed in float64 from the unsnapped clip positions by homogeneous edge functions
(Olano and Greer 1997): with p = (x, y, w) of each vertex and q = (X, Y, 1) of the pixel centre, e_0 = (p_1 x p_2) . q and so on, and
the perspective-correct weights are e_i / (e_0 + e_1 + e_2). The same functions serve, without clipping, as the coverage test of the
few triangles that cross w = 0 or reach so far off screen that integers would overflow.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .antialias import blend, blend_backward, find_crossings
from .jit import jit
from .protocol import RasterError

SUBPIXEL = 4096  # fixed-point steps per pixel; fewer cost as much and assign more pixels to a neighbour of the true triangle
HALF = SUBPIXEL // 2
SHIFT = 12  # log2(SUBPIXEL)
FIXED_LIMIT = 1 << 29  # 131072 pixels; edge functions of coordinates below this stay under 2^61
SUPERSAMPLING = 4  # samples per pixel side of the smooth mask


@jit
def _edge_functions(clip, a, b, c):
    """Coefficients (of x, y and 1) of e_0, e_1, e_2, all with the sign that makes them positive inside; and that sign (0: degenerate)."""
    ax, ay, aw = clip[a, 0], clip[a, 1], clip[a, 3]
    bx, by, bw = clip[b, 0], clip[b, 1], clip[b, 3]
    cx, cy, cw = clip[c, 0], clip[c, 1], clip[c, 3]
    x0, y0, w0 = by * cw - bw * cy, bw * cx - bx * cw, bx * cy - by * cx
    x1, y1, w1 = cy * aw - cw * ay, cw * ax - cx * aw, cx * ay - cy * ax
    x2, y2, w2 = ay * bw - aw * by, aw * bx - ax * bw, ax * by - ay * bx
    determinant = ax * x0 + ay * y0 + aw * w0
    s = 1.0 if determinant > 0 else (-1.0 if determinant < 0 else 0.0)
    return s * x0, s * y0, s * w0, s * x1, s * y1, s * w1, s * x2, s * y2, s * w2, s


@jit
def _outside(clip, a, b, c):
    """True where the triangle lies wholly beyond one plane of the view volume, or is not finite."""
    if not np.isfinite(clip[a].sum() + clip[b].sum() + clip[c].sum()):
        return True
    for axis in range(3):
        if clip[a, axis] > clip[a, 3] and clip[b, axis] > clip[b, 3] and clip[c, axis] > clip[c, 3]:
            return True
        if clip[a, axis] < -clip[a, 3] and clip[b, axis] < -clip[b, 3] and clip[c, axis] < -clip[c, 3]:
            return True
    return clip[a, 3] <= 0 and clip[b, 3] <= 0 and clip[c, 3] <= 0


@jit
def _near_bounds(clip, corners, height, width):
    """Pixel bounds (first row, last row, first column, last column) of the part of a triangle in front of the near plane z = -w."""
    x_min, x_max, y_min, y_max = np.inf, -np.inf, np.inf, -np.inf
    for i in range(3):
        a, b = corners[i], corners[(i + 1) % 3]
        da, db = clip[a, 2] + clip[a, 3], clip[b, 2] + clip[b, 3]
        for end in range(2):
            if end == 0:
                if da < 0:
                    continue
                t = 0.0
            else:
                if (da < 0) == (db < 0):
                    continue
                t = da / (da - db)
            x, y = clip[a, 0] + t * (clip[b, 0] - clip[a, 0]), clip[a, 1] + t * (clip[b, 1] - clip[a, 1])
            w = clip[a, 3] + t * (clip[b, 3] - clip[a, 3])
            if w <= 0:  # an unusual projection, whose near plane is not in front of the eye: look everywhere
                return 0, height - 1, 0, width - 1
            x_min, x_max = min(x_min, x / w), max(x_max, x / w)
            y_min, y_max = min(y_min, y / w), max(y_max, y / w)
    if x_min > x_max:
        return 0, -1, 0, -1
    # one pixel of slack for rounding; clamped as floats first, since the integers could not hold everything
    top = min(max((y_min * 0.5 + 0.5) * height - 1.5, 0.0), float(height))
    bottom = min(max((y_max * 0.5 + 0.5) * height + 1.5, -1.0), height - 1.0)
    left = min(max((x_min * 0.5 + 0.5) * width - 1.5, 0.0), float(width))
    right = min(max((x_max * 0.5 + 0.5) * width + 1.5, -1.0), width - 1.0)
    return int(top), int(bottom), int(left), int(right)


@jit
def _edge_span(ax, ay, bx, by, row_y, first, last):
    """Shrink the columns [first, last] to those whose centre at height `row_y` is on the inner side of the directed edge a -> b."""
    dx, dy = bx - ax, by - ay
    # top-left rule: an edge takes the points lying exactly on it in one of its two directions only
    value = dx * (row_y - ay) - dy * (HALF - ax)
    if not (dy < 0 or (dy == 0 and dx > 0)):
        value -= 1
    if dy < 0:
        step = -dy * SUBPIXEL
        if value < 0:
            first = max(first, (-value + step - 1) // step)
    elif dy > 0:
        if value < 0:
            last = first - 1
        else:
            last = min(last, value // (dy * SUBPIXEL))
    elif value < 0:
        last = first - 1
    return first, last


@jit
def _scan(clip, faces, height, width, fixed, usable, depth, ids, test_depth):
    """One view: write triangle index + 1 into `ids` at the pixel centres it covers; nearest wins where `test_depth`, else any (as 1).

    `fixed` (V, 2) int64 and `usable` (V,) bool are scratch: snapped coordinates, and whether they exist.
    """
    for v in range(clip.shape[0]):
        w = clip[v, 3]
        usable[v] = False
        if w > 0:
            x = (clip[v, 0] / w * 0.5 + 0.5) * width * SUBPIXEL
            y = (clip[v, 1] / w * 0.5 + 0.5) * height * SUBPIXEL
            if abs(x) < FIXED_LIMIT and abs(y) < FIXED_LIMIT:  # false for NaN as well
                fixed[v, 0], fixed[v, 1] = np.int64(np.floor(x + 0.5)), np.int64(np.floor(y + 0.5))
                usable[v] = True

    for f in range(faces.shape[0]):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        if usable[a] and usable[b] and usable[c]:
            ax, ay, bx, by, cx, cy = fixed[a, 0], fixed[a, 1], fixed[b, 0], fixed[b, 1], fixed[c, 0], fixed[c, 1]
            first_row = max(0, (min(ay, by, cy) + HALF - 1) >> SHIFT)
            last_row = min(height - 1, (max(ay, by, cy) - HALF) >> SHIFT)
            first_column = max(0, (min(ax, bx, cx) + HALF - 1) >> SHIFT)
            last_column = min(width - 1, (max(ax, bx, cx) - HALF) >> SHIFT)
            if first_row > last_row or first_column > last_column:
                continue
            area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
            if area == 0:
                continue
            if area < 0:
                b, c = c, b
                bx, by, cx, cy = cx, cy, bx, by
                area = -area
            za = clip[a, 2] / clip[a, 3]
            zb = clip[b, 2] / clip[b, 3] - za
            zc = clip[c, 2] / clip[c, 3] - za
            if not np.isfinite(za + zb + zc):
                continue
            # z/w is affine on the screen
            z_x = (zb * (cy - ay) - zc * (by - ay)) / area
            z_y = (zc * (bx - ax) - zb * (cx - ax)) / area
            for row in range(first_row, last_row + 1):
                row_y = row * SUBPIXEL + HALF
                first, last = _edge_span(ax, ay, bx, by, row_y, first_column, last_column)
                first, last = _edge_span(bx, by, cx, cy, row_y, first, last)
                first, last = _edge_span(cx, cy, ax, ay, row_y, first, last)
                z_row = za + z_y * (row_y - ay) + z_x * (HALF - ax)
                for column in range(first, last + 1):
                    z = z_row + z_x * SUBPIXEL * column
                    if test_depth:
                        if -1.0 <= z < depth[row, column]:
                            depth[row, column] = z
                            ids[row, column] = f + 1
                    elif -1.0 <= z <= 1.0:
                        ids[row, column] = 1
        elif not _outside(clip, a, b, c):
            first_row, last_row, first_column, last_column = _near_bounds(clip, faces[f], height, width)
            x0, y0, w0, x1, y1, w1, x2, y2, w2, sign = _edge_functions(clip, a, b, c)
            if sign == 0:
                continue
            # half a fixed-point step of slack: no hole opens along an edge shared with a snapped triangle, and the depth test
            # settles the overlap
            slack0 = (abs(x0) / width + abs(y0) / height) / SUBPIXEL
            slack1 = (abs(x1) / width + abs(y1) / height) / SUBPIXEL
            slack2 = (abs(x2) / width + abs(y2) / height) / SUBPIXEL
            for row in range(first_row, last_row + 1):
                qy = (2 * row + 1) / height - 1.0
                for column in range(first_column, last_column + 1):
                    qx = (2 * column + 1) / width - 1.0
                    e0, e1, e2 = x0 * qx + y0 * qy + w0, x1 * qx + y1 * qy + w1, x2 * qx + y2 * qy + w2
                    w = e0 * clip[a, 3] + e1 * clip[b, 3] + e2 * clip[c, 3]
                    if e0 + slack0 >= 0 and e1 + slack1 >= 0 and e2 + slack2 >= 0 and w > 0:
                        z = (e0 * clip[a, 2] + e1 * clip[b, 2] + e2 * clip[c, 2]) / w
                        if test_depth:
                            if -1.0 <= z < depth[row, column]:
                                depth[row, column] = z
                                ids[row, column] = f + 1
                        elif -1.0 <= z <= 1.0:
                            ids[row, column] = 1


@jit
def _resolve(clip, faces, ids, rast):
    """Fill rast (H, W, 4) of one view from its triangle ids (H, W)."""
    height, width = ids.shape
    for row in range(height):
        qy = (2 * row + 1) / height - 1.0
        for column in range(width):
            f = ids[row, column] - 1
            if f < 0:
                continue
            qx = (2 * column + 1) / width - 1.0
            a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
            x0, y0, w0, x1, y1, w1, x2, y2, w2, _ = _edge_functions(clip, a, b, c)
            e0, e1, e2 = x0 * qx + y0 * qy + w0, x1 * qx + y1 * qy + w1, x2 * qx + y2 * qy + w2
            # snapping lets a pixel centre lie half a fixed-point step outside of the true triangle
            e0, e1, e2 = max(e0, 0.0), max(e1, 0.0), max(e2, 0.0)
            total = e0 + e1 + e2
            if total > 0:
                u, v, t = e0 / total, e1 / total, e2 / total
            else:  # a sliver that exists on the snapped grid only
                u, v, t = 1 / 3, 1 / 3, 1 / 3
            w = u * clip[a, 3] + v * clip[b, 3] + t * clip[c, 3]
            rast[row, column, 0] = u
            rast[row, column, 1] = v
            rast[row, column, 2] = (u * clip[a, 2] + v * clip[b, 2] + t * clip[c, 2]) / w
            rast[row, column, 3] = f + 1


@jit
def _resolve_backward(clip, faces, rast, grad_rast, grad_clip):
    """Add the gradient of one view's u, v to grad_clip (V, 4)."""
    height, width = rast.shape[0], rast.shape[1]
    for row in range(height):
        qy = (2 * row + 1) / height - 1.0
        for column in range(width):
            f = int(rast[row, column, 3]) - 1
            if f < 0:
                continue
            g0, g1 = grad_rast[row, column, 0], grad_rast[row, column, 1]
            if g0 == 0 and g1 == 0:
                continue
            qx = (2 * column + 1) / width - 1.0
            a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
            ax, ay, aw = clip[a, 0], clip[a, 1], clip[a, 3]
            bx, by, bw = clip[b, 0], clip[b, 1], clip[b, 3]
            cx, cy, cw = clip[c, 0], clip[c, 1], clip[c, 3]
            x0, y0, w0, x1, y1, w1, x2, y2, w2, sign = _edge_functions(clip, a, b, c)
            e0, e1, e2 = x0 * qx + y0 * qy + w0, x1 * qx + y1 * qy + w1, x2 * qx + y2 * qy + w2
            total = max(e0, 0.0) + max(e1, 0.0) + max(e2, 0.0)
            if total <= 0:
                continue
            # weight_i = e_i / total, hence dL/de_i = (g_i - sum_k g_k weight_k) / total, zero where e_i was clamped
            mean = (g0 * max(e0, 0.0) + g1 * max(e1, 0.0)) / total
            h0 = sign * (g0 - mean) / total if e0 >= 0 else 0.0
            h1 = sign * (g1 - mean) / total if e1 >= 0 else 0.0
            h2 = sign * -mean / total if e2 >= 0 else 0.0
            # e_0 = (b x c) . q, e_1 = (c x a) . q, e_2 = (a x b) . q
            # so dL/da = q x (h1 c - h2 b) and cyclic, with q = (qx, qy, 1)
            sx, sy, sw = h1 * cx - h2 * bx, h1 * cy - h2 * by, h1 * cw - h2 * bw
            grad_clip[a, 0] += qy * sw - sy
            grad_clip[a, 1] += sx - qx * sw
            grad_clip[a, 3] += qx * sy - qy * sx
            sx, sy, sw = h2 * ax - h0 * cx, h2 * ay - h0 * cy, h2 * aw - h0 * cw
            grad_clip[b, 0] += qy * sw - sy
            grad_clip[b, 1] += sx - qx * sw
            grad_clip[b, 3] += qx * sy - qy * sx
            sx, sy, sw = h0 * bx - h1 * ax, h0 * by - h1 * ay, h0 * bw - h1 * aw
            grad_clip[c, 0] += qy * sw - sy
            grad_clip[c, 1] += sx - qx * sw
            grad_clip[c, 3] += qx * sy - qy * sx


@jit
def _interpolate(attributes, rast, faces, out):
    """Attributes (V, C) of one view into out (H, W, C); out comes in as zeros."""
    for row in range(rast.shape[0]):
        for column in range(rast.shape[1]):
            f = int(rast[row, column, 3]) - 1
            if f < 0:
                continue
            u, v = rast[row, column, 0], rast[row, column, 1]
            t = 1 - u - v
            a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
            for k in range(attributes.shape[1]):
                out[row, column, k] = u * attributes[a, k] + v * attributes[b, k] + t * attributes[c, k]


@jit
def _interpolate_backward(attributes, rast, faces, grad_out, grad_attributes, grad_rast):
    """Add to grad_attributes (V, C) and grad_rast (H, W, 4) the gradient of one view."""
    for row in range(rast.shape[0]):
        for column in range(rast.shape[1]):
            f = int(rast[row, column, 3]) - 1
            if f < 0:
                continue
            u, v = rast[row, column, 0], rast[row, column, 1]
            t = 1 - u - v
            a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
            for k in range(attributes.shape[1]):
                g = grad_out[row, column, k]
                grad_attributes[a, k] += u * g
                grad_attributes[b, k] += v * g
                grad_attributes[c, k] += t * g
                grad_rast[row, column, 0] += g * (attributes[a, k] - attributes[c, k])
                grad_rast[row, column, 1] += g * (attributes[b, k] - attributes[c, k])


@jit
def _pool(samples, factor, out):
    """Mean of each factor x factor block of samples (H * factor, W * factor) into out (H, W)."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            count = 0
            for i in range(factor):
                for j in range(factor):
                    count += samples[row * factor + i, column * factor + j]
            out[row, column] = count / (factor * factor)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
        batch, vertices = clip.shape[:2]
        rast = torch.zeros(batch, height, width, 4, dtype=clip.dtype)
        positions, triangles, out = clip.detach().double().contiguous().numpy(), faces.numpy(), rast.numpy()
        fixed, usable = np.empty((vertices, 2), np.int64), np.empty(vertices, np.bool_)
        for i in range(batch):
            depth = np.full((height, width), np.nextafter(1.0, 2.0))
            ids = np.zeros((height, width), np.int32)
            _scan(positions[i], triangles, height, width, fixed, usable, depth, ids, True)
            _resolve(positions[i], triangles, ids, out[i])
        ctx.save_for_backward(clip, faces, rast)
        return rast

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rast: Tensor):
        clip, faces, rast = ctx.saved_tensors
        positions, triangles = clip.detach().double().contiguous().numpy(), faces.numpy()
        found, incoming = rast.detach().numpy(), grad_rast.contiguous().numpy()
        grad = np.zeros(clip.shape, np.float64)
        for i in range(clip.shape[0]):
            _resolve_backward(positions[i], triangles, found[i], incoming[i], grad[i])
        return torch.from_numpy(grad).to(clip.dtype), None, None, None


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attributes: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        batch, height, width = rast.shape[:3]
        out = torch.zeros(batch, height, width, attributes.shape[-1], dtype=attributes.dtype)
        values, found, result = attributes.detach().numpy(), rast.detach().numpy(), out.numpy()
        for i in range(batch):
            _interpolate(values[min(i, len(values) - 1)], found[i], faces.numpy(), result[i])
        ctx.save_for_backward(attributes, rast, faces)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        attributes, rast, faces = ctx.saved_tensors
        values, found, incoming = attributes.detach().numpy(), rast.detach().numpy(), grad_out.contiguous().numpy()
        grad_attributes, grad_rast = np.zeros_like(values), np.zeros_like(found)
        for i in range(rast.shape[0]):
            shared = min(i, len(values) - 1)
            _interpolate_backward(values[shared], found[i], faces.numpy(), incoming[i], grad_attributes[shared], grad_rast[i])
        return torch.from_numpy(grad_attributes), torch.from_numpy(grad_rast), None


class _Antialias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, color: Tensor, clip: Tensor, rast: Tensor, faces: Tensor, adjacency: Tensor, steps: int) -> Tensor:
        batch, height, width, channels = color.shape
        positions, triangles, neighbours = clip.detach().double().contiguous().numpy(), faces.numpy(), adjacency.numpy()
        out, values, found = color.detach().clone(), color.detach().numpy(), rast.detach().numpy()
        totals = torch.zeros(batch, height * width, dtype=torch.float64)
        room, room_weights = np.empty((2 * height * width, 6), np.int32), np.empty(2 * height * width)
        ctx.blends = []
        for i in range(batch):
            count = find_crossings(positions[i], triangles, neighbours, found[i], steps, room, room_weights)
            crossings, weights = room[:count].copy(), room_weights[:count].copy()
            ctx.blends.append((crossings, weights))
            blend(values[i].reshape(-1, channels), crossings, weights, totals[i].numpy(), out[i].view(-1, channels).numpy())
        ctx.save_for_backward(color, clip, totals, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        color, clip, totals, out = ctx.saved_tensors
        batch, height, width, channels = color.shape
        positions, incoming = clip.detach().double().contiguous().numpy(), grad_out.contiguous()
        grad_color, grad_clip = incoming.clone(), np.zeros(clip.shape, np.float64)
        for i in range(batch):
            before, after, arriving, leaving = (t[i].detach().view(-1, channels).numpy() for t in (color, out, incoming, grad_color))
            crossings, weights = ctx.blends[i]
            blend_backward(
                positions[i], before, crossings, weights, totals[i].numpy(), after, arriving, height, width, leaving, grad_clip[i]
            )
        return grad_color, torch.from_numpy(grad_clip).to(clip.dtype), None, None, None, None


def _checked_faces(faces: Tensor, vertices: int) -> Tensor:
    """Faces as contiguous int32, refusing indices that the kernels would read out of bounds."""
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise RasterError(f"faces: want shape (F, 3), got {tuple(faces.shape)}")
    if faces.is_floating_point():
        raise RasterError(f"faces: want int32 or int64, got {faces.dtype}")
    if len(faces):
        low, high = int(faces.min()), int(faces.max())
        if low < 0 or high >= vertices:
            raise RasterError(f"faces: indices {low}..{high} do not fit {vertices} vertices")
    return faces.detach().to("cpu", torch.int32).contiguous()


def _checked_ids(rast: Tensor, faces: Tensor) -> None:
    if rast.numel() and int(rast[..., 3].max()) > len(faces):
        raise RasterError(f"rast: names triangle {int(rast[..., 3].max()) - 1}, but there are {len(faces)} faces")


def _checked_adjacency(adjacency: Tensor, faces: Tensor) -> Tensor:
    if adjacency.shape != faces.shape or adjacency.is_floating_point():
        raise RasterError(
            f"adjacency: want integers of shape {tuple(faces.shape)}, got {adjacency.dtype} of shape {tuple(adjacency.shape)}"
        )
    if len(faces) and (int(adjacency.min()) < -1 or int(adjacency.max()) >= len(faces)):
        raise RasterError(f"adjacency: triangles {int(adjacency.min())}..{int(adjacency.max())} do not fit {len(faces)} faces")
    return adjacency.detach().to("cpu", torch.int32).contiguous()


def _checked_clip(clip: Tensor) -> None:
    if clip.ndim != 3 or clip.shape[-1] != 4:
        raise RasterError(f"clip: want shape (B, V, 4), got {tuple(clip.shape)}")
    _checked_floating("clip", clip)


def _checked_size(height: int, width: int) -> None:
    # the snapped viewport has to stay well inside of FIXED_LIMIT
    if not (1 <= height <= 16384 and 1 <= width <= 16384):
        raise RasterError(f"height, width: want 1..16384 pixels, got {height} x {width}")


def _checked_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise RasterError(f"{name}: want float32 or float64, got {tensor.dtype}")


class CpuRasterizer:
    """`RasterizerBackend` on the CPU: float32 and float64, serial, pip-only. See `protocol.RasterizerBackend` for the contracts.

    Tensors on another device are copied here and the results back, so that a GPU without nvdiffrast can still be used.

    Args:
        walk_steps: how many triangles beyond the one at the pixel's centre `antialias` searches for the silhouette edge. 64 is enough
            for triangles of a fiftieth of a pixel; 0 leaves the rule of Laine et al., which finds few edges of a fine mesh.
    """

    name = "cpu"

    def __init__(self, walk_steps: int = 64):
        self.walk_steps = walk_steps

    def rasterize(self, clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
        _checked_clip(clip)
        _checked_size(height, width)
        return _Rasterize.apply(clip.cpu(), _checked_faces(faces, clip.shape[1]), height, width).to(clip.device)

    def interpolate(self, attributes: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        _checked_floating("attributes", attributes)
        _checked_floating("rast", rast)
        if attributes.ndim == 2:
            attributes = attributes[None]
        if attributes.ndim != 3 or attributes.shape[0] not in (1, rast.shape[0]):
            raise RasterError(
                f"attributes: want (V, C) or ({rast.shape[0]}, V, C) for {rast.shape[0]} views, got {tuple(attributes.shape)}"
            )
        triangles = _checked_faces(faces, attributes.shape[1])
        _checked_ids(rast, triangles)
        values = _Interpolate.apply(attributes.cpu().contiguous(), rast.cpu().contiguous(), triangles)
        return values.to(attributes.device)

    def smooth_mask(self, clip: Tensor, rast: Tensor, faces: Tensor) -> Tensor:
        """Share of 4 x 4 samples per pixel covered by any triangle."""
        _checked_clip(clip)
        batch, height, width = rast.shape[:3]
        _checked_size(height * SUPERSAMPLING, width * SUPERSAMPLING)
        triangles = _checked_faces(faces, clip.shape[1]).numpy()
        positions = clip.detach().cpu().double().contiguous().numpy()
        fixed, usable = np.empty((clip.shape[1], 2), np.int64), np.empty(clip.shape[1], np.bool_)
        no_depth = np.empty((0, 0))
        mask = torch.empty(batch, height, width, 1, dtype=clip.dtype)
        for i in range(batch):
            samples = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
            _scan(positions[i], triangles, *samples.shape, fixed, usable, no_depth, samples, False)
            _pool(samples, SUPERSAMPLING, mask[i, ..., 0].numpy())
        return mask.to(clip.device)

    def antialias(self, color: Tensor, rast: Tensor, clip: Tensor, faces: Tensor, adjacency: Tensor) -> Tensor:
        _checked_clip(clip)
        _checked_floating("color", color)
        _checked_floating("rast", rast)
        if color.ndim != 4 or color.shape[:3] != rast.shape[:3] or len(clip) != len(rast):
            raise RasterError(
                f"color, rast, clip: want (B, H, W, C), (B, H, W, 4) and (B, V, 4), got {tuple(color.shape)}, {tuple(rast.shape)} "
                f"and {tuple(clip.shape)}"
            )
        triangles = _checked_faces(faces, clip.shape[1])
        _checked_ids(rast, triangles)
        neighbours = _checked_adjacency(adjacency, triangles)
        picture = color.cpu().contiguous()
        return _Antialias.apply(picture, clip.cpu(), rast.cpu().contiguous(), triangles, neighbours, self.walk_steps).to(color.device)
