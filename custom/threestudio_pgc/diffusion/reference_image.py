"""The picture that a single-image prior is shown: cut out, centred, on white; and depth or normals that belong to it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_KEY, DEPTH_KEY, NORMAL_KEY = "data.image_path", "data.depth_path", "data.normal_path"
# Share of the frame left free on either side of the object's longer side. Zero123 was trained on objects in a unit cube, seen from 1.5 to
# 2.2 units at 49.1 degrees: at the middle distance that cube fills 0.6 of the frame.
BORDER = 0.2
SEEN = 0.05  # opacity below which a pixel does not count for the object's box: matting leaves a faint haze
SMALLEST = 16  # pixels on the object's longer side


class Frame(NamedTuple):
    """A square on a picture, in the picture's own pixels; it may reach beyond the picture."""

    alpha: Tensor  # (h, w) the picture's opacity
    top: int
    left: int
    side: int


class ReferenceImage(NamedTuple):
    rgb: Tensor  # (size, size, 3) in [0, 1], on white
    mask: Tensor  # (size, size, 1) opacity in [0, 1]
    frame: Frame  # where both were cut out, for `load_reference_depth` and `load_reference_normal`


def load_reference_image(path: str | Path, *, size: int, border: float = BORDER, key: str = IMAGE_KEY) -> ReferenceImage:
    """A picture with a transparent background as a square of `size` pixels.

    The frame is centred on the object's bounding box, whose longer side fills 1 - 2 border of it, to within a pixel of the file. Colours
    are resampled weighted by their opacity, so that what lies hidden under transparent pixels does not show as a fringe.

    Raises ValueError, naming `key` and the file: no such file, no picture, no transparency, nothing but transparency, an object of fewer
    than 16 pixels; and naming data.border where it is not in [0, 0.4].
    """
    if not 0 <= border <= 0.4:
        raise ValueError(f"data.border: found {border}, wanted a share of the frame in [0, 0.4]")
    path = Path(path).expanduser()
    wanted = "wanted a picture with a transparent background, such as an RGBA PNG; remove the background with any matting tool"
    picture = _open(path, key, wanted)
    if picture.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in picture.info:
        raise ValueError(f"{key}: {path} has no transparency, found mode {picture.mode}; {wanted}")
    rgba = torch.from_numpy(np.array(picture.convert("RGBA"))).float().permute(2, 0, 1) / 255
    rgb, alpha = rgba[:3], rgba[3]
    if alpha.min() >= 0.5:
        raise ValueError(f"{key}: {path} is opaque everywhere, found no pixel with an alpha below 0.5; {wanted}")
    rows, columns = ((alpha > SEEN).any(dim=dim).nonzero().squeeze(-1) for dim in (1, 0))
    if len(rows) == 0:
        raise ValueError(f"{key}: {path} is transparent everywhere, found no pixel with an alpha above {SEEN}; wanted an object in it")
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    if max(height, width) < SMALLEST:
        raise ValueError(f"{key}: the object in {path} is {width} x {height} pixels, wanted at least {SMALLEST} on its longer side")
    side = round(max(height, width) / (1 - 2 * border))
    frame = Frame(alpha, int(rows[0]) - (side - height) // 2, int(columns[0]) - (side - width) // 2, side)

    placed = _place(torch.cat([rgb * alpha, alpha[None]]), frame, size).clamp(0, 1)
    mask = placed[3:]
    return ReferenceImage((placed[:3] + 1 - mask).clamp(0, 1).permute(1, 2, 0), mask.permute(1, 2, 0), frame)


def load_reference_depth(path: str | Path, frame: Frame, *, size: int, key: str = DEPTH_KEY) -> Tensor:
    """Depth of the reference picture in its frame, (size, size, 1) float32, larger is farther, in any unit; 0 where it is transparent.

    path  a greyscale picture of 8 or 16 bits (read as [0, 1]) or a .npy array (h, w), of the size of the picture's file

    Inverse depth (disparity, larger is nearer), which many estimators give, must be inverted before.

    Raises ValueError, naming `key` and the file: no such file, no such array, another size, values that are not finite on the object.
    """
    values = _read_map(Path(path).expanduser(), frame, key, channels=1)
    return _place_weighted(values, frame, size)


def load_reference_normal(path: str | Path, frame: Frame, *, size: int, key: str = NORMAL_KEY) -> Tensor:
    """Normals of the reference picture in its frame, (size, size, 3) float32, unit, 0 where it is transparent.

    Camera space: x right, y up, z towards the viewer. path: an RGB picture of (n + 1) / 2 or a .npy array (h, w, 3) of n in [-1, 1], of
    the size of the picture's file. Raises as `load_reference_depth`.
    """
    values = _read_map(Path(path).expanduser(), frame, key, channels=3)
    return F.normalize(_place_weighted(values, frame, size), dim=-1)


def _open(path: Path, key: str, wanted: str):
    from PIL import Image, ImageOps

    if not path.is_file():
        raise ValueError(f"{key}: no file {path}, {wanted}")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)  # loads it, and turns it as viewers show it
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{key}: {path} cannot be read as a picture ({error}), {wanted}") from error


def _read_map(path: Path, frame: Frame, key: str, channels: int) -> Tensor:
    """(channels, h, w) float32, zero where the picture is transparent."""
    if path.suffix == ".npy" and path.is_file():
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{key}: {path} cannot be read as an array ({error})") from error
        array = array[..., None] if array.ndim == 2 else array
    else:
        array = _picture_map(path, key, channels)
    wanted = (*frame.alpha.shape, channels)
    if array.shape != wanted or array.dtype.kind not in "fiu":
        raise ValueError(f"{key}: {path} holds {array.dtype} of shape {array.shape}, wanted numbers {wanted}, as {IMAGE_KEY} has pixels")
    values = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)
    values = torch.where(frame.alpha > 0, values, 0.0)
    if not values.isfinite().all():
        raise ValueError(f"{key}: {path} holds values on the object that are not finite, wanted numbers only")
    return values


def _picture_map(path: Path, key: str, channels: int) -> np.ndarray:
    """(h, w, channels): depth in [0, 1], normals in [-1, 1]."""
    kind, modes = {1: ("a greyscale", ("L", "I", "I;16", "F")), 3: ("an RGB", ("RGB", "RGBA"))}[channels]
    wanted = f"wanted {kind} picture or a .npy array"
    picture = _open(path, key, wanted)
    if picture.mode not in modes:
        raise ValueError(f"{key}: {path} is a picture of mode {picture.mode}, {wanted}")
    array = np.array(picture)
    if channels == 3:
        return array[..., :3] / 127.5 - 1
    scale = {"L": 255, "F": 1}.get(picture.mode, 65535)  # a PNG of 16 bits comes as "I;16" or "I"
    return array[..., None] / scale


def _place(values: Tensor, frame: Frame, size: int) -> Tensor:
    """(C, h, w) -> (C, size, size): what lies in the frame, 0 beyond the picture."""
    height, width = values.shape[-2:]
    # negative padding cuts off
    sides = (-frame.left, frame.left + frame.side - width, -frame.top, frame.top + frame.side - height)
    return F.interpolate(F.pad(values, sides)[None], (size, size), mode="bilinear", align_corners=False, antialias=True)[0]


def _place_weighted(values: Tensor, frame: Frame, size: int) -> Tensor:
    """(C, h, w) -> (size, size, C), each pixel the mean over the object's share of it."""
    placed = _place(torch.cat([values * frame.alpha, frame.alpha[None]]), frame, size)
    share = placed[-1:]
    return torch.where(share > 1e-3, placed[:-1] / share.clamp(min=1e-3), 0.0).permute(1, 2, 0)
