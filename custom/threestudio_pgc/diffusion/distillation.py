"""One step of score distillation, from a rendered image to the regulated gradient at that image."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..pixelgrad import Norm, Rule, clip_value, pullback, views_at_a_time
from .methods import SDS, Method, Residual, Views
from .prior import Conditioning, LatentPrior


@dataclass(frozen=True)
class Distillation:
    """What a step computed, all float32 (float64 for a float64 image) and detached.

    latent_gradient: (B, C, h, w) the method's, e.g. w(t) (eps_hat - eps), per view, undivided.
    raw: (B, H, W, 3) the same gradient at the image, as the pullback gave it, with what the method wants of the image itself.
    regulated: (B, H, W, 3) after the rule.
    threshold: the c that the rule was given.
    numbers: what the method says of its own, for the log.
    """

    latent_gradient: Tensor
    raw: Tensor
    regulated: Tensor
    threshold: float
    numbers: Mapping[str, float] = field(default_factory=dict)


def encode_without_graph(image: Tensor, encode: Callable[[Tensor], Tensor], views: int) -> Tensor:
    """Latents of `image` (B, H, W, 3), `views` at a time so that activations of one group only are alive."""
    with torch.no_grad():
        return torch.cat([encode(part) for part in image.split(views)])


def find_residual(
    image: Tensor,
    prior: LatentPrior,
    conditioning: Conditioning,
    *,
    timesteps: Tensor,
    noise: Tensor,
    method: Method | None = None,
    latent_clip: float | None = None,
    image_is_latent: bool = False,
    views_per_pullback: int | Literal["auto"] = "auto",
    **step: Any,
) -> Residual:
    """The first half of `distill`, which see: encode, ask the prior, and the method's gradient at the latents (B, C, h, w)."""
    image = image.detach()
    with torch.no_grad(), torch.autocast(device_type=image.device.type, enabled=False):
        if image_is_latent:
            latents = image.movedim(-1, 1)
        else:
            latents = encode_without_graph(image, prior.encode, views_at_a_time(views_per_pullback, image))
        seen = None if image_is_latent else image
        residual = (method or SDS())(Views(prior, seen, latents, noise, timesteps, conditioning, **step))
        if latent_clip is None:
            return residual
        return Residual(clip_value(residual.latent, latent_clip, dim=1), residual.image, residual.numbers)


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
    **step: Any,
) -> Distillation:
    """Score distillation with a split backward pass: encode, predict, pull back, regulate (paper eq. 5 and 10).

    The network runs while no encoder graph exists; the encoder's graph is then built for a few views at a time, only to pull the latent
    gradient back. Nothing here is divided by the batch size: `regulated` is the gradient of each view's own summed loss.

    Args:
        image: (B, H, W, 3) in [0, 1], or (B, h, w, C) latents with `image_is_latent`. Taken as a constant.
        rule, norm: see `pixelgrad.rules`.
        threshold: c, or what finds it from the raw gradient, such as a `QuantileThreshold`.
        encode: map to pull back through in place of the VAE, such as a linear one; the latents themselves are always the VAE's.
        step: what `find_residual` takes:
            timesteps: (B,) int64 in [0, prior.num_train_timesteps).
            noise: (B, C, h, w), standard normal.
            method: of `methods.METHODS`; SDS where none is given.
            guidance_scale, cfg, rescale, weighting, control, camera, generator: see `methods.Views`.
            latent_clip: clamp every component of the latent gradient to [-latent_clip, latent_clip] (the host's `grad_clip`).
    """
    image = image.detach()
    found = find_residual(image, prior, conditioning, image_is_latent=image_is_latent, views_per_pullback=views_per_pullback, **step)
    with torch.no_grad(), torch.autocast(device_type=image.device.type, enabled=False):
        if image_is_latent:
            raw = found.latent.movedim(1, -1)
        else:
            raw = pullback(found.latent, image, encode or prior.encode, views_per_pullback=views_per_pullback)
        if found.image is not None:
            raw = raw + found.image.to(raw)
        c = threshold(raw) if callable(threshold) else threshold
        return Distillation(found.latent, raw, rule(raw, c, norm=norm), c, found.numbers)
