"""The small AutoencoderKL: structure, training, whitening of its latents, and encoding of the training set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .renders import sheet
from .training import Stage

LATENT_CHANNELS = 8


def build_vae(channels=(16, 32, 64, 64), latent_channels: int = LATENT_CHANNELS, sample_size: int = 128):
    """AutoencoderKL with reduction 8, initialised for fast training.

    One normalisation group, and convolutions of linear gain with nearly silent residual branches: with the default initialisation
    the latent loses one axis of colour for the first tens of thousands of crops.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        sample_size=sample_size,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            gain = 0.05 if name.endswith("conv2") else 1.0
            nn.init.normal_(module.weight, std=gain / fan_in**0.5)
            nn.init.zeros_(module.bias)
    nn.init.normal_(vae.encoder.conv_in.bias, std=0.3)
    nn.init.constant_(vae.quant_conv.bias[latent_channels:], -5.0)  # log-variance: start with a clear signal
    return vae


def to_input(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + 2 L2, plus terms for edges (differences of neighbours), for mean colour of 8x8 cells, and for chroma (colour minus its mean)."""
    error = output - target
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    chroma = error - error.mean(1, keepdim=True)
    cells = F.avg_pool2d(error, 8)
    return error.abs().mean() + 2 * error.square().mean() + 0.6 * edges + 3 * cells.abs().mean() + 1.5 * chroma.abs().mean()


class VaeStage(Stage):
    """Trains the VAE on random crops, drawn around the object more often than around the border."""

    name = "vae"

    def __init__(self, vae, data: Path, batch: int = 16, crop: int = 64, kl_weight: float = 1e-4):
        self.modules = {"vae": vae}
        self.data, self.batch, self.crop, self.kl_weight = data, batch, crop, kl_weight

    def open(self):
        self.images = np.load(self.data / "images.npy", mmap_mode="r")
        self.held_out = min(128, len(self.images) // 8)

    def _batch(self, generator: torch.Generator) -> Tensor:
        room = self.images.shape[1] - self.crop
        rows = torch.randint(self.held_out, len(self.images), (self.batch,), generator=generator).tolist()
        places = (torch.rand(self.batch, 2, 2, generator=generator).mean(-1) * (room + 1)).long().clamp(max=room).tolist()
        crops = np.stack([self.images[r, y : y + self.crop, x : x + self.crop] for r, (y, x) in zip(rows, places)])
        return to_input(crops)

    def loss(self, generator):
        vae, target = self.modules["vae"], self._batch(generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        error = reconstruction_loss(output.float(), target)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        with torch.no_grad():
            psnr = -10 * torch.log10(((output.float().clamp(-1, 1) - target) / 2).square().mean((1, 2, 3))).mean()
        return error + self.kl_weight * kl, {"kl": float(kl.detach()), "psnr": float(psnr)}

    def preview(self, modules, folder):
        images = self.images[: self.held_out : max(1, self.held_out // 24)][:24]
        if len(images) >= 12:
            comparison(modules["vae"], images, 12).save(folder / "vae.png")
        print(f"vae: held-out PSNR {psnr_of(modules['vae'], self.images[: self.held_out]):.2f} dB", flush=True)


@torch.no_grad()
def reconstruct(vae, images: np.ndarray) -> np.ndarray:
    parts = np.array_split(images, max(1, len(images) // 16))
    return np.concatenate([to_pixels(vae.decode(vae.encode(to_input(x)).latent_dist.mode()).sample) for x in parts])


def comparison(vae, images: np.ndarray, columns: int) -> Image.Image:
    """Contact sheet of whole rows of pictures, each above what the VAE makes of it."""
    output = reconstruct(vae, images)
    whole = range(0, len(images) // columns * columns, columns)
    return sheet(np.concatenate([part[k : k + columns] for k in whole for part in (images, output)]), columns)


def psnr_of(vae, images: np.ndarray) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB (display values, peak 1)."""
    error = (reconstruct(vae, images).astype(np.float32) - images.astype(np.float32)) / 255
    return float((-10 * np.log10((error**2).mean((1, 2, 3)) + 1e-12)).mean())


@torch.no_grad()
def whiten(vae, images: np.ndarray) -> None:
    """Folds mean and standard deviation of each latent channel into the 1x1 convolutions around it: they become 0 and 1.

    quant_conv's first half gives the mean, its second the log-variance, which shifts by -2 log(std); post_quant_conv undoes
    the change of units.
    """
    parts = np.array_split(images, max(1, len(images) // 32))
    means = torch.cat([vae.encode(to_input(part)).latent_dist.mode() for part in parts])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    n = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:n] /= std[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.bias[n:] -= 2 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def encode_set(vae, data: Path, worker: int = 0, workers: int = 1, batch: int = 32, *, mirrored: bool = True) -> None:
    """Writes this worker's part of the latents of images.npy as they are and mirrored: latents-<worker>.npy (n, 2, C, h, w) float16.

    Without `mirrored` (n, 1, C, h, w): a world-space normal map that is mirrored is one of another object.
    """
    torch.set_num_threads(1)
    images = np.load(data / "images.npy", mmap_mode="r")
    bounds = np.linspace(0, len(images), workers + 1).astype(int)
    part, out = images[bounds[worker] : bounds[worker + 1]], []
    for first in range(0, len(part), batch):
        x = to_input(np.array(part[first : first + batch]))
        kinds = (x, x.flip(-1)) if mirrored else (x,)
        with torch.autocast("cpu", torch.bfloat16):
            latents = [vae.encode(y).latent_dist.mode().float() for y in kinds]
        out.append(torch.stack(latents, 1).half().numpy())
        if worker == 0 and first // batch % 100 == 99:
            print(f"encode: {first + batch}/{len(part)}", flush=True)
    np.save(data / f"latents-{worker}.npy", np.concatenate(out))
