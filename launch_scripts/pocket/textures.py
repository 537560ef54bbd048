"""Procedural albedo on the surface of a mesh, as a function of position and normal only, so that all views agree.

Patterns are coarse on purpose: a check, dot or brick course spans about two latent cells (16 px at 128 px), the finest a
16x16 latent can hold. Their vertical phase is fixed (courses start at the bottom), which keeps the distribution the model
has to learn narrow.

Lengths are in world units; the object fills [-0.8, 0.8].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numba
import numpy as np
from scipy.spatial import cKDTree

from .captions import COLORS, Look

BOTTOM = -0.8


@dataclass
class Surface:
    """Points to be coloured. `position`, `normal` (N, 3) float; `samples` gives evenly spread points of the same mesh; `radius` is
    the mean distance from the z axis if the shape is a surface of revolution, on which patterns are wrapped as on a lathe, else
    None (box projection)."""

    position: np.ndarray
    normal: np.ndarray
    samples: SurfaceSamples
    radius: float | None = None


@dataclass
class SurfaceSamples:
    """Farthest-point samples of a mesh, made once per (spacing, seed). `pool` (M, 3): dense random points of the surface."""

    pool: np.ndarray
    cache: dict = field(default_factory=dict)

    def tree(self, spacing: float, seed: int) -> cKDTree:
        key = (spacing, seed)
        if key not in self.cache:
            self.cache[key] = cKDTree(farthest_points(self.pool, spacing, seed))
        return self.cache[key]


def farthest_points(pool: np.ndarray, spacing: float, seed: int) -> np.ndarray:
    """Picks points of `pool` (M, 3), each the farthest from those before it, until no gap is wider than `spacing`. Returns (K, 3), K >= 1.

    All pairs are at least `spacing` apart, so discs of radius below spacing / 2 never touch.
    """
    index = int(np.random.default_rng(seed).integers(len(pool)))
    chosen, distance = [index], np.full(len(pool), np.inf)
    while True:
        distance = np.minimum(distance, ((pool - pool[index]) ** 2).sum(-1))
        index = int(distance.argmax())
        if distance[index] < spacing**2:
            return pool[chosen]
        chosen.append(index)


@numba.njit(cache=True, inline="always")
def _hash(x, y, z, seed):
    low = 0xFFFFFFFF  # arithmetic in int64, kept to 32 bits by hand: numba widens uint32
    h = (x * 374761393 + y * 668265263 + z * 1442695041 + seed * 1274126177) & low
    h = ((h ^ (h >> 13)) * 1274126177) & low
    h = ((h ^ (h >> 15)) * 1103515245) & low
    return (h ^ (h >> 16)) / 4294967296.0


@numba.njit(cache=True)
def _fbm(points, frequency, octaves, seed, out):
    for n in range(points.shape[0]):
        total, scale, amplitude = 0.0, 1.0, 1.0
        for octave in range(octaves):
            px, py, pz = points[n, 0] * frequency * scale, points[n, 1] * frequency * scale, points[n, 2] * frequency * scale
            ix, iy, iz = int(np.floor(px)), int(np.floor(py)), int(np.floor(pz))
            fx, fy, fz = px - ix, py - iy, pz - iz
            ux, uy, uz = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy), fz * fz * (3 - 2 * fz)
            value = 0.0
            for corner in range(8):
                cx, cy, cz = corner & 1, (corner >> 1) & 1, corner >> 2
                weight = (ux if cx else 1 - ux) * (uy if cy else 1 - uy) * (uz if cz else 1 - uz)
                value += weight * _hash(ix + cx, iy + cy, iz + cz, seed + octave)
            total += amplitude * (2 * value - 1)
            scale *= 2.0
            amplitude *= 0.5
        out[n] = total


def fbm(points: np.ndarray, frequency: float, octaves: int = 3, seed: int = 0) -> np.ndarray:
    """Fractal value noise at `points` (N, 3): (N,) of mean about 0, mostly within [-1, 1]; first octave has cells of 1 / frequency."""
    points = np.ascontiguousarray(points, dtype=np.float64)
    out = np.empty(len(points))
    _fbm(points, frequency, octaves, seed, out)
    return out


def _mix(a, b, weight: np.ndarray) -> np.ndarray:
    weight = np.clip(weight, 0.0, 1.0)[:, None]
    return np.asarray(a) * (1 - weight) + np.asarray(b) * weight


def _step(value: np.ndarray, edge: float = 0.0, width: float = 0.02) -> np.ndarray:
    return np.clip((value - edge) / width + 0.5, 0.0, 1.0)


def unfold(surface: Surface, cell: float, even: bool) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v) on the surface in units of length: v goes up (z) on walls, both are horizontal on floors and lids.

    On a lathe shape u runs around the axis and is scaled so that a whole (if `even`: even) number of `cell` closes the circle;
    otherwise the point is projected along the axis its normal is closest to.
    """
    p, n = surface.position, np.abs(surface.normal)
    flat = n[:, 2] > 0.8 if surface.radius is not None else (n[:, 2] > n[:, 0] * 1.1) & (n[:, 2] > n[:, 1] * 1.1)
    if surface.radius is not None:
        step = 2 if even else 1
        cells = max(step * round(2 * np.pi * surface.radius / (cell * step)), 3 if not even else 4)
        u = np.arctan2(p[:, 1], p[:, 0]) / (2 * np.pi) * cells * cell
    else:
        u = np.where(n[:, 0] > n[:, 1], p[:, 1], p[:, 0])
    return np.where(flat, p[:, 0], u), np.where(flat, p[:, 1], p[:, 2])


def _plain(look, s, seed):
    return np.tile(COLORS[look.colors[0]], (len(s.position), 1)) * (1 + 0.02 * fbm(s.position, 4, 2, seed))[:, None]


def _striped(look, s, seed):
    width = (0.20, 0.24)[seed % 2]
    u, _ = unfold(s, width, even=True)
    across = u if look.vertical else s.position[:, 2] - BOTTOM
    wave = np.abs((across / width) % 2 - 1)  # triangle wave: crosses 1/2 at the edges of the stripes
    return _mix(COLORS[look.colors[0]], COLORS[look.colors[1]], _step(wave, 0.5, 0.1))


def _polka(look, s, seed):
    spacing = (0.36, 0.42)[seed % 2]
    distance, _ = s.samples.tree(spacing, seed % 4).query(s.position)
    return _mix(COLORS[look.colors[1]], COLORS[look.colors[0]], _step(distance, 0.36 * spacing, 0.015))


def _checkered(look, s, seed):
    cell = (0.30, 0.36)[seed % 2]
    u, v = unfold(s, cell, even=True)
    parity = (np.floor(u / cell) + np.floor((v - BOTTOM) / cell)) % 2
    return _mix(COLORS[look.colors[0]], COLORS[look.colors[1]], parity)


def _brick(look, s, seed):
    height, length, mortar = 0.26, 0.54, 0.055
    u, v = unfold(s, length, even=False)
    course = np.floor((v - BOTTOM) / height)
    along = u / length + 0.5 * (course % 2)
    brick = np.floor(along)
    to_joint = np.minimum(0.5 - np.abs(along % 1 - 0.5), 0.5) * length
    to_bed = (0.5 - np.abs((v - BOTTOM) / height % 1 - 0.5)) * height
    tone = 1 + 0.14 * (np.sin(brick * 12.9898 + course * 78.233 + seed) * 43758.5453 % 1 * 2 - 1) + 0.06 * fbm(s.position, 14, 2, seed)
    # A brick is never quite its pure colour: a red brick is a dull red.
    color = 0.85 * np.array(COLORS[look.colors[0]]) + 0.15 * np.array([0.45, 0.30, 0.22])
    joint = (0.35, 0.34, 0.32) if look.colors[0] in ("white", "yellow") else (0.84, 0.82, 0.78)
    return _mix(joint, color * tone[:, None], _step(np.minimum(to_joint, to_bed), mortar / 2, 0.012))


def _wood(look, s, seed):
    p = s.position
    warp = fbm(p * [1, 1, 0.35], 1.7, 2, seed)
    # Year rings around an axis outside the object: upright streaks and arches on any shape, never an all-even surface.
    ring = np.hypot(p[:, 0] - 0.62 + 0.10 * p[:, 2], p[:, 1] + 0.47 - 0.08 * p[:, 2]) + 0.10 * warp
    phase = ring / 0.165 % 1
    dark = np.where(phase < 0.75, phase / 0.75, (1 - phase) / 0.25) ** 1.6  # soft early wood, abrupt late wood
    fibre = fbm(p * [1, 1, 0.08], 26, 2, seed + 5)
    return _mix((0.83, 0.57, 0.31), (0.33, 0.16, 0.06), dark * 0.95 + 0.10 * fibre)


def _marble(look, s, seed):
    p = s.position
    warp = fbm(p, 1.5, 4, seed)
    vein = np.exp(-np.abs(np.sin(2.6 * (p @ [0.6, 0.5, 0.9]) + 2.2 * warp)) / 0.12)
    fine = 0.5 * np.exp(-np.abs(fbm(p, 2.3, 3, seed + 9)) / 0.05)
    cloud = 0.08 * fbm(p, 2, 2, seed + 3)
    return _mix((0.93, 0.92, 0.90), (0.27, 0.28, 0.32), np.maximum(vein, fine) * 0.85) + cloud[:, None] * 0.5


def _metal(dark, middle, bright):
    def paint(look, s, seed):
        n = s.normal
        # A made-up room fixed to the world: bright ceiling, dark horizon, warm floor, two windows. It must not turn with the camera.
        # The height of the point is in it too, so that flat walls are not a single colour.
        height = 0.9 * n[:, 2] + 0.12 * np.sin(3 * np.arctan2(n[:, 1], n[:, 0])) + 0.35 * s.position[:, 2]
        sky = _mix(middle, bright, np.clip((height - 0.15) / 0.55, 0, 1) ** 1.2)
        floor = _mix(dark, middle, np.clip((-height - 0.05) / 0.7, 0, 1))
        return _mix(floor, sky, _step(height, 0.10, 0.30))

    return paint


def _rust(look, s, seed):
    patch, fine = fbm(s.position, 1.9, 4, seed), fbm(s.position, 9, 3, seed + 7)
    rust = _mix((0.70, 0.30, 0.08), (0.36, 0.14, 0.05), 0.5 + 0.6 * fine)
    return _mix(np.array((0.47, 0.50, 0.53)) * (1 + 0.06 * fine)[:, None], rust, _step(patch, -0.05, 0.25))


def _cells(s: Surface, spacing: float, seed: int, wobble: float = 0.0):
    """Voronoi cells of the surface samples: distance to the cell's edge (about), distance to its centre, number of the cell."""
    p = s.position
    if wobble:
        p = p + wobble * np.stack([fbm(p, 5, 2, seed + 20 + axis) for axis in range(3)], -1)
    distance, index = s.samples.tree(spacing, seed % 4).query(p, k=2)
    return (distance[:, 1] - distance[:, 0]) / 2, distance[:, 0], index[:, 0]


def _tone(index: np.ndarray, seed: int) -> np.ndarray:
    return np.sin(index * 127.1 + seed * 3.7) * 43758.5453 % 1 * 2 - 1


def _lava(look, s, seed):
    edge, _, _ = _cells(s, 0.40, seed, 0.05)
    heat = np.clip(1 - edge / 0.085, 0, 1)
    crust = np.array((0.10, 0.06, 0.05)) * (1 + 0.5 * fbm(s.position, 9, 2, seed))[:, None]
    glow = _mix((0.85, 0.13, 0.02), (1.0, 0.80, 0.15), (heat - 0.45) / 0.4)
    return _mix(crust, glow, heat / 0.45)


def _stones(s, seed):
    edge, _, index = _cells(s, 0.34, seed, 0.02)
    shade = 0.58 + 0.12 * _tone(index, seed) + 0.05 * fbm(s.position, 11, 2, seed)
    stone = shade[:, None] * np.array((1.0, 0.97, 0.92)) * (0.72 + 0.28 * np.clip(edge / 0.10, 0, 1))[:, None]
    return _mix((0.13, 0.12, 0.11), stone, _step(edge, 0.026, 0.02))


def _cobblestone(look, s, seed):
    return _stones(s, seed)


def _moss(look, s, seed):
    green = _mix((0.13, 0.32, 0.06), (0.36, 0.55, 0.12), 0.5 + 0.6 * fbm(s.position, 10, 2, seed + 4))
    return _mix(_stones(s, seed), green, _step(fbm(s.position, 1.9, 4, seed + 11) + 0.15 * s.normal[:, 2], 0.02, 0.12))


def _zebra(look, s, seed):
    p = s.position
    band = p[:, 2] * 2.9 + 0.55 * fbm(p, 1.6, 2, seed)
    return _mix((0.04, 0.04, 0.05), (0.95, 0.95, 0.93), _step(np.abs(band % 1 - 0.5) * 2, 0.5, 0.12))


def _tiger(look, s, seed):
    p = s.position
    band = p[:, 2] * 2.7 + 0.65 * fbm(p, 1.9, 2, seed)
    width = 0.40 + 0.30 * fbm(p, 1.8, 2, seed + 3)  # stripes that swell, taper and end
    return _mix((0.06, 0.04, 0.03), (0.95, 0.50, 0.09), _step(np.abs(band % 1 - 0.5) * 2, width, 0.12))


def _leopard(look, s, seed):
    distance, _ = s.samples.tree(0.25, seed % 4).query(s.position)
    distance = distance + 0.022 * fbm(s.position, 6, 2, seed)
    gap = fbm(s.position, 4.5, 1, seed + 2)
    ring = _step(distance, 0.050, 0.015) * (1 - _step(distance, 0.102, 0.015)) * _step(gap, -0.42, 0.1)
    ground = _mix((0.62, 0.36, 0.11), (0.88, 0.64, 0.28), _step(distance, 0.075, 0.03))
    return _mix(ground, (0.07, 0.04, 0.02), ring)


def _giraffe(look, s, seed):
    edge, _, index = _cells(s, 0.36, seed, 0.03)
    patch = np.array((0.58, 0.28, 0.09)) * (1 + 0.18 * _tone(index, seed))[:, None]
    return _mix((0.94, 0.84, 0.62), patch, _step(edge, 0.036, 0.02))


def _mosaic(look, s, seed):
    edge, _, index = _cells(s, 0.21, seed)
    palette = np.array([COLORS[name] for name in ("red", "yellow", "blue", "turquoise", "green", "orange", "purple", "white")])
    return _mix((0.88, 0.87, 0.84), palette[(index * 7 + seed) % len(palette)], _step(edge, 0.018, 0.015))


def _cow(look, s, seed):
    return _mix((0.94, 0.93, 0.90), (0.06, 0.05, 0.05), _step(fbm(s.position, 2.1, 2, seed), 0.06, 0.06))


def _camouflage(look, s, seed):
    p = s.position
    color = np.tile((0.36, 0.40, 0.20), (len(p), 1))
    for layer, paint in enumerate(((0.62, 0.56, 0.36), (0.20, 0.26, 0.11), (0.10, 0.09, 0.07))):
        color = _mix(color, paint, _step(fbm(p, 2.2, 2, seed + 31 * layer), 0.22 + 0.06 * layer, 0.04))
    return color


def _watermelon(look, s, seed):
    p = s.position
    angle = np.arctan2(p[:, 1], p[:, 0]) / (2 * np.pi) * 9 + 0.30 * fbm(p, 5, 2, seed)
    light = np.array((0.52, 0.74, 0.28)) * (1 + 0.06 * fbm(p, 7, 2, seed + 1))[:, None]
    return _mix((0.05, 0.27, 0.07), light, _step(np.abs(angle % 1 - 0.5) * 2, 0.45, 0.2))


def _ladybug(look, s, seed):
    distance, _ = s.samples.tree(0.42, seed % 4).query(s.position)
    return _mix((0.05, 0.04, 0.04), (0.85, 0.06, 0.04), _step(distance, 0.135, 0.015))


def _rainbow(look, s, seed):
    order = np.array([COLORS[name] for name in ("purple", "blue", "turquoise", "green", "yellow", "orange", "red")])
    return order[np.clip(((s.position[:, 2] - BOTTOM) / 1.6 * 7).astype(int), 0, 6)]


PAINTERS = {
    "plain": _plain, "striped": _striped, "polka": _polka, "checkered": _checkered, "brick": _brick, "wood": _wood, "marble": _marble,
    "gold": _metal((0.45, 0.26, 0.04), (0.88, 0.60, 0.13), (1.0, 0.93, 0.56)),
    "silver": _metal((0.20, 0.21, 0.23), (0.62, 0.64, 0.67), (0.98, 0.98, 0.99)),
    "copper": _metal((0.28, 0.10, 0.05), (0.78, 0.40, 0.22), (1.0, 0.78, 0.62)),
    "rust": _rust, "lava": _lava, "moss": _moss, "cobblestone": _cobblestone, "zebra": _zebra, "leopard": _leopard, "giraffe": _giraffe,
    "tiger": _tiger, "cow": _cow, "camouflage": _camouflage, "watermelon": _watermelon, "mosaic": _mosaic, "ladybug": _ladybug,
    "rainbow": _rainbow,
}  # fmt: skip


def paint(look: Look, surface: Surface, seed: int) -> np.ndarray:
    """Albedo (N, 3) float32 in [0, 1] of `look` at the points of `surface`. One seed is one texture, in every view of a mesh."""
    if not len(surface.position):
        return np.zeros((0, 3), np.float32)
    color = PAINTERS[look.pattern](look, surface, int(seed))
    return np.clip(color, 0.0, 1.0).astype(np.float32)
