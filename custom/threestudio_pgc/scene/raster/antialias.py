"""Kernels of the CPU antialiasing: which silhouette edge lies between two pixels, and how it blends them (Laine et al. 2020, 3.5).

Laine et al. look for the silhouette edge among those of the triangle at the pixel's centre. Where triangles are smaller than a pixel the
edge mostly belongs to another triangle, and the gradient of the silhouette is lost. Here the search goes on from triangle to triangle
along the line between the two centres, until the surface ends or folds back.

Along the line one coordinate runs, u (x between horizontal neighbours, y between vertical ones), and the other, v, is constant. With a
vertex p = (p_u, p_v, p_w) of clip space, s_p = p_v - v p_w tells on which side of the line it lies, and the edge from a to b crosses it at

    u = (s_a b_u - s_b a_u) / (s_a b_w - s_b a_w).

All tests are linear in such homogeneous coordinates, so triangles that cross w = 0 need no clipping.
"""

from __future__ import annotations

from .jit import jit

NOTHING, SILHOUETTE, CONNECTED = 0, 1, 2  # what a walk found: no end of the surface, an edge that ends it, the other pixel's triangle
# Rasterisers snap vertices to a grid, ours of 1/4096 pixel and those on GPUs of down to 1/16: an edge so little beyond the other pixel's
# centre may be the one that leaves it uncovered.
SNAPPING = 1 / 32


@jit
def _walk(clip, faces, adjacency, face, target, u, v, line, start, direction, width, height, steps):
    """Follow the surface from the pixel that shows `face` to its neighbour at `start` + `direction`, which shows `target` (-1: nothing).

    Args: `u`, `v` the axes (0: x, 1: y) along and across; `line` the constant v in [-1, 1]; `start` the pixel's index along u; `width`
        and `height` of the picture along u and along v.

    Returns what was found; the edge's vertices above and below the line; where it crosses, in pixels from the first centre; and whether
    it runs rather across than along the line, as it must to be blended between these two pixels. The others are blended between the
    pixels of the other axis.
    """
    above = below = -1
    s_above = s_below = 0.0
    corner = -1
    for k in range(3):  # the edge by which the line leaves the first triangle
        a, b = faces[face, k], faces[face, (k + 1) % 3]
        s_a, s_b = clip[a, v] - line * clip[a, 3], clip[b, v] - line * clip[b, 3]
        if (s_a > 0) == (s_b > 0):
            continue
        if s_b > 0:
            a, b, s_a, s_b = b, a, s_b, s_a
        if s_a * clip[b, 3] - s_b * clip[a, 3] > 0 and direction * _side(clip, a, b, faces[face, (k + 2) % 3], u, v) < 0:
            above, below, s_above, s_below, corner = a, b, s_a, s_b, k
    if corner < 0:
        return NOTHING, -1, -1, 0.0, False

    for _ in range(steps + 1):
        # positive where the crossing lies in front of the eye
        scale = s_above * clip[below, 3] - s_below * clip[above, 3]
        if not scale > 0:
            return NOTHING, -1, -1, 0.0, False
        crossing = (s_above * clip[below, u] - s_below * clip[above, u]) / scale
        distance = direction * ((crossing * 0.5 + 0.5) * width - 0.5 - start)
        if not distance <= 1 + SNAPPING:  # NaN stops here too
            return NOTHING, -1, -1, 0.0, False
        neighbour = adjacency[face, corner]
        apex = apex_corner = -1
        if neighbour >= 0:
            for k in range(3):
                if faces[neighbour, k] != above and faces[neighbour, k] != below:
                    apex, apex_corner = faces[neighbour, k], k
        if apex < 0 or direction * _side(clip, above, below, apex, u, v) < 0:
            # the edge's direction on the screen is (n_v, -n_u) with n = above x below, of which n_u is `scale`
            n_v = clip[above, 3] * clip[below, u] - clip[above, u] * clip[below, 3]
            across, along = scale * height, abs(n_v) * width
            steep = across >= along if u == 0 else across > along
            return SILHOUETTE, above, below, min(max(distance, 0.0), 1.0), steep
        if neighbour == target:
            return CONNECTED, -1, -1, 0.0, False
        s_apex = clip[apex, v] - line * clip[apex, 3]
        if s_apex > 0:
            above, s_above, kept = apex, s_apex, below
        else:
            below, s_below, kept = apex, s_apex, above
        face = neighbour
        corner = apex_corner if faces[face, (apex_corner + 1) % 3] == kept else (apex_corner + 2) % 3
    return NOTHING, -1, -1, 0.0, False


@jit
def _side(clip, a, b, c, u, v):
    """Determinant of (u, v, w) of three vertices: positive where c lies at a larger u than the edge from a (above the line) to b."""
    n_u = clip[a, v] * clip[b, 3] - clip[a, 3] * clip[b, v]
    n_v = clip[a, 3] * clip[b, u] - clip[a, u] * clip[b, 3]
    n_w = clip[a, u] * clip[b, v] - clip[a, v] * clip[b, u]
    return n_u * clip[c, u] + n_v * clip[c, v] + n_w * clip[c, 3]


@jit
def find_crossings(clip, faces, adjacency, rast, steps, crossings, weights):
    """Every blend of one view; returns their number N.

    Fills `crossings` (N, 6): the blended pixel and the one whose colour it takes (positions in the flattened picture), the silhouette
    edge's vertices, the axis u, and the sign of d(weight)/du; and `weights` (N,) in [0, 0.5].
    """
    rows, columns = rast.shape[0], rast.shape[1]
    count = 0
    for row in range(rows):
        for column in range(columns):
            here = int(rast[row, column, 3]) - 1
            for u in range(2):
                if u == 0:
                    row_after, column_after, line = row, column + 1, (2 * row + 1) / rows - 1.0
                    first, width, height = column, columns, rows
                else:
                    row_after, column_after, line = row + 1, column, (2 * column + 1) / columns - 1.0
                    first, width, height = row, rows, columns
                if row_after == rows or column_after == columns:
                    continue
                after = int(rast[row_after, column_after, 3]) - 1
                if here == after:
                    continue
                # the nearer surface is the one that ends between them; if it does not, the other one must
                forwards = after < 0 or (here >= 0 and rast[row, column, 2] <= rast[row_after, column_after, 2])
                found, above, below, distance, steep = NOTHING, -1, -1, 0.0, False
                for _ in range(2):
                    face, target, start, direction = (here, after, first, 1) if forwards else (after, here, first + 1, -1)
                    if face >= 0:
                        found, above, below, distance, steep = _walk(
                            clip, faces, adjacency, face, target, u, 1 - u, line, start, direction, width, height, steps
                        )
                    if found != NOTHING:
                        break
                    forwards = not forwards
                if found != SILHOUETTE or not steep:
                    continue
                own, other = row * columns + column, row_after * columns + column_after
                if not forwards:
                    own, other = other, own
                if distance > 0.5:  # the surface reaches into the other pixel
                    crossings[count, 0], crossings[count, 1], crossings[count, 5] = other, own, direction
                else:
                    crossings[count, 0], crossings[count, 1], crossings[count, 5] = own, other, -direction
                crossings[count, 2], crossings[count, 3], crossings[count, 4] = above, below, u
                weights[count] = abs(distance - 0.5)
                count += 1
    return count


@jit
def blend(color, crossings, weights, totals, out):
    """Blend one view, flattened to (H * W, C), into `out`, which comes in as a copy of `color`; `totals` (H * W,) as zeros.

    Weights that add up to more than 1 at a pixel are scaled down to 1, so that no colour leaves the range of those it is mixed from.
    """
    for i in range(len(weights)):
        totals[crossings[i, 0]] += weights[i]
    for i in range(len(weights)):
        pixel, source = crossings[i, 0], crossings[i, 1]
        weight = weights[i] / max(totals[pixel], 1.0)
        for k in range(color.shape[1]):
            out[pixel, k] += weight * (color[source, k] - color[pixel, k])


@jit
def blend_backward(clip, color, crossings, weights, totals, out, grad_out, rows, columns, grad_color, grad_clip):
    """Gradients of one view's `blend`; `grad_color` comes in as a copy of `grad_out`, `grad_clip` (V, 4) as zeros."""
    for i in range(len(weights)):
        pixel, source, a, b, u = crossings[i, 0], crossings[i, 1], crossings[i, 2], crossings[i, 3], crossings[i, 4]
        total = max(totals[pixel], 1.0)
        weight = weights[i] / total
        grad_weight = 0.0
        for k in range(color.shape[1]):
            share = weight * grad_out[pixel, k]
            grad_color[source, k] += share
            grad_color[pixel, k] -= share
            # where the weights were scaled down, a larger one also takes from the others: towards the blended colour
            blended = out[pixel, k] if totals[pixel] > 1.0 else color[pixel, k]
            grad_weight += grad_out[pixel, k] * (color[source, k] - blended)
        if grad_weight == 0:
            continue
        v = 1 - u
        place, width, height = (pixel // columns, columns, rows) if u == 0 else (pixel % columns, rows, columns)
        line = (2 * place + 1) / height - 1.0
        s_a, s_b = clip[a, v] - line * clip[a, 3], clip[b, v] - line * clip[b, 3]
        scale = s_a * clip[b, 3] - s_b * clip[a, 3]
        crossing = (s_a * clip[b, u] - s_b * clip[a, u]) / scale
        # the weight grows by half the picture's width per unit of u; then u's own derivatives
        g = crossings[i, 5] * 0.5 * width * grad_weight / total / scale
        from_a = g * (clip[a, u] - crossing * clip[a, 3])
        from_b = g * (clip[b, u] - crossing * clip[b, 3])
        grad_clip[a, u] -= g * s_b
        grad_clip[a, v] += from_b
        grad_clip[a, 3] += g * crossing * s_b - line * from_b
        grad_clip[b, u] += g * s_a
        grad_clip[b, v] -= from_a
        grad_clip[b, 3] += line * from_a - g * crossing * s_a
