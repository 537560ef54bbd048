"""What a latent prior is: what it is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class PriorError(RuntimeError):
    """A prior cannot be had or cannot be used as asked; the message names the config key, what was found and what is wanted."""


@dataclass
class Conditioning:
    """What B views are to show, for every prediction that a step may need.

    cond, uncond (B, L, D): embeddings of the prompt and of what classifier-free guidance leaves: the negative or the empty prompt.
    pooled_cond, pooled_uncond (B, P) or None. time_ids (B, 6) or None: original height, width, crop top, left, target height, width in
    pixels (None: the prior fills in its own image size, uncropped).
    negatives (N, B, L, D), pooled_negatives (N, B, P) or None: N further prompts of each view to stay away from, each as strongly as its
    negative_weights (N, B) say (perpendicular negatives), or as the objective says (NFSD, CSD).
    reference (B, C, h, w) or None: latents of a picture that the network sees beside z_t, in the conditional prediction only (Zero123).
    """

    cond: Tensor
    uncond: Tensor
    pooled_cond: Tensor | None = None
    pooled_uncond: Tensor | None = None
    time_ids: Tensor | None = None
    negatives: Tensor | None = None
    pooled_negatives: Tensor | None = None
    negative_weights: Tensor | None = None
    reference: Tensor | None = None

    def __len__(self) -> int:
        return self.cond.shape[0]

    def to(self, *args, **kwargs) -> Conditioning:
        """As `Tensor.to`, for every field."""
        values = (getattr(self, field.name) for field in fields(self))
        return Conditioning(*(value if value is None else value.to(*args, **kwargs) for value in values))


@dataclass
class NoisePrediction:
    """Predicted noise eps(z_t; y, t) and eps(z_t; t), each (B, C, h, w), float32 (float64 where the prior is).

    negatives (N, B, C, h, w): eps(z_t; y_n, t) for the negatives of the conditioning, None where it has none.
    """

    cond: Tensor
    uncond: Tensor
    negatives: Tensor | None = None


class NoiseLevel(NamedTuple):
    """z_t = alpha z + sigma eps; each (B, 1, 1, 1).

    A diffusion model has alpha^2 + sigma^2 = 1 (alpha^2 is abar_t), a flow-matching model alpha + sigma = 1. Clean latents are (1, 0).
    """

    alpha: Tensor
    sigma: Tensor

    def add_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """z_t; latents, noise (B, C, h, w)."""
        return self.alpha * latents + self.sigma * noise

    def clean(self, z_t: Tensor, noise: Tensor) -> Tensor:
        """The latents that z_t and its noise came from: (z_t - sigma eps) / alpha."""
        return (z_t - self.sigma * noise) / self.alpha


@runtime_checkable
class LatentPrior(Protocol):
    """A frozen latent diffusion model, as the guidance sees it. All tensors it returns are float32 (float64 where the prior is)."""

    num_train_timesteps: int
    latent_channels: int
    image_size: int  # height = width of the image the encoder takes, pixels
    latent_size: int  # height = width of the latents
    device: torch.device
    dtype: torch.dtype

    def encode(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, C, h, w), differentiable."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) in [0, 1]."""

    def noise_level(self, t: Tensor) -> NoiseLevel:
        """t (B,) integers in [0, T) -> the signal's and the noise's share of z_t."""

    def predict_noise(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, control=None) -> NoisePrediction:
        """z_t (B, C, h, w), t (B,) integers -> all noise predictions of the conditioning, from one batch, without a graph."""

    def predict_conditional(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, control=None) -> Tensor:
        """eps(z_t; y, t) alone, (B, C, h, w), with a graph where something in the network asks for a gradient."""
