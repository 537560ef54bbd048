"""Triangles to be rasterised by more than one test."""

import math

import torch

TRIANGLE = torch.tensor([[0, 1, 2]])


def clip_of(points: list[list[float]], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(1, V, 4) from rows of x, y, z, w."""
    return torch.tensor(points, dtype=dtype)[None]


def soup(seed: int, triangles: int, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of unconnected random triangles in front of a perspective eye, all with w > 0."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(2, triangles, 1, 2, generator=generator, dtype=torch.float64) * 2.4 - 1.2
    xy = centre + (torch.rand(2, triangles, 3, 2, generator=generator, dtype=torch.float64) - 0.5) * spread
    w = 1 + 3 * torch.rand(2, triangles, 3, 1, generator=generator, dtype=torch.float64)
    clip = torch.cat([xy * w, 0.9 * w - 0.5, w], dim=-1).reshape(2, -1, 4)
    return clip.to(dtype), torch.arange(3 * triangles).reshape(-1, 3)


def tent() -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of four triangles around a common vertex, at different depths, partly hidden by one that crosses w = 0."""
    points = [[-0.9, -0.8, 0.1, 1.0], [0.9, -0.7, 0.3, 1.3], [0.8, 0.9, 0.2, 0.9], [-0.8, 0.7, 0.1, 0.8], [0.1, 0.05, 0.6, 1.1]]
    crossing = [[-3, 0.9, 0.4, -0.2], [0.4, 0.9, -0.4, 1.4], [0.2, 1.6, -0.2, 1.5]]
    clip = clip_of(points + crossing).repeat(2, 1, 1)
    clip[1] += 0.1 * torch.rand(clip[1].shape, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    return clip, torch.tensor([[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4], [5, 6, 7]])


OFF_SCREEN = {
    "left": [[-3, -1, 0, 1], [-2, 1, 0, 1], [-1.5, -1, 0, 1]],
    "above": [[-1, -3, 0, 1], [1, -3, 0, 1], [0, -1.1, 0, 1]],
    "beyond the far plane": [[-1, -1, 1.1, 1], [1, -1, 1.1, 1], [0, 1, 1.1, 1]],
    "before the near plane": [[-1, -1, -1.1, 1], [1, -1, -1.1, 1], [0, 1, -1.1, 1]],
    "behind the eye": [[-1, -1, 0, -1], [1, -1, 0, -1], [0, 1, 0, -1]],
    "at w = 0": [[-1, -1, 0, 0], [1, -1, 0, 0], [0, 1, 0, 0]],
    "no area": [[-1, -1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1]],
    "a point": [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]],
    "not finite": [[float("nan"), -1, 0, 1], [1, -1, 0, 1], [0, 1, 0, 1]],
    "not finite depth": [[-1, -1, float("nan"), 1], [1, -1, 0, 1], [0, 1, 0, 1]],
    "infinite": [[float("inf"), -1, 0, 1], [1, -1, 0, 1], [0, 1, 0, 1]],
    "too far to be seen": [[1e30, -1e30, 0, 1], [2e30, -1e30, 0, 1], [1e30, 1e30, 0, 1]],
}


def grid(rows: int, columns: int, closed: bool) -> torch.Tensor:
    """Faces (F, 3) of a grid of rows x columns vertices; `closed`: the last row and column meet the first."""
    last_row, last_column = (rows, columns) if closed else (rows - 1, columns - 1)
    row, column = torch.meshgrid(torch.arange(last_row), torch.arange(last_column), indexing="ij")
    below, right = (row + 1) % rows, (column + 1) % columns
    a, b, c, d = row * columns + column, below * columns + column, below * columns + right, row * columns + right
    return torch.stack([torch.stack([a, b, c], dim=-1), torch.stack([a, c, d], dim=-1)]).reshape(-1, 3)


def torus(triangles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices (V, 3) float64 and faces of a bumpy torus of about so many triangles."""
    rows = round(math.sqrt(triangles / 2))
    angle = torch.arange(rows, dtype=torch.float64) * (2 * math.pi / rows)
    u, v = torch.meshgrid(angle, angle, indexing="ij")
    tube = 0.25 + 0.03 * torch.sin(7 * u) * torch.sin(5 * v)
    ring = 0.55 + tube * v.cos()
    return torch.stack([ring * u.cos(), ring * u.sin(), tube * v.sin()], dim=-1).reshape(-1, 3), grid(rows, rows, closed=True)
