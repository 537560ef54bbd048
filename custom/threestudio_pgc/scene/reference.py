"""How far a rendered view is from the picture it should look like. Scalars, differentiable in what is rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# A depth is flat where its standard deviation is below this share of its root mean square: single precision could not tell it from noise.
_FLAT = 1e-5


def reference_losses(rendered: Mapping[str, Tensor], reference: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses of B reference views whose weight is not 0, by name, not multiplied by it.

    rendered   of the renderer: "comp_rgb" (B, H, W, 3) in [0, 1], "opacity" (B, H, W, 1) in [0, 1], "depth" (B, H, W, 1),
               "view_normal" (B, H, W, 3) unit, camera space; those that a wanted loss needs
    reference  "rgb" (B, H, W, 3), "mask" (B, H, W, 1) in [0, 1], and where wanted "depth" (B, H, W, 1), "normal" (B, H, W, 3)
    weights    of `LOSSES`: "rgb", "mask", "depth", "normal"; a missing one is 0

    Raises ValueError for an unknown name, a negative weight, and a weight whose reference is missing or of another size.
    """
    for name, weight in weights.items():
        if name not in LOSSES:
            raise ValueError(f"reference loss: found {name!r}, wanted one of {', '.join(LOSSES)}")
        if weight < 0:
            raise ValueError(f"reference loss {name}: found the weight {weight}, wanted at least 0")
    losses = {}
    for name, (loss, buffer) in LOSSES.items():
        if not weights.get(name):
            continue
        for key in {name, "mask"}:
            if reference.get(key) is None:
                raise ValueError(f"reference loss {name}: its weight is {weights[name]}, but the reference view has no {key!r}")
            if reference[key].shape[:3] != rendered[buffer].shape[:3]:
                found, wanted = tuple(reference[key].shape[:3]), tuple(rendered[buffer].shape[:3])
                raise ValueError(f"reference loss {name}: found a reference {key!r} of (B, H, W) {found}, wanted {wanted} as rendered")
        losses[name] = loss(rendered, reference)
    return losses


def rgb_loss(rendered: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
    """mean over views, all pixels and channels of mask opacity (rgb - reference)^2, with the opacity as a constant.

    Pixels outside of either object count as zeros: what the shape does not cover shows the render's background, of which the picture
    says nothing. Where shapes differ it is `mask_loss` that pulls. An object's share of the loss is its share of the picture.
    """
    weight = reference["mask"] * rendered["opacity"].detach()
    return (weight * (rendered["comp_rgb"] - reference["rgb"]).square()).mean()


def mask_loss(rendered: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
    """mean over views and pixels of (opacity - mask)^2."""
    return (rendered["opacity"] - reference["mask"]).square().mean()


def depth_loss(rendered: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
    """mean over views of 1 - r, with Pearson's correlation r of both depths inside: in [0, 2], blind to scale (> 0) and shift.

    A view with a flat depth has no correlation; it counts as 0 and has no gradient.
    """
    inside = _inside(rendered, reference)
    ours, theirs = rendered["depth"].squeeze(-1), reference["depth"].squeeze(-1)
    centred = [depth - _mean(depth, inside)[:, None, None] for depth in (ours, theirs)]
    covariance = _mean(centred[0] * centred[1], inside)
    variances = [_mean(depth.square(), inside) for depth in centred]
    flat = torch.zeros_like(variances[0], dtype=torch.bool)
    for variance, depth in zip(variances, (ours, theirs)):
        flat = flat | (variance <= _FLAT**2 * _mean(depth.square(), inside))
    # 1 in place of a variance of 0: the gradient of the square root there would be NaN, and NaN times 0 stays NaN
    product = torch.where(flat, 1.0, variances[0] * variances[1])
    return torch.where(flat, 0.0, 1 - covariance / product.sqrt()).mean()


def normal_loss(rendered: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
    """mean over views of the mean inside of 1 - cos of the angle between both normals, in camera space: in [0, 2]."""
    cosine = F.cosine_similarity(rendered["view_normal"], reference["normal"], dim=-1)
    return _mean(1 - cosine, _inside(rendered, reference)).mean()


LOSSES: dict[str, tuple[Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor], str]] = {
    "rgb": (rgb_loss, "comp_rgb"),
    "mask": (mask_loss, "opacity"),
    "depth": (depth_loss, "depth"),
    "normal": (normal_loss, "view_normal"),
}


def _inside(rendered: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
    """(B, H, W) bool: pixels of the picture's object that the rendered one covers too; elsewhere one of them has no surface."""
    return ((reference["mask"] > 0.5) & (rendered["opacity"] > 0)).squeeze(-1)


def _mean(values: Tensor, inside: Tensor) -> Tensor:
    """(B, H, W) -> (B,) means inside, 0 where nothing is inside."""
    return torch.where(inside, values, 0.0).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)
