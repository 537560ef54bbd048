"""One step of score distillation, from a rendered image to the regulated gradient at that image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..pixelgrad import Norm, Rule, clip_value, pullback, views_at_a_time
from .objectives import sds
from .prior import Conditioning, LatentPrior


@dataclass(frozen=True)
class Distillation:
    """What a step computed, all float32 (float64 for a float64 image) and detached.

    latent_gradient: (B, C, h, w) w(t) (eps_hat - eps), per view, undivided.
    raw: (B, H, W, 3) the same gradient at the image, as the pullback gave it.
    regulated: (B, H, W, 3) after the rule.
    threshold: the c that the rule was given.
    """

    latent_gradient: Tensor
    raw: Tensor
    regulated: Tensor
    threshold: float


def encode_without_graph(image: Tensor, encode: Callable[[Tensor], Tensor], views: int) -> Tensor:
    """Latents of `image` (B, H, W, 3), `views` at a time so that activations of one group only are alive."""
    with torch.no_grad():
        return torch.cat([encode(part) for part in image.split(views)])


def latent_gradient(
    image: Tensor,
    prior: LatentPrior,
    conditioning: Conditioning,
    *,
    timesteps: Tensor,
    noise: Tensor,
    guidance_scale: float = 100.0,
    cfg: Literal["authors", "diffusers"] = "authors",
    weighting: str = "sds",
    control: Tensor | None = None,
    latent_clip: float | None = None,
    image_is_latent: bool = False,
    views_per_pullback: int | Literal["auto"] = "auto",
) -> Tensor:
    """The first half of `distill`, which see: encode, add noise, predict, and the objective's gradient at the latents, (B, C, h, w)."""
    image = image.detach()
    with torch.no_grad(), torch.autocast(device_type=image.device.type, enabled=False):
        if image_is_latent:
            latents = image.movedim(-1, 1)
        else:
            latents = encode_without_graph(image, prior.encode, views_at_a_time(views_per_pullback, image))
        abar = prior.alphas_cumprod_at(timesteps)
        noisy = prior.add_noise(latents, noise, timesteps)
        prediction = prior.predict_noise(noisy, timesteps, conditioning, control)
        gradient = sds(prediction, noise, abar, guidance_scale=guidance_scale, cfg=cfg, weighting=weighting)
        return gradient if latent_clip is None else clip_value(gradient, latent_clip, dim=1)


def distill(
    image: Tensor,
    prior: LatentPrior,
    conditioning: Conditioning,
    *,
    rule: Rule,
    threshold: float | Callable[[Tensor], float],
    norm: Norm = "l2",
    encode: Callable[[Tensor], Tensor] | None = None,
    image_is_latent: bool = False,
    views_per_pullback: int | Literal["auto"] = "auto",
    **objective: Any,
) -> Distillation:
    """Score distillation with a split backward pass: encode, predict, pull back, regulate (paper eq. 5 and 10).

    The U-Net runs while no encoder graph exists; the encoder's graph is then built for a few views at a time, only to pull the latent
    gradient back. Nothing here is divided by the batch size: `regulated` is the gradient of each view's own summed loss.

    Args:
        image: (B, H, W, 3) in [0, 1], or (B, h, w, C) latents with `image_is_latent`. Taken as a constant.
        rule, norm: see `pixelgrad.rules`.
        threshold: c, or what finds it from the raw gradient, such as a `QuantileThreshold`.
        encode: map to pull back through in place of the VAE, such as a linear one; the latents themselves are always the VAE's.
        objective: what `latent_gradient` takes:
            timesteps: (B,) int64 in [0, prior.num_train_timesteps).
            noise: (B, C, h, w), standard normal.
            guidance_scale, cfg, weighting: see `objectives.sds`.
            control: (B, H, W, 3) in [0, 1] for the prior's ControlNet, or None.
            latent_clip: clamp every component of the latent gradient to [-latent_clip, latent_clip] (the host's `grad_clip`).
    """
    image = image.detach()
    gradient = latent_gradient(
        image, prior, conditioning, image_is_latent=image_is_latent, views_per_pullback=views_per_pullback, **objective
    )
    with torch.no_grad(), torch.autocast(device_type=image.device.type, enabled=False):
        if image_is_latent:
            raw = gradient.movedim(1, -1)
        else:
            raw = pullback(gradient, image, encode or prior.encode, views_per_pullback=views_per_pullback)
        c = threshold(raw) if callable(threshold) else threshold
        return Distillation(gradient, raw, rule(raw, c, norm=norm), c)
