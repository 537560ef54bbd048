"""Cameras that look at the origin, in the host's conventions.

World: right-handed, z up; azimuth 0 stands on +x and grows towards +y. Camera: OpenGL (looks along -z, y up). Projection: flips y, so
that the rasterisers' row 0 (y/w = -1) is the top of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NEAR, FAR = 0.1, 1000.0


@dataclass
class Cameras:
    """B cameras."""

    c2w: Tensor  # (B, 4, 4) camera to world, rotation part of determinant +1
    proj: Tensor  # (B, 4, 4) camera to clip
    mvp: Tensor  # (B, 4, 4) world to clip: clip = v_hom @ mvp.T
    positions: Tensor  # (B, 3) world
    elevation_deg: Tensor  # (B,)
    azimuth_deg: Tensor  # (B,)
    distance: Tensor  # (B,) from the origin
    fovy: Tensor  # (B,) radians

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> Cameras:
        """A subset, always batched: an int gives a batch of one."""
        if isinstance(index, int):
            index = torch.tensor([index])  # raises IndexError past the end, which is what ends a loop over the cameras
        return Cameras(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: str | torch.device) -> Cameras:
        return Cameras(*(getattr(self, field.name).to(device) for field in fields(self)))

    def clip(self, vertices: Tensor) -> Tensor:
        """Clip-space positions (B, V, 4) of world vertices (V, 3), in the vertices' dtype; differentiable."""
        homogeneous = torch.cat([vertices, torch.ones_like(vertices[:, :1])], dim=-1)
        return homogeneous @ self.mvp.to(vertices.dtype).transpose(1, 2)


def fovy_from_focal(focal: float | Tensor) -> float | Tensor:
    """Vertical field of view in radians of a focal length given in image heights: 2 atan(1 / (2 focal))."""
    if isinstance(focal, Tensor):
        return 2 * torch.atan(0.5 / focal)
    return 2 * math.atan(0.5 / focal)


def look_at_cameras(
    elevation_deg: float | Tensor,
    azimuth_deg: float | Tensor,
    distance: float | Tensor,
    fovy: float | Tensor,
    aspect: float = 1.0,
) -> Cameras:
    """Cameras on a sphere, looking at the origin with z up.

    Args:
        elevation_deg, azimuth_deg, distance, fovy: numbers or (B,); what is shorter is broadcast. fovy is in radians.
        aspect: width / height.
    """
    given = [torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in (elevation_deg, azimuth_deg, distance, fovy)]
    elevation_deg, azimuth_deg, distance, fovy = torch.broadcast_tensors(*given)
    if not bool((distance > 0).all()) or not bool(((fovy > 0) & (fovy < math.pi)).all()):
        raise ValueError(f"cameras: want distance > 0 and 0 < fovy < pi, got {distance.tolist()} and {fovy.tolist()}")
    elevation, azimuth = torch.deg2rad(elevation_deg), torch.deg2rad(azimuth_deg)
    zero = torch.zeros_like(elevation)
    back = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1)
    # from the azimuth, not from a cross product with z: stays defined when looking straight down
    right = torch.stack([-azimuth.sin(), azimuth.cos(), zero], dim=-1)
    up = torch.linalg.cross(back, right)
    positions = back * distance[:, None]

    batch = len(distance)
    c2w = torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1)
    c2w[:, :3] = torch.stack([right, up, back, positions], dim=-1)
    w2c = torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1)
    w2c[:, :3, :3] = c2w[:, :3, :3].transpose(1, 2)
    w2c[:, 2, 3] = -distance

    scale = 1 / torch.tan(fovy / 2)
    proj = torch.zeros(batch, 4, 4, dtype=torch.float64)
    proj[:, 0, 0] = scale / aspect
    proj[:, 1, 1] = -scale
    proj[:, 2, 2] = -(FAR + NEAR) / (FAR - NEAR)
    proj[:, 2, 3] = -2 * FAR * NEAR / (FAR - NEAR)
    proj[:, 3, 2] = -1
    computed = (c2w, proj, proj @ w2c, positions, elevation_deg, azimuth_deg, distance, fovy)
    return Cameras(*(tensor.float().contiguous() for tensor in computed))


@dataclass
class CameraRanges:
    """Ranges that cameras are drawn from uniformly; the defaults are the paper's."""

    focal: tuple[float, float] = (0.7, 1.35)  # image heights
    distance: tuple[float, float] = (2.0, 2.5)
    elevation_deg: tuple[float, float] = (-10.0, 45.0)
    azimuth_deg: tuple[float, float] = (0.0, 360.0)


def sample_cameras(
    batch: int,
    ranges: CameraRanges | None = None,
    generator: torch.Generator | None = None,
    stratified_azimuth: bool = True,
    aspect: float = 1.0,
) -> Cameras:
    """`batch` random cameras; every quantity is drawn per view.

    With `stratified_azimuth` the range of azimuths is cut into `batch` equal parts and one is drawn from each, so that the views of a
    step look from different sides; the order of the parts is not shuffled.
    """
    ranges = ranges or CameraRanges()

    def draw(bounds: tuple[float, float], offsets: Tensor) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * offsets

    uniform = torch.rand(4, batch, generator=generator, dtype=torch.float64)
    turn = uniform[3]
    if stratified_azimuth:
        turn = (torch.arange(batch, dtype=torch.float64) + turn) / max(batch, 1)
    return look_at_cameras(
        draw(ranges.elevation_deg, uniform[2]),
        draw(ranges.azimuth_deg, turn),
        draw(ranges.distance, uniform[1]),
        fovy_from_focal(draw(ranges.focal, uniform[0])),
        aspect,
    )


def orbit_cameras(count: int, elevation_deg: float = 15.0, distance: float = 2.25, focal: float = 1.0, aspect: float = 1.0) -> Cameras:
    """`count` cameras evenly around the object, the first at azimuth 0."""
    azimuth = torch.arange(count, dtype=torch.float64) * (360.0 / max(count, 1))
    return look_at_cameras(elevation_deg, azimuth, distance, fovy_from_focal(focal), aspect)
