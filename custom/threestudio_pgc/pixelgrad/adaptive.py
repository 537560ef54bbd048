"""A threshold that finds itself: a running quantile of the pixel norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .rules import Norm, pixel_norm

# Bins of equal width in log2(norm): one is 1.1 % wide, and the quantile is interpolated inside it. Norms beyond the ends, 5e-20 and
# 2e19, are counted in the outermost bins.
BINS_PER_OCTAVE = 64
OCTAVES = (-64, 64)
N_BINS = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE


class QuantileThreshold:
    """Threshold c such that, over the last steps, a share `quantile` of the pixel norms lies below it.

    A quantile of one step would follow that step's timesteps, whose gradients differ in scale by an order of magnitude, and so would an
    average of such quantiles. What runs here is therefore a histogram of the norms: it is added up over steps and forgets exponentially,
    and c is the quantile of all it remembers, the present step included. Pixels without a gradient (norm 0, non-finite) do not count.

    Warm-up: until `window` steps have been seen nothing is forgotten, every step so far counts alike; from then on a step's weight falls
    by a factor of 1 - 1/window a step. The first step already has a threshold, the quantile of its own pixels.

    Counts are integers and are summed over all processes, so every GPU computes the same c, that of the joint batch. The state is 8192
    numbers whatever the image size; c is exact to about 1 % (one bin).

    Example:
        >>> threshold = QuantileThreshold(0.99)
        >>> c = threshold(raw)          # raw (B, H, W, 3), once a step
        >>> regulated = clip_norm(raw, c)
    """

    def __init__(self, quantile: float, window: int = 100, norm: Norm = "l2"):
        """
        Args:
            quantile: in (0, 1); 0.99 clips about one pixel in a hundred.
            window: steps that the histogram remembers, and the length of the warm-up; at least 1.
            norm: length of a pixel's gradient, the rule's own.

        Raises:
            ValueError: quantile or window out of range.
        """
        if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 < quantile < 1:
            raise ValueError(f"pgc.threshold.quantile: found {quantile!r}, wanted a number between 0 and 1, both excluded")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"pgc.threshold.window: found {window!r}, wanted an integer of at least 1")
        self.quantile, self.window, self.norm = float(quantile), window, norm
        self.steps = 0
        self.counts = torch.zeros(N_BINS, dtype=torch.float64)

    def __call__(self, raw: Tensor) -> float:
        """Count the pixels of this step's gradient (..., C) and return c > 0. All processes of a run call it once a step."""
        counts = norm_histogram(pixel_norm(raw.detach(), norm=self.norm))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        if self.steps >= self.window:
            self.counts *= 1 - 1 / self.window
        self.counts += counts.cpu().double()
        self.steps += 1
        return self.value

    @property
    def value(self) -> float:
        """c as it stands; 1.0 before any gradient was seen, when there is nothing to clip."""
        return histogram_quantile(self.counts, self.quantile)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: plain numbers and one tensor."""
        return {"steps": self.steps, "norm": self.norm, "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Quantile and window may differ from those it was made with; counts of another norm are dropped,
        and a state of another number of bins raises ValueError."""
        if state["norm"] != self.norm:
            return
        if state["counts"].shape != self.counts.shape:
            raise ValueError(f"pgc.threshold: the checkpoint has {len(state['counts'])} bins, wanted {N_BINS}")
        self.steps, self.counts = int(state["steps"]), state["counts"].cpu().double().clone()


def norm_histogram(norms: Tensor) -> Tensor:
    """(N_BINS,) int64: how many of the positive entries of `norms` (any shape) fall into each bin."""
    norms = norms.flatten()
    norms = norms[norms > 0]
    index = ((norms.log2() - OCTAVES[0]) * BINS_PER_OCTAVE).long().clamp(0, N_BINS - 1)
    return torch.bincount(index, minlength=N_BINS)


def histogram_quantile(counts: Tensor, quantile: float) -> float:
    """Norm below which a share `quantile` of the counted pixels lies, interpolated in log2 inside its bin; 1.0 where nothing is counted."""
    total = counts.sum()
    if total <= 0:
        return 1.0
    cumulative = counts.cumsum(0)
    wanted = quantile * total
    index = int(torch.searchsorted(cumulative, wanted).clamp(max=N_BINS - 1))
    share = (wanted - (cumulative[index] - counts[index])) / counts[index]
    return float(2.0 ** (OCTAVES[0] + (index + share) / BINS_PER_OCTAVE))
