"""Backgrounds: what is seen where the mesh is not. Each is called with the size wanted and returns (B, H, W, 3) rgb in [0, 1]."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


class SolidBackground:
    """The same flat colour behind every view."""

    def __init__(self, color: tuple[float, float, float] = (1.0, 1.0, 1.0)):
        self.color = tuple(float(channel) for channel in color)
        if len(self.color) != 3 or not all(0 <= channel <= 1 for channel in self.color):
            raise ValueError(f"background color: found {list(color)}, wanted three numbers in [0, 1]")

    def __call__(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        return torch.tensor(self.color, device=device).expand(batch, height, width, 3)


class RandomBackground:
    """A flat colour per view, uniform in the rgb cube, so that the texture cannot lean on what is behind it."""

    def __call__(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """`generator` draws the colours (torch's global one if None); the draw is on its device, so the same on every `device`."""
        where = generator.device if generator is not None else "cpu"
        colors = torch.rand(batch, 1, 1, 3, generator=generator, device=where).to(device)
        return colors.expand(batch, height, width, 3)


class ImageBackground:
    """A picture behind every view, resized to the view's size.

    Raises:
        ValueError: the file is missing or is no picture; the message names it.
    """

    def __init__(self, path: str | Path):
        import numpy as np
        from PIL import Image

        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(f"background image: no file {path}, wanted a picture such as a PNG or JPEG")
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"background image: {path} cannot be read as a picture ({error})") from error
        self.path = path
        self.image = torch.from_numpy(pixels.copy()).float() / 255  # (H, W, 3), row 0 = top

    def __call__(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        channels_first = self.image.permute(2, 0, 1)[None]
        # antialias: a photograph is often ten times as large as the view
        resized = F.interpolate(channels_first, (height, width), mode="bilinear", align_corners=False, antialias=True)
        return resized.clamp(0, 1).permute(0, 2, 3, 1).to(device).expand(batch, height, width, 3)


BACKGROUNDS = {"solid": SolidBackground, "random": RandomBackground, "image": ImageBackground}
