"""Make the bundled lights of custom/threestudio_pgc/assets/lights: a studio and a sky, 64 x 128 pixels of linear radiance.

    python launch_scripts/make_lights.py [--output DIRECTORY]

The camera of azimuth 0 stands on +x and looks at the origin, with +y to its right and +z up.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "custom"))

from threestudio_pgc.scene.environment import texel_directions  # noqa: E402
from threestudio_pgc.scene.hdr import LIGHTS_DIRECTORY, encode_hdr  # noqa: E402

HEIGHT = 64


def towards(azimuth_deg: float, elevation_deg: float) -> Tensor:
    """Unit direction (3,) float64."""
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    x, y = math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth)
    return torch.tensor([x, y, math.sin(elevation)], dtype=torch.float64)


def smoothstep(value: Tensor, start: float, end: float) -> Tensor:
    """0 before `start`, 1 after `end`, smooth between."""
    share = ((value - start) / (end - start)).clamp(0, 1)
    return share * share * (3 - 2 * share)


def lamp(directions: Tensor, azimuth_deg: float, elevation_deg: float, radius_deg: float, softness_deg: float) -> Tensor:
    """A round soft box (H, W, 1): 1 up to `radius_deg` from its middle, 0 from `softness_deg` further out."""
    angle = torch.rad2deg((directions @ towards(azimuth_deg, elevation_deg)).clamp(-1, 1).acos())
    return 1 - smoothstep(angle, radius_deg, radius_deg + softness_deg)[..., None]


def studio(directions: Tensor, solid_angles: Tensor) -> Tensor:
    """A neutral room with a key light upper left, a fill from the right and a rim light behind; irradiance / pi of 1 from the front."""
    height = directions[..., 2:]
    room = 0.35 + 0.15 * smoothstep(height, -0.3, 1.0)  # brighter towards the ceiling
    key, fill, rim = lamp(directions, -45, 40, 20, 8), lamp(directions, 60, 10, 18, 12), lamp(directions, 165, 30, 8, 6)
    room = room + 6.0 * key + 2.0 * fill + 6.0 * rim
    from_front = (directions[..., :1].clamp(min=0) * solid_angles * room).sum() / math.pi
    return (room / from_front).expand(-1, -1, 3)


def sky(directions: Tensor, solid_angles: Tensor) -> Tensor:
    """A clear sky, pale at the horizon, with a warm sun upper left, over a ground of 0.2; irradiance / pi of about 0.8 from the front."""
    zenith, horizon, ground, sun = (
        torch.tensor(color, dtype=torch.float64) for color in ([0.22, 0.42, 0.85], [0.75, 0.86, 1.0], [0.22, 0.2, 0.17], [1.0, 0.86, 0.66])
    )
    height = directions[..., 2:]
    above = horizon + (zenith - horizon) * height.clamp(min=0) ** 0.5
    air = ground + (above - ground) * smoothstep(height, -0.05, 0.05)
    disc = lamp(directions, -40, 45, 2.5, 2.5)
    glow = lamp(directions, -40, 45, 0, 30) ** 2
    share = (disc * solid_angles).sum() / math.pi
    return air + sun * (0.3 * glow + 0.9 / share * disc)  # seen face on, the sun alone is an irradiance / pi of 0.9


LIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"studio": studio, "sky": sky}


def make_light(name: str) -> bytes:
    """The bytes of a bundled light's file."""
    return encode_hdr(LIGHTS[name](*texel_directions(HEIGHT, torch.float64)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=LIGHTS_DIRECTORY, help="folder that the files go to")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    for name in LIGHTS:
        content = make_light(name)
        (output / f"{name}.hdr").write_bytes(content)
        print(f"{output / name}.hdr: {len(content)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
