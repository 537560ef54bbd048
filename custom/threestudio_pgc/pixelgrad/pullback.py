"""From a latent gradient to an image gradient: the vector-Jacobian product of the frozen encoder, a few views at a time."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

# One SDXL view. At 1024 x 1024 the encoder's graph of a single view is by far the largest allocation of a step, and a second view gains
# little speed; small images (the bundled model's 128 x 128) go through together.
PIXELS_PER_PULLBACK = 1024 * 1024

Encode = Callable[[Tensor], Tensor]


def views_at_a_time(views_per_pullback: int | Literal["auto"], image: Tensor) -> int:
    """How many views of `image` (B, H, W, C) to pull back together: the number given, or as many as make up one 1024 x 1024 view."""
    if views_per_pullback == "auto":
        return max(1, PIXELS_PER_PULLBACK // max(1, image.shape[1] * image.shape[2]))
    if isinstance(views_per_pullback, bool) or not isinstance(views_per_pullback, int) or views_per_pullback < 1:
        raise ValueError(f"pgc.views_per_pullback: found {views_per_pullback!r}, wanted 'auto' or an integer of at least 1")
    return views_per_pullback


def pullback(
    latent_gradient: Tensor,
    image: Tensor,
    encode: Encode,
    *,
    views_per_pullback: int | Literal["auto"] = "auto",
) -> Tensor:
    """Exact vector-Jacobian product J_encode(image)^T latent_gradient, view by view.

    Splitting the backward pass here is what keeps the encoder's graph out of the U-Net's way: the graph of `views_per_pullback` views
    exists only inside this call, so peak memory does not grow with the batch, and the result is that of the full batch because views do
    not interact in the encoder.

    The product is linear in the latent gradient, so each view's is divided by its largest magnitude first and the result multiplied back
    in float32: a half-precision encoder then sees values of order one and neither overflows nor underflows, with no loss scaling.

    Args:
        latent_gradient: (B, C, h, w) d(loss)/d(latent) of the loss summed over the view. Non-finite entries count as zero: one of them
            would otherwise spread over the whole image through the encoder's normalisation layers.
        image: (B, H, W, 3) in [0, 1]; its graph is not used.
        encode: differentiable map of (b, H, W, 3) to (b, C, h, w), e.g. `LatentPrior.encode` or `LinearMap.encode`.
        views_per_pullback: "auto" or how many views share one backward pass.

    Returns:
        (B, H, W, 3) d(loss)/d(image), in float32 (float64 for a float64 image). It may hold non-finite pixels: the rules deal with them.
    """
    count = views_at_a_time(views_per_pullback, image)
    wide = torch.promote_types(image.dtype, torch.float32)
    latent_gradient = latent_gradient.detach().to(wide)
    latent_gradient = torch.where(torch.isfinite(latent_gradient), latent_gradient, torch.zeros_like(latent_gradient))
    if len(image) == 0:
        return torch.zeros_like(image, dtype=wide)
    scale = latent_gradient.flatten(1).abs().amax(dim=1)
    safe_scale = torch.where(scale > 0, scale, torch.ones_like(scale)).view(-1, 1, 1, 1)

    parts = []
    for views, gradient in zip(image.detach().split(count), (latent_gradient / safe_scale).split(count)):
        with torch.enable_grad():
            views = views.clone().requires_grad_(True)
            latents = encode(views)
        if latents.shape != gradient.shape:
            raise ValueError(
                f"pullback: encode gave latents of shape {tuple(latents.shape)}, the latent gradient is {tuple(gradient.shape)}"
            )
        parts.append(torch.autograd.grad(latents, views, gradient.to(latents.dtype))[0].to(wide))
    return torch.cat(parts) * safe_scale
