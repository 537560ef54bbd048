"""What a rule did to a gradient: numbers for the progress bar and the logs, maps to look at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Norm, pixel_norm


def nonfinite_pixels(gradient: Tensor, dim: int = -1) -> Tensor:
    """(..., C) -> (...) bool: pixels with a non-finite component, which every rule sets to zero."""
    return ~torch.isfinite(gradient).all(dim=dim)


def gradient_statistics(raw: Tensor, threshold: float, *, norm: Norm = "l2") -> dict[str, float]:
    """How a per-view image gradient is spread, before a rule acts on it.

    Args:
        raw: (B, H, W, C) gradient as the pullback gave it.
        threshold: the c in force.

    Returns:
        "norm_p50", "norm_p99", "norm_p999", "norm_max": quantiles of the pixel norms, over pixels with a gradient at all (background that
        the object does not touch would otherwise move them); "share_clipped": share of those pixels above the threshold;
        "nonfinite": number of non-finite pixels. All zero when there is no gradient.
    """
    norms = pixel_norm(raw, norm=norm).flatten()
    norms = norms[norms > 0]
    nonfinite = float(nonfinite_pixels(raw).sum())
    if norms.numel() == 0:
        return {
            "norm_p50": 0.0,
            "norm_p99": 0.0,
            "norm_p999": 0.0,
            "norm_max": 0.0,
            "share_clipped": 0.0,
            "nonfinite": nonfinite,
        }
    # One sort: torch.quantile refuses more than 2**24 values, which is 16 views of 1024 x 1024.
    ordered = norms.sort().values
    at = (torch.tensor([0.5, 0.99, 0.999, 1.0], dtype=torch.float64) * (len(ordered) - 1)).round().long().to(ordered.device)
    p50, p99, p999, largest = ordered[at].tolist()
    return {
        "norm_p50": p50,
        "norm_p99": p99,
        "norm_p999": p999,
        "norm_max": largest,
        "share_clipped": float((norms > threshold).float().mean()),
        "nonfinite": nonfinite,
    }


def isolated_outliers(norms: Tensor, *, factor: float = 10.0, window: int = 5) -> Tensor:
    """Which pixels stand alone above their surroundings: norm > factor times the median of the window x window pixels around it.

    The paper's noise assumption (section 4.4.1) is that out-of-bound gradients are limited to isolated points; this counts them. The
    window includes the pixel itself and ends at the image's edge by repeating the edge pixels.

    Args:
        norms: (B, H, W) non-negative.
        window: odd.

    Returns:
        (B, H, W) bool.
    """
    radius = window // 2
    found = torch.zeros_like(norms, dtype=torch.bool)
    for view, out in zip(norms, found):  # one at a time: a 1024 x 1024 view has 25 million neighbours
        height, width = view.shape
        padded = F.pad(view[None, None], (radius,) * 4, mode="replicate")
        around = F.unfold(padded, window).view(window * window, height, width)
        out.copy_(view > factor * around.median(dim=0).values)
    return found


def kurtosis(values: Tensor) -> float:
    """Fourth standardised moment E[(v - mean)^4] / E[(v - mean)^2]^2 of a tensor of any shape, in float64: 3 for a Gaussian, 0 where
    there is no spread."""
    centred = values.double().flatten()
    centred = centred - centred.mean() if centred.numel() else centred
    largest = centred.abs().max() if centred.numel() else torch.tensor(0.0)
    if not largest > 0:
        return 0.0
    centred = centred / largest  # 1e200 to the fourth is no float
    return float(centred.pow(4).mean() / centred.square().mean().square())
