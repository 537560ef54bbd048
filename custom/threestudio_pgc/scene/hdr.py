"""Equirectangular pictures of linear radiance: Radiance (.hdr, .pic) and OpenEXR (.exr) files, and the bundled lights.

Radiance's format is that of Ward: "Real Pixels", Graphics Gems II, 1991: four bytes a pixel, three mantissas under one exponent (RGBE).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .mesh import BUILTIN_PREFIX

LIGHTS_DIRECTORY = Path(__file__).resolve().parent.parent / "assets" / "lights"
RADIANCE_SUFFIXES = (".hdr", ".pic")
EXR_SUFFIX = ".exr"
MAX_HEIGHT = 8192
RUN_LENGTH_WIDTHS = (8, 32767)  # a row outside of these widths is stored flat
LONGEST_LITERAL, LONGEST_RUN, SHORTEST_RUN = 128, 127, 4


class LightError(ValueError):
    """A picture cannot be used as a light; the message names the file, what was found and what is wanted."""


def _builtin_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(LIGHTS_DIRECTORY.glob("*.hdr"))}


def builtin_light_names() -> list[str]:
    return list(_builtin_files())


def builtin_light_path(name: str) -> Path:
    """File of a bundled light. Raises LightError for an unknown name, listing the known ones."""
    files = _builtin_files()
    if name not in files:
        raise LightError(f"{BUILTIN_PREFIX}{name}: no such bundled light; there are {', '.join(files) or 'none'}")
    return files[name]


def read_hdr(path: str | Path) -> Tensor:
    """Linear radiance (H, 2H, 3) float32 >= 0 of an equirectangular picture, row 0 = top, or of a bundled one as "builtin:NAME".

    .hdr and .pic: RGBE, whatever its run-length coding, rows from the top and columns from the left. The header's EXPOSURE and COLORCORR
    are not applied (Blender does not either): the light's `intensity` is for that. .exr: channels R, G and B, or Y alone, half or float.

    Raises:
        LightError: no such file; a folder; another suffix; not of its suffix' format; XYZE; another orientation; cut short or corrupt;
            not 2 : 1, smaller than 2 x 4 or higher than MAX_HEIGHT; pixels that are NaN, infinite or negative.
    """
    name = str(path)
    if name.startswith(BUILTIN_PREFIX):
        path = builtin_light_path(name.removeprefix(BUILTIN_PREFIX))
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        raise LightError(f"{name}: found a folder, wanted a picture (.hdr, .pic or .exr)")
    if not path.is_file():
        raise LightError(f"{name}: no such file, wanted a picture (.hdr, .pic or .exr) or {BUILTIN_PREFIX}NAME")
    if suffix not in (*RADIANCE_SUFFIXES, EXR_SUFFIX):
        raise LightError(f"{name}: found suffix {path.suffix!r}, wanted .hdr, .pic or .exr")
    image = _read_exr(path, name) if suffix == EXR_SUFFIX else _decode_radiance(path.read_bytes(), name)
    finite = np.isfinite(image)
    if not (finite & (image >= 0)).all():
        n_wild, n_negative = (~finite).any(axis=-1).sum(), (image < 0).any(axis=-1).sum()
        found = f"{n_wild} pixels that are NaN or infinite and {n_negative} that are negative"
        raise LightError(f"{name}: found {found}, wanted finite radiance of at least 0")
    return torch.from_numpy(image)


def encode_hdr(image: Tensor) -> bytes:
    """A Radiance file, run-length coded, of linear radiance (H, W, 3) >= 0.

    A channel is stored within 1/256 of the pixel's largest one.

    Raises:
        LightError: not (H, W, 3), or NaN, infinite or negative pixels.
    """
    pixels = image.detach().cpu().double().numpy()
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.size == 0:
        raise LightError(f"image: found shape {tuple(pixels.shape)}, wanted (height, width, 3)")
    if not (np.isfinite(pixels) & (pixels >= 0)).all():
        raise LightError("image: found pixels that are NaN, infinite or negative, wanted finite radiance of at least 0")
    height, width, _ = pixels.shape
    rgbe = _to_rgbe(pixels)
    header = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {height} +X {width}\n".encode()
    if not RUN_LENGTH_WIDTHS[0] <= width <= RUN_LENGTH_WIDTHS[1]:
        return header + rgbe.tobytes()
    start = bytes([2, 2, width >> 8, width & 255])
    rows = (start + b"".join(_run_lengths(row[:, channel].tobytes()) for channel in range(4)) for row in rgbe)
    return header + b"".join(rows)


def _to_rgbe(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) float64 -> (H, W, 4) uint8."""
    largest = pixels.max(axis=-1)
    exponent = np.frexp(largest)[1]
    exponent += np.rint(np.ldexp(largest, 8 - exponent)) > 255  # 255.7 rounds to 256, which is no byte
    mantissas = np.rint(np.ldexp(pixels, 8 - exponent[..., None]))
    stored = np.concatenate([mantissas, exponent[..., None] + 128], axis=-1)
    stored[(largest == 0) | (exponent < -127)] = 0
    if (stored > 255).any():
        raise LightError(f"image: found radiance {pixels.max():.3g}, wanted at most 1.7e38")
    return stored.astype(np.uint8)


def _run_lengths(values: bytes) -> bytes:
    """One channel of a row: 128 + n and a byte for n equal ones, n and n bytes otherwise."""
    coded, literal, at = bytearray(), bytearray(), 0

    def flush():
        for first in range(0, len(literal), LONGEST_LITERAL):
            part = literal[first : first + LONGEST_LITERAL]
            coded.append(len(part))
            coded.extend(part)
        literal.clear()

    while at < len(values):
        run = 1
        while run < LONGEST_RUN and values[at + run : at + run + 1] == values[at : at + 1]:
            run += 1
        if run >= SHORTEST_RUN:
            flush()
            coded += bytes([128 + run, values[at]])
        else:
            literal += values[at : at + run]
        at += run
    flush()
    return bytes(coded)


def _decode_radiance(data: bytes, name: str) -> np.ndarray:
    """Radiance (H, W, 3) float32 of a Radiance file's bytes."""
    if not data.startswith(b"#?"):
        raise LightError(f"{name}: found no RADIANCE header ({data[:10]!r}), wanted a file that starts with '#?RADIANCE'")
    lines, at = [], 0
    while not lines or lines[-1]:
        end = data.find(b"\n", at)
        if end < 0:
            raise LightError(f"{name}: cut short within the header, wanted an empty line, the size and the pixels")
        lines.append(data[at:end].decode("latin-1").strip())
        at = end + 1
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip() == "FORMAT" and value.strip() != "32-bit_rle_rgbe":
            raise LightError(f"{name}: found FORMAT={value.strip()}, wanted 32-bit_rle_rgbe")
    end = data.find(b"\n", at)
    size = data[at:end].decode("latin-1").split() if end >= 0 else []
    if len(size) != 4 or {size[0][1:], size[2][1:]} != {"X", "Y"} or not (size[1].isdigit() and size[3].isdigit()):
        raise LightError(f"{name}: found size {' '.join(size)[:40]!r}, wanted '-Y height +X width'")
    if (size[0], size[2]) != ("-Y", "+X"):
        raise LightError(f"{name}: found orientation {size[0]} {size[2]}, wanted -Y +X: rows from the top, columns from the left")
    height, width = int(size[1]), int(size[3])
    _check_size(height, width, name)
    from .hdr_kernels import decode_rows  # compiled code: a second to import, and only Radiance files need it

    rgbe = np.empty((height, width, 4), np.uint8)
    n_rows, corrupt = decode_rows(np.frombuffer(data, np.uint8), end + 1, rgbe)
    if n_rows < height:
        what = "corrupt after" if corrupt else "cut short after"
        raise LightError(f"{name}: {what} {n_rows} of {height} rows, wanted all of them")
    scale = np.ldexp(np.float32(1), np.arange(256) - 136)
    scale[0] = 0
    return rgbe[..., :3] * scale.astype(np.float32)[rgbe[..., 3], None]


def _read_exr(path: Path, name: str) -> np.ndarray:
    """Radiance (H, W, 3) float32 of an OpenEXR file's first part."""
    try:
        import OpenEXR
    except ImportError as error:
        raise LightError(f"{name}: OpenEXR cannot be imported ({error}), wanted `pip install OpenEXR` or a .hdr file") from error
    try:
        (left, top), (right, bottom) = OpenEXR.File(str(path), header_only=True).header()["dataWindow"]
    except (RuntimeError, ValueError, KeyError) as error:
        raise LightError(f"{name}: found no OpenEXR header ({error}), wanted an .exr picture") from error
    height, width = int(bottom - top + 1), int(right - left + 1)
    _check_size(height, width, name)
    try:
        # the library reports damage by leaving the part out, which shows when it is asked for
        channels = OpenEXR.File(str(path), separate_channels=True).channels()
    except (RuntimeError, ValueError) as error:
        raise LightError(f"{name}: cut short or corrupt, wanted the pixels of {height} rows") from error
    colors = ("R", "G", "B") if {"R", "G", "B"} <= set(channels) else ("Y", "Y", "Y")
    if not set(colors) <= set(channels) or {"RY", "BY"} & set(channels):
        raise LightError(f"{name}: found channels {', '.join(sorted(channels))}, wanted R, G and B, or Y alone")
    planes = [channels[color].pixels for color in colors]
    if any(plane.shape != (height, width) or plane.dtype.kind != "f" for plane in planes):
        found = ", ".join(f"{color} {plane.dtype} {plane.shape}" for color, plane in zip(colors, planes))
        raise LightError(f"{name}: found {found}, wanted half or float of {(height, width)}")
    return np.stack(planes, axis=-1).astype(np.float32)


def _check_size(height: int, width: int, name: str) -> None:
    if height < 2 or width != 2 * height or height > MAX_HEIGHT:
        wanted = f"an equirectangular one, twice as wide as high, of 2 x 4 to {MAX_HEIGHT} x {2 * MAX_HEIGHT}"
        raise LightError(f"{name}: found a picture of {height} x {width} pixels (height x width), wanted {wanted}")
