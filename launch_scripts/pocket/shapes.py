"""Meshes of the training renders, made by formula; a dozen families with a few proportions each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .textures import SurfaceSamples

EXTENT = 0.8


@dataclass
class Shape:
    """`name`: key of `captions.SHAPES`; `vertices` (V, 3) in [-0.8, 0.8]; `faces` (F, 3); `lathe`: patterns wrap around the z axis."""

    name: str
    vertices: np.ndarray
    faces: np.ndarray
    lathe: bool
    weight: float

    def __post_init__(self):
        low, high = self.vertices.min(0), self.vertices.max(0)
        self.vertices = (self.vertices - (low + high) / 2) * (EXTENT / ((high - low).max() / 2))
        a, b, c = (self.vertices[self.faces[:, k]] for k in range(3))
        area = np.linalg.norm(np.cross(b - a, c - a), axis=-1)
        rng = np.random.default_rng(7)
        face = rng.choice(len(area), 6000, p=area / area.sum())
        u, v = rng.random((2, 6000, 1))
        u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
        self.samples = SurfaceSamples((a[face] * (1 - u - v) + b[face] * u + c[face] * v).astype(np.float64))
        self.radius = float(np.hypot(*self.samples.pool[:, :2].T).mean()) if self.lathe else None


def grid_faces(rows: int, columns: int, closed: bool) -> np.ndarray:
    """Triangles of a grid of vertices numbered row by row, the last column joined to the first; if `closed`, rows too."""
    r, c = np.meshgrid(np.arange(rows if closed else rows - 1), np.arange(columns), indexing="ij")
    a, b = r * columns + c, r * columns + (c + 1) % columns
    d, e = (r + 1) % rows * columns + c, (r + 1) % rows * columns + (c + 1) % columns
    return np.concatenate([np.stack([a, b, e], -1).reshape(-1, 3), np.stack([a, e, d], -1).reshape(-1, 3)])


def revolve(profile, smooth: int = 48, around: int = 72) -> tuple[np.ndarray, np.ndarray]:
    """Turns a profile [(radius, height), ...], from bottom to top, about z. Corner points given twice stay sharp."""
    profile = np.asarray(profile, float)
    pieces, start = [], 0
    for k in range(1, len(profile)):
        if np.allclose(profile[k], profile[k - 1]):  # a doubled point ends a piece: vertices are not shared, so normals are not averaged
            pieces.append(profile[start:k])
            start = k
    pieces.append(profile[start:])
    vertices, faces, count = [], [], 0
    angle = np.arange(around) / around * 2 * np.pi
    for piece in pieces:
        length = np.r_[0, np.cumsum(np.linalg.norm(np.diff(piece, axis=0), axis=1))]
        rows = np.unique(np.r_[length, np.linspace(0, length[-1], max(3, int(smooth * length[-1] / 2)))])
        radius, height = np.interp(rows, length, piece[:, 0]), np.interp(rows, length, piece[:, 1])
        x, y = radius[:, None] * np.cos(angle), radius[:, None] * np.sin(angle)
        ring = np.stack([x, y, np.broadcast_to(height[:, None], x.shape)], -1)
        vertices.append(ring.reshape(-1, 3))
        faces.append(grid_faces(len(rows), around, False) + count)
        count += len(rows) * around
    return np.concatenate(vertices), np.concatenate(faces)


def smooth_profile(points, count: int = 40):
    """A smooth curve through profile points (Catmull-Rom), for shapes without corners."""
    p = np.asarray(points, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    out = []
    for k in range(1, len(p) - 2):
        t = np.linspace(0, 1, max(2, count // (len(p) - 3)), endpoint=False)[:, None]
        a, b, c, d = p[k - 1 : k + 3]
        out.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    out = np.concatenate([*out, p[-2:-1]])
    out[:, 0] = np.maximum(out[:, 0], 0)
    return out


def box(center, size) -> tuple[np.ndarray, np.ndarray]:
    """A box with its own four vertices on each side (flat normals), 6 x 2 x 4 x 4 triangles."""
    vertices, faces = [], []
    n = 5
    s, t = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n), indexing="ij")
    quad = [(i * n + j, (i + 1) * n + j, (i + 1) * n + j + 1, i * n + j + 1) for i in range(n - 1) for j in range(n - 1)]
    for axis in range(3):
        for sign in (-1.0, 1.0):
            side = np.zeros((n, n, 3))
            side[..., axis], side[..., (axis + 1) % 3], side[..., (axis + 2) % 3] = sign, s * sign, t
            faces += [np.array([(a, b, c), (a, c, d)]) + len(vertices) * n * n for a, b, c, d in quad]
            vertices.append(side.reshape(-1, 3))
    return np.concatenate(vertices) * np.asarray(size) / 2 + np.asarray(center), np.concatenate(faces)


def join(*parts):
    vertices, faces, count = [], [], 0
    for v, f in parts:
        vertices.append(v)
        faces.append(f + count)
        count += len(v)
    return np.concatenate(vertices), np.concatenate(faces)


def tube(path: np.ndarray, radius: float, around: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """A closed tube of `radius` along the closed curve `path` (N, 3)."""
    tangent = np.roll(path, -1, 0) - np.roll(path, 1, 0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.cross(tangent, np.roll(tangent, -1, 0) + [0.05, 0.02, 0.1])
    normal -= tangent * (normal * tangent).sum(1, keepdims=True)
    for k in range(1, len(path)):  # parallel transport, so that the rings do not twist
        moved = normal[k - 1] - tangent[k] * (normal[k - 1] @ tangent[k])
        normal[k] = moved
        normal[k] /= np.linalg.norm(normal[k])
    normal[0] /= np.linalg.norm(normal[0])
    side = np.cross(tangent, normal)
    angle = np.arange(around) / around * 2 * np.pi
    vertices = path[:, None] + radius * (np.cos(angle)[:, None] * normal[:, None] + np.sin(angle)[:, None] * side[:, None])
    return vertices.reshape(-1, 3), grid_faces(len(path), around, True)


def _sphere(squeeze=1.0, egg=0.0):
    t = np.linspace(-np.pi / 2, np.pi / 2, 40)
    return revolve(np.stack([np.cos(t) * (1 - egg * np.sin(t)), np.sin(t) * squeeze], -1))


def _knot(p, q, inner, radius, count=160):
    t = np.arange(count) / count * 2 * np.pi
    ring = 1 + inner * np.cos(q * t)
    return tube(np.stack([ring * np.cos(p * t), ring * np.sin(p * t), 1.25 * inner * np.sin(q * t)], -1), radius)


def _turned(mesh, about_x):
    v, f = mesh
    c, s = np.cos(about_x), np.sin(about_x)
    return v @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]).T, f


def _blob(seed):
    rng = np.random.default_rng(seed)
    v, f = _sphere()
    v = v / np.linalg.norm(v, axis=1, keepdims=True).clip(1e-9)
    bump = sum(0.16 * np.sin(v @ rng.normal(size=3) * 2.2 + rng.uniform(0, 6.28)) for _ in range(5))
    return v * (1 + bump[:, None]), f


def _open_pot(profile, wall=0.06):
    """An outer profile and, turned back from the rim, an inner one: a vessel one can look into."""
    outer = np.asarray(profile, float)
    inner = outer[::-1] - [wall, 0]
    inner = inner[(inner[:, 0] > 0.05) & (inner[:, 1] > outer[0, 1] + wall)]
    return np.concatenate([[[0, outer[0, 1]]], outer[:1], outer, inner, [[0, outer[0, 1] + wall]]])


def shapes() -> list[Shape]:
    """All training shapes made by formula, the same in every call."""
    out: list[Shape] = []

    def add(name, mesh, lathe, weight=1.0):
        out.append(Shape(name, mesh[0], mesh[1], lathe, weight))

    add("sphere", _sphere(), True, 1.4)
    for size in ((1, 1, 1), (1, 1, 1.25), (1.2, 1, 0.9)):
        add("cube", box((0, 0, 0), size), False, 0.9)
    curves = (
        [(0.38, -1.0), (0.75, -0.45), (0.80, -0.1), (0.55, 0.35), (0.30, 0.65), (0.32, 0.8), (0.50, 1.0)],
        [(0.30, -1.0), (0.42, -0.6), (0.70, 0.1), (0.74, 0.4), (0.60, 0.7), (0.42, 0.85), (0.50, 1.0)],
        [(0.50, -1.0), (0.58, -0.6), (0.55, 0.0), (0.42, 0.5), (0.45, 0.8), (0.62, 1.0)],
        [(0.45, -1.0), (0.85, -0.5), (0.85, 0.0), (0.45, 0.4), (0.36, 0.6), (0.46, 0.75)],
    )
    for curve in curves:
        add("vase", revolve(_open_pot(smooth_profile(curve))), True, 0.9)
    t = np.arange(96) / 96 * 2 * np.pi
    circle = np.stack([np.cos(t), np.sin(t), 0 * t], -1)
    for radius, turn in ((0.38, 0.0), (0.45, 0.5), (0.36, np.pi / 2)):
        add("torus", _turned(tube(circle, radius, 40), turn), turn == 0.0, 0.6)
    for p, q, inner, radius, turn in ((2, 3, 0.5, 0.30, 0.0), (2, 3, 0.5, 0.28, np.pi / 2), (3, 2, 0.45, 0.2, 0.6)):
        add("knot", _turned(_knot(p, q, inner, radius), turn), False, 0.5)
    add("egg", _sphere(1.3, 0.16), True, 0.8)
    for neck, body in ((0.2, 0.5), (0.16, 0.42)):
        profile = smooth_profile([(body, -0.95), (body, -0.3), (body * 0.95, 0.1), (neck * 1.3, 0.5), (neck, 0.65), (neck, 0.95)])
        add("bottle", revolve(np.concatenate([[[0, -1], [body * 0.9, -1]], profile, [[neck, 1], [neck, 1], [0, 1]]])), True, 0.5)
    for radius in (0.5, 0.7, 0.95):
        add("cylinder", revolve([(0, -1), (radius, -1), (radius, -1), (radius, 1), (radius, 1), (0, 1)]), True, 0.4)
    for radius in (0.6, 0.9):
        add("cone", revolve([(0, -1), (radius, -1), (radius, -1), (0.02, 1)]), True, 0.4)
    half = np.linspace(0, np.pi / 2, 16)
    for length in (0.5, 0.9):
        cap = np.stack([np.cos(half), np.sin(half)], -1) * 0.55
        profile = np.concatenate([(cap * [1, -1] - [0, length])[::-1], cap + [0, length]])
        add("capsule", revolve(profile), True, 0.4)
    for seed in range(6):
        add("blob", _blob(seed), False, 0.5)
    for back, leg in ((1.0, 0.9), (0.7, 0.7)):
        legs = [box((x, y, leg / 2), (0.16, 0.16, leg)) for x in (-0.42, 0.42) for y in (-0.42, 0.42)]
        seat, rest = box((0, 0, leg + 0.08), (1, 1, 0.18)), box((-0.42, 0, leg + 0.1 + back / 2), (0.16, 1, back))
        add("chair", join(*legs, seat, rest), False, 0.45)
    legs = [box((x, y, 0.4), (0.2, 0.2, 0.8)) for x in (-0.65, 0.65) for y in (-0.5, 0.5)]
    add("table", join(*legs, box((0, 0, 0.9), (1.7, 1.4, 0.22))), False, 0.4)
    bowl = np.stack([np.sin(half), 1 - np.cos(half)], -1) * [1.0, 0.75]
    add("bowl", revolve(_open_pot(bowl[3:] + [0, 0.0], 0.08)), True, 0.6)
    cup = [(0.55, -0.7), (0.6, -0.2), (0.6, 0.7)]
    handle = np.stack([0.62 + 0.36 * np.cos(t), 0 * t, 0.42 * np.sin(t)], -1)
    add("mug", join(revolve(_open_pot(cup)), tube(handle, 0.09)), True, 0.5)
    return out
