"""Pictures and films of what was made. Images are (H, W, 3), float in [0, 1] or uint8, numpy or torch, row 0 on top."""

from __future__ import annotations

import io
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import atomic_path, write_bytes

Image = np.ndarray | Tensor

# Dark blue over grey to yellow, evenly growing lightness: read alike with the common colour blindnesses and in grey print.
_HEAT_COLORS = torch.tensor(
    [[0.0, 0.02, 0.16], [0.08, 0.2, 0.46], [0.36, 0.39, 0.49], [0.56, 0.54, 0.5], [0.8, 0.74, 0.39], [1.0, 0.97, 0.5]]
)
_NOT_FINITE_COLOR = torch.tensor([1.0, 0.0, 1.0])

PICTURE_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
WEBP_LIMIT = 16383  # pixels of a side


def to_uint8(image: Image) -> np.ndarray:
    """An image as (H, W, 3) uint8, rounded; a single channel is repeated, NaN becomes 0."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(f"image: found shape {array.shape}, wanted (H, W, 3)")
    if array.dtype != np.uint8:
        array = (np.nan_to_num(array.astype(np.float32), nan=0.0).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def encode_png(image: Image) -> bytes:
    """The image as a PNG file's bytes."""
    return encode_picture(to_uint8(image))


def encode_picture(pixels: np.ndarray, image_format: str = "png", quality: int = 90) -> bytes:
    """Pixels (H, W, 1, 3 or 4) uint8 as the bytes of a picture file. Runs beside other threads.

    Args:
        image_format: "png" keeps every value. It is lightly compressed: ten times faster than Pillow's default for a tenth more space.
            "jpeg" and "webp" are a fraction of the size and change values by a few of 255. "jpeg" has no fourth channel.
        quality: of jpeg and webp, 1 to 100.
    Raises:
        ValueError: an unknown format, or one that cannot hold the picture.
    """
    from PIL import Image as Pillow

    if image_format not in PICTURE_SUFFIXES:
        raise ValueError(f"image_format: found {image_format!r}, wanted one of {', '.join(PICTURE_SUFFIXES)}")
    if image_format == "jpeg" and pixels.shape[-1] == 4:
        raise ValueError("image_format: found 'jpeg' for a picture of 4 channels, wanted 'png' or 'webp'")
    if image_format == "webp" and max(pixels.shape[:2]) > WEBP_LIMIT:
        raise ValueError(f"image_format: found 'webp' for {pixels.shape[1]} x {pixels.shape[0]} pixels, wanted at most {WEBP_LIMIT} a side")
    options = {
        "png": {"compress_level": 1},
        "jpeg": {"quality": quality, "subsampling": 0},  # halving the resolution of "colour" would blur maps that are no colours
        # exact: what lies under an alpha of 0 is a map here, not nothing; methods 0 and 1 fail on large noisy pictures
        "webp": {"quality": quality, "method": 2, "exact": True},
    }
    buffer = io.BytesIO()
    Pillow.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format=image_format, **options[image_format])
    return buffer.getvalue()


def save_png(path: str | Path, image: Image) -> Path:
    """Write an image as PNG, atomically. Raises ExportError if the file cannot be written."""
    return write_bytes(path, encode_png(image))


def contact_sheet(images: Sequence[Image], columns: int | None = None, labels: Sequence[str] | None = None, *, gap: int = 4) -> np.ndarray:
    """Images of one size side by side in rows, (H', W', 3) uint8, on white.

    Args:
        columns: images per row; default: the squarest sheet.
        labels: a line of text under each image.
        gap: pixels between images.
    Raises:
        ValueError: no images, images of different sizes, or another number of labels than of images.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    tiles = [to_uint8(image) for image in images]
    if not tiles:
        raise ValueError("contact sheet: found no images, wanted at least one")
    sizes = {tile.shape for tile in tiles}
    if len(sizes) > 1:
        raise ValueError(f"contact sheet: found images of sizes {sorted(sizes)}, wanted one size")
    if labels is not None and len(labels) != len(tiles):
        raise ValueError(f"contact sheet: found {len(labels)} labels for {len(tiles)} images")
    columns = min(columns or int(np.ceil(len(tiles) ** 0.5)), len(tiles))
    rows = -(-len(tiles) // columns)
    height, width, _ = tiles[0].shape
    caption = 0 if labels is None else 14
    step_y, step_x = height + caption + gap, width + gap
    sheet = Pillow.new("RGB", (columns * step_x - gap, rows * step_y - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        x, y = index % columns * step_x, index // columns * step_y
        sheet.paste(Pillow.fromarray(tile), (x, y))
        if labels is not None:
            draw.text((x + 2, y + height + 1), _shortened(labels[index], width - 4, draw), fill="black")
    return np.asarray(sheet)


def write_video(path: str | Path, frames: Sequence[Image], fps: float = 25) -> Path:
    """Write frames of one size as an H.264 MP4, atomically; as a GIF, with a warning, where no ffmpeg is to be had.

    Returns:
        the file written: `path`, or `path` with the suffix .gif.
    Raises:
        ExportError: the file cannot be written.
        ValueError: no frames, or frames of different sizes.
    """
    path = Path(path)
    frames = [to_uint8(frame) for frame in frames]
    if not frames:
        raise ValueError(f"{path}: found no frames, wanted at least one")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{path}: found frames of sizes {sorted({frame.shape for frame in frames})}, wanted one size")
    try:
        import imageio_ffmpeg

        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        path = path.with_suffix(".gif")
        warnings.warn(f"no ffmpeg ({error}), so a GIF is written instead: {path}", stacklevel=2)
        return _write_gif(path, frames, fps)

    # H.264's usual colour format halves the resolution of colour, so sides must be even.
    height, width = (side + side % 2 for side in frames[0].shape[:2])
    padded = [np.pad(frame, ((0, height - len(frame)), (0, width - frame.shape[1]), (0, 0)), "edge") for frame in frames]
    command = [ffmpeg, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "-", "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p"]
    command += ["-movflags", "+faststart"]  # plays in a browser before it is loaded
    with atomic_path(path) as temporary:
        # Called here rather than through imageio's writer, which takes a film cut short by a full disk for a success.
        done = subprocess.run([*command, str(temporary)], input=np.stack(padded).tobytes(), capture_output=True)
        if done.returncode != 0:
            complaint = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
            raise OSError(f"ffmpeg: {complaint[-1]}")
    return path


def heat_map(values: Tensor, mask: Tensor | None = None, *, low: float = 0.0, high: float | None = None, log: bool = False) -> Tensor:
    """Non-negative values as colours, dark blue (low) over grey to yellow (high), for colour-blind readers too.

    Args:
        values: (...,), e.g. the norm of the gradient at every pixel, (B, H, W).
        mask: (...,) bool; other pixels are white and do not count for `high`.
        high: value of the brightest colour; default: the 99.9 % quantile of the finite values.
        log: logarithmic from max(low, high / 1000) to high.
    Returns:
        (..., 3) float32 in [0, 1]; values that are not finite are magenta.
    """
    values = values.detach().float().cpu()
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.detach().cpu().bool()
    finite = values.isfinite()
    shown = values[finite & mask]
    if high is None:
        # numpy's quantile: torch's refuses more than 16 million values
        high = float(np.quantile(shown.numpy(), 0.999)) if shown.numel() else 1.0
    values = torch.where(finite, values, torch.zeros_like(values))
    if log:
        low = max(low, high / 1000)
        share = (values.clamp(min=1e-38) / low).log() / np.log(high / low) if 0 < low < high else (values > 0).float()
    else:
        share = (values - low) / (high - low) if high > low else (values > low).float()
    position = share.clamp(0, 1) * (len(_HEAT_COLORS) - 1)
    index = position.long().clamp(max=len(_HEAT_COLORS) - 2)
    image = torch.lerp(_HEAT_COLORS[index], _HEAT_COLORS[index + 1], (position - index)[..., None])
    image[~finite] = _NOT_FINITE_COLOR
    image[~mask] = 1.0
    return image


def _write_gif(path: Path, frames: list[np.ndarray], fps: float) -> Path:
    from PIL import Image as Pillow

    first, *rest = [Pillow.fromarray(frame) for frame in frames]
    with atomic_path(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return path


def _shortened(text: str, width: int, draw) -> str:
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
