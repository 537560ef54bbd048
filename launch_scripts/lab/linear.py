"""Ridge regression between image pixels and latent pixels, both ways: the paper's section 4.1, appendix A.2 and Figure 6."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from threestudio_pgc.diffusion.prior import LatentPrior
from threestudio_pgc.export.files import write_bytes
from threestudio_pgc.pixelgrad.linear_map import LinearMap, fit_affine, linear_map_tensors, shrink

from .teacher import ArgumentError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
HELD_OUT = 5  # every fifth picture is kept out of the fit and measured on


@dataclass(frozen=True)
class LinearFit:
    """encoder (rgb to latent) and decoder (latent to rgb); the rest is measured on pictures kept out of the fit.

    r2_encoder: (C,) share of each latent channel's variance that the encoder explains. r2_decoder: (3,) likewise of r, g, b.
    psnr_decoder: dB, of the decoder's thumbnails against the shrunk pictures. psnr_vae: dB, of the VAE's own round trip at full size, and
    psnr_encoder: of the VAE's decoding of the linear encoder's latents, both against the pictures.
    """

    encoder: LinearMap
    decoder: LinearMap
    r2_encoder: list[float]
    r2_decoder: list[float]
    psnr_decoder: float
    psnr_vae: float
    psnr_encoder: float
    fitted_on: int
    measured_on: int


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; infinite where they are equal."""
    return float(-10 * torch.log10((found.clamp(0, 1) - wanted).square().mean()))


def r_squared(found: Tensor, wanted: Tensor) -> list[float]:
    """1 - residual / variance of each column of (N, C); 0 for a column without variance."""
    residual, spread = (found - wanted).square().mean(0), wanted.var(0, unbiased=False)
    return torch.where(spread > 0, 1 - residual / spread.clamp(min=1e-30), torch.zeros_like(spread)).tolist()


def pixels(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C)."""
    return maps.movedim(1, -1).flatten(0, -2)


@torch.no_grad()
def fit_linear_maps(
    images: Tensor, prior: LatentPrior, *, ridge: float = 1e-3, batch: int = 8, tick: Callable[[int], None] = lambda count: None
) -> LinearFit:
    """Fit both maps on four fifths of `images` (N, H, H, 3) in [0, 1] and measure them on the rest.

    Every latent pixel of every picture is a sample; its image pixel is what `shrink` puts under it.

    Args:
        tick: called with the number of pictures encoded.

    Raises:
        ValueError: fewer pictures than unknowns of one output, which is C + 1, or 4.
    """
    require_pictures(len(images), prior.latent_channels)
    latents = []
    for part in images.split(batch):
        latents.append(prior.encode(part.to(prior.device)).float().cpu())
        tick(len(part))
    z, x = torch.cat(latents), shrink(images.float(), prior.latent_size)
    held = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    encoder = LinearMap(*fit_affine(pixels(x[~held]), pixels(z[~held]), ridge=ridge))
    decoder = LinearMap(*fit_affine(pixels(z[~held]), pixels(x[~held]), ridge=ridge))
    z, x, images = z[held], x[held], images[held]

    def vae_psnr(latents: Tensor) -> float:
        squares = [
            (prior.decode(part.to(prior.device)).float().cpu() - truth).square().mean()
            for part, truth in zip(latents.split(batch), images.split(batch))
        ]
        return float(-10 * torch.log10(torch.stack(squares).mean()))

    return LinearFit(
        encoder,
        decoder,
        r_squared(pixels(encoder(x)), pixels(z)),
        r_squared(pixels(decoder(z)), pixels(x)),
        psnr(decoder(z), x),
        vae_psnr(z),
        vae_psnr(encoder(x)),
        int((~held).sum()),
        int(held.sum()),
    )


def require_pictures(count: int, channels: int | None = None) -> None:
    """Raise ArgumentError where there are fewer pictures than unknowns per output: 3 + 1 to the latent and C + 1 back."""
    unknowns = max(4, 0 if channels is None else channels + 1, HELD_OUT)
    if count < unknowns:
        raise ArgumentError(f"--images: found {count} pictures, wanted at least {unknowns}, one for each unknown of the regression")


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures in a folder and below, sorted.

    Raises:
        ArgumentError: no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ArgumentError(f"--images: no folder {folder}, wanted one with at least a few dozen pictures")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)


def save_linear_maps(path: Path, fit: LinearFit, note: str) -> Path:
    """Write both maps as safetensors, as `pgc.linear_map` takes them; `note` says which prior they belong to."""
    from safetensors.torch import save

    about = {"prior": note, "pictures": str(fit.fitted_on), "r2_encoder": f"{np.mean(fit.r2_encoder):.4f}"}
    return write_bytes(path, save(dict(linear_map_tensors(fit.encoder, fit.decoder)), metadata=about))
