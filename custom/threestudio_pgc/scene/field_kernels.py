"""The hash grid's compiled loops. `HashGridEncoding.forward_torch` is their plain twin.

Levels are the outer loop, so that one level's table at a time stays in the core's cache. No fastmath: contracting the
lattice coordinate into one multiply-add moves it by more than the twin's tolerance at the finest level, and the
comparisons that keep NaN points inside the table would be optimised away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from .raster.jit import jit

# The primes of the plain twin in fields.py, as compile-time constants; were they to differ, the twins' test would fail.
_PRIME_Y = np.uint32(2654435761)
_PRIME_Z = np.uint32(805459861)


@jit
def _level(table, resolutions, offsets, level):
    """A level's rows of the table, whether it is dense, its hash mask, nodes per axis, last cell and cells per axis."""
    nodes, resolution = offsets[level + 1] - offsets[level], resolutions[level]
    values, cells = table[offsets[level] : offsets[level + 1]], table.dtype.type(resolution - 1)
    return values, nodes == resolution**3, np.uint32(nodes - 1), np.uint32(resolution), np.uint32(resolution - 2), cells


@jit
def _corners(points, n, scale, half, one, cells, last, resolution, mask, dense):
    """The eight table rows around point n, x fastest, and its position in the cell."""
    zero = half - half
    x = points[n, 0] * scale + half
    y = points[n, 1] * scale + half
    z = points[n, 2] * scale + half
    x = min(x, one) * cells if x > zero else zero
    y = min(y, one) * cells if y > zero else zero
    z = min(z, one) * cells if z > zero else zero
    i = min(np.uint32(x), last)
    j = min(np.uint32(y), last)
    k = min(np.uint32(z), last)
    kind = points.dtype.type  # float32 minus uint32 would be float64
    fx = x - kind(i)
    fy = y - kind(j)
    fz = z - kind(k)
    i1 = np.uint32(i + np.uint32(1))
    if dense:
        a = np.uint32(resolution * np.uint32(j + resolution * k))
        b = np.uint32(a + resolution)
        c = np.uint32(a + resolution * resolution)
        d = np.uint32(c + resolution)
        rows = (a + i, a + i1, b + i, b + i1, c + i, c + i1, d + i, d + i1)
    else:
        j0 = np.uint32(j * _PRIME_Y)
        j1 = np.uint32(j0 + _PRIME_Y)
        k0 = np.uint32(k * _PRIME_Z)
        k1 = np.uint32(k0 + _PRIME_Z)
        a, b, c, d = j0 ^ k0, j1 ^ k0, j0 ^ k1, j1 ^ k1
        rows = (
            (a ^ i) & mask,
            (a ^ i1) & mask,
            (b ^ i) & mask,
            (b ^ i1) & mask,
            (c ^ i) & mask,
            (c ^ i1) & mask,
            (d ^ i) & mask,
            (d ^ i1) & mask,
        )
    return rows, fx, fy, fz


@functools.cache
def hash_grid_kernels(n_features: int) -> tuple[Callable, Callable, Callable]:
    """Compiled (forward, backward, backward_points) for that many features per level: a constant lets the compiler unroll the inner loops.

    forward(points (N, 3), table (T, F), resolutions (L,), offsets (L+1,), scale, output (N, L*F)) fills output.
    backward(points, grad_output (N, L*F), resolutions, offsets, scale, grad_table (T, F)) adds to grad_table.
    backward_points(points, table, grad_output, resolutions, offsets, scale, grad_points (N, 3)) adds to grad_points; zero outside the cube.
    """

    @jit
    def forward(points, table, resolutions, offsets, scale, output):
        kind = table.dtype.type
        half, one = kind(0.5), kind(1.0)
        for level in range(resolutions.shape[0]):
            values, dense, mask, resolution, last, cells = _level(table, resolutions, offsets, level)
            for n in range(points.shape[0]):
                rows, fx, fy, fz = _corners(points, n, kind(scale), half, one, cells, last, resolution, mask, dense)
                gx, gy, gz = one - fx, one - fy, one - fz
                w0, w1, w2, w3 = gy * gz, fy * gz, gy * fz, fy * fz
                for f in range(n_features):
                    value = (gx * values[rows[0], f] + fx * values[rows[1], f]) * w0
                    value += (gx * values[rows[2], f] + fx * values[rows[3], f]) * w1
                    value += (gx * values[rows[4], f] + fx * values[rows[5], f]) * w2
                    value += (gx * values[rows[6], f] + fx * values[rows[7], f]) * w3
                    output[n, level * n_features + f] = value

    @jit
    def backward(points, grad_output, resolutions, offsets, scale, grad_table):
        kind = grad_table.dtype.type
        half, one = kind(0.5), kind(1.0)
        for level in range(resolutions.shape[0]):
            values, dense, mask, resolution, last, cells = _level(grad_table, resolutions, offsets, level)
            for n in range(points.shape[0]):
                rows, fx, fy, fz = _corners(points, n, kind(scale), half, one, cells, last, resolution, mask, dense)
                gx, gy, gz = one - fx, one - fy, one - fz
                w0, w1, w2, w3 = gy * gz, fy * gz, gy * fz, fy * fz
                for f in range(n_features):
                    grad = grad_output[n, level * n_features + f]
                    values[rows[0], f] += gx * w0 * grad
                    values[rows[1], f] += fx * w0 * grad
                    values[rows[2], f] += gx * w1 * grad
                    values[rows[3], f] += fx * w1 * grad
                    values[rows[4], f] += gx * w2 * grad
                    values[rows[5], f] += fx * w2 * grad
                    values[rows[6], f] += gx * w3 * grad
                    values[rows[7], f] += fx * w3 * grad

    @jit
    def backward_points(points, table, grad_output, resolutions, offsets, scale, grad_points):
        kind = table.dtype.type
        half, one = kind(0.5), kind(1.0)
        zero = half - half
        for level in range(resolutions.shape[0]):
            values, dense, mask, resolution, last, cells = _level(table, resolutions, offsets, level)
            for n in range(points.shape[0]):
                rows, fx, fy, fz = _corners(points, n, kind(scale), half, one, cells, last, resolution, mask, dense)
                gx, gy, gz = one - fx, one - fy, one - fz
                along_x, along_y, along_z = zero, zero, zero
                for f in range(n_features):
                    grad = grad_output[n, level * n_features + f]
                    a, b = values[rows[0], f], values[rows[1], f]
                    c, d = values[rows[2], f], values[rows[3], f]
                    low_0, low_1, step_0, step_1 = gx * a + fx * b, gx * c + fx * d, b - a, d - c
                    a, b = values[rows[4], f], values[rows[5], f]
                    c, d = values[rows[6], f], values[rows[7], f]
                    high_0, high_1, step_2, step_3 = gx * a + fx * b, gx * c + fx * d, b - a, d - c
                    along_x += grad * ((gy * step_0 + fy * step_1) * gz + (gy * step_2 + fy * step_3) * fz)
                    along_y += grad * ((low_1 - low_0) * gz + (high_1 - high_0) * fz)
                    along_z += grad * ((high_0 - low_0) * gy + (high_1 - low_1) * fy)
                grad_points[n, 0] += along_x * cells * kind(scale)
                grad_points[n, 1] += along_y * cells * kind(scale)
                grad_points[n, 2] += along_z * cells * kind(scale)
        for n in range(points.shape[0]):
            for axis in range(3):
                if not zero <= points[n, axis] * kind(scale) + half <= one:  # clamped there, or NaN
                    grad_points[n, axis] = zero

    return forward, backward, backward_points
