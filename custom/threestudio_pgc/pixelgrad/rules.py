"""Per-pixel regulation of an image gradient: the rules of Pixel-wise Gradient Clipping (PGC, ICLR 2024).

Every rule takes the gradient of the *undivided, unweighted* distillation loss with respect to the rendered image, shape (B, H, W, 3) (any
leading shape with the colour axis at `dim`), and returns a gradient of the same shape and dtype. All rules are finite for any input: a
pixel with a non-finite component becomes zero and its neighbours stay untouched; components up to the largest float do not overflow.

`norm` picks the length of a pixel's gradient: "l2" is the paper's Euclidean norm (eq. 10), "linf" the largest absolute channel, which the
authors' code uses. A threshold is not interchangeable between them: linf <= l2 <= sqrt(3) linf.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l2", "linf"]


def zero_nonfinite(gradient: Tensor, dim: int = -1) -> Tensor:
    """`gradient` with every pixel that has a non-finite component set to zero. Any shape, colour axis at `dim`."""
    finite = torch.isfinite(gradient).all(dim=dim, keepdim=True)
    return torch.where(finite, gradient, torch.zeros_like(gradient))


def _split(gradient: Tensor, norm: Norm, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Length and direction of each pixel, with no overflow: (sanitised gradient, norm with size 1 at `dim`, vector of norm 1 or 0)."""
    if norm not in ("l2", "linf"):
        raise ValueError(f"pgc.norm: found {norm!r}, wanted 'l2' or 'linf'")
    gradient = zero_nonfinite(gradient, dim)
    largest = gradient.abs().amax(dim=dim, keepdim=True)
    # Dividing by the largest channel first keeps the squares inside the float range: 1e30 squared is not a float32.
    unit = gradient / torch.where(largest > 0, largest, torch.ones_like(largest))
    if norm == "linf":
        return gradient, largest, unit
    length = unit.square().sum(dim=dim, keepdim=True).sqrt()
    return gradient, largest * length, unit / torch.where(length > 0, length, torch.ones_like(length))


def pixel_norm(gradient: Tensor, *, norm: Norm = "l2", dim: int = -1) -> Tensor:
    """Norm of each pixel's gradient, non-finite pixels counted as zero. (..., C) -> (...)."""
    return _split(gradient, norm, dim)[1].squeeze(dim)


def _check_threshold(threshold: float) -> None:
    if not threshold > 0:
        raise ValueError(f"pgc.threshold: found {threshold!r}, wanted a number greater than 0")


def clip_norm(gradient: Tensor, threshold: float, *, norm: Norm = "l2", dim: int = -1) -> Tensor:
    """PGC-N, the paper's default: min(|g|, c) g / |g| for every pixel (eq. 10). Keeps the direction, never lengthens, idempotent.

    Args:
        gradient: (..., C) image gradient, colour axis at `dim`.
        threshold: c > 0, in units of d(loss)/d(pixel) with pixels in [0, 1]. The paper uses 0.1.
        norm: length that is clipped, "l2" (paper) or "linf" (authors' code).

    Raises:
        ValueError: threshold not greater than 0, or an unknown norm.
    """
    _check_threshold(threshold)
    gradient, length, unit = _split(gradient, norm, dim)
    return torch.where(length > threshold, unit * threshold, gradient)


def clip_value(gradient: Tensor, threshold: float, *, norm: Norm = "l2", dim: int = -1) -> Tensor:
    """PGC-V: every component clamped to [-c, c] (section 4.4). Changes the direction, hence the hue. `norm` does not matter here."""
    _check_threshold(threshold)
    return zero_nonfinite(gradient, dim).clamp(-threshold, threshold)


def normalize(gradient: Tensor, threshold: float, *, norm: Norm = "l2", dim: int = -1) -> Tensor:
    """PNGD: c g / (|g| + c) for every pixel (eq. 9). Keeps the direction; shortens everything, most of all near the threshold."""
    _check_threshold(threshold)
    _, length, unit = _split(gradient, norm, dim)
    # c |g| / (|g| + c), written so that neither an infinite norm nor a zero one divides infinity by infinity.
    return unit * (threshold / (1 + threshold / length))


def none(gradient: Tensor, threshold: float = 1.0, *, norm: Norm = "l2", dim: int = -1) -> Tensor:
    """The raw VAE gradient: nothing but non-finite pixels is touched."""
    return zero_nonfinite(gradient, dim)


def _per_view(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to scale each view of `like` as a whole."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _unit_rms(gradient: Tensor, norm: Norm, dim: int) -> tuple[Tensor, Tensor]:
    """Each view of (B, ...) scaled so that the RMS of its pixel norms is 1 (a zero view stays zero), and that RMS before, (B, 1, ...)."""
    gradient = zero_nonfinite(gradient, dim)
    largest = _per_view(gradient.abs().flatten(1).amax(dim=1), gradient)
    gradient = gradient / torch.where(largest > 0, largest, torch.ones_like(largest))
    rms = _per_view(_split(gradient, norm, dim)[1].flatten(1).square().mean(dim=1).sqrt(), gradient)
    return gradient / torch.where(rms > 0, rms, torch.ones_like(rms)), largest * rms


def clip_global(gradient: Tensor, threshold: float, *, norm: Norm = "l2", dim: int = -1) -> Tensor:
    """Global gradient clipping (Pascanu, Mikolov, Bengio 2013) of each view as a whole, not of its pixels: a comparison.

    g min(1, c / RMS), the RMS being that of the view's N pixel norms: the view's global norm is clipped at c sqrt(N), which is also the
    largest global norm that `clip_norm` at the same c can leave. One huge pixel therefore shrinks every other one.

    `gradient` is (B, ...).
    """
    _check_threshold(threshold)
    unit, rms = _unit_rms(gradient, norm, dim)
    return torch.where(rms > threshold, unit * threshold, zero_nonfinite(gradient, dim))


def view_rms(gradient: Tensor, threshold: float, *, norm: Norm = "l2", dim: int = -1) -> Tensor:
    """Control experiment, not a pixel rule: each view scaled as a whole so that the RMS of its pixel norms is c. Clips nothing.

    Equalises the timestep-dependent scale of the distillation gradient between views, the other thing a clip does: a claim that
    clipping *pixels* helps must beat this. `gradient` is (B, ...); a zero view stays zero.
    """
    _check_threshold(threshold)
    return _unit_rms(gradient, norm, dim)[0] * threshold


Rule = Callable[..., Tensor]
RULES: dict[str, Rule] = {
    "clip-norm": clip_norm,
    "clip-value": clip_value,
    "normalize": normalize,
    "none": none,
    "clip-global": clip_global,
    "view-rms": view_rms,
}
