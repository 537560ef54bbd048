"""The `pgc:` block at work: which rule and threshold act in a step, what they did, and what of them a checkpoint must hold."""

from typing import Any

from torch import Tensor

from ..host import C, parse_structured, warn
from ..pixelgrad import RULES, PGCConfig, QuantileThreshold, Rule, check_pgc, gradient_statistics, make_threshold, pixel_norm


class Regulation:
    """One guidance's. config: its checked block, with the defaults filled in."""

    def __init__(self, block: Any):
        self.config = parse_structured(PGCConfig, block)
        check_pgc(self.config)
        self._adaptive = make_threshold(self.config)
        self._last_raw: Tensor | None = None

    @property
    def rule(self) -> Rule:
        return RULES[self.config.rule if self.config.enabled else "none"]

    def threshold(self, epoch: int, step: int) -> float | QuantileThreshold:
        """c of a step: a number, or what finds it from the step's raw gradient."""
        return self._adaptive if self._adaptive is not None else float(C(self.config.threshold, epoch, step))

    def account(self, raw: Tensor, threshold: float, step: int) -> dict[str, float]:
        """Numbers for the logs of what was done to a raw gradient (B, H, W, C) in a step; warns of pixels that were not finite.

        "threshold", "share_clipped", "nonfinite_pixels", "norm_p50", "norm_p99", "norm_max", see `pixelgrad.gradient_statistics`, and
        "all_nonfinite": 1.0 where no pixel was usable.
        """
        self._last_raw = raw
        statistics = gradient_statistics(raw, threshold, norm=self.config.norm)
        if statistics["nonfinite"]:
            warn(f"step {step}: {int(statistics['nonfinite'])} pixels had a non-finite gradient and were zeroed")
        return {
            "threshold": threshold,
            "share_clipped": statistics["share_clipped"],
            "nonfinite_pixels": statistics["nonfinite"],
            "norm_p50": statistics["norm_p50"],
            "norm_p99": statistics["norm_p99"],
            "norm_max": statistics["norm_max"],
            "all_nonfinite": float(statistics["nonfinite"] == raw[..., 0].numel()),
        }

    def last_norms(self) -> Tensor | None:
        """(B, H, W) norms of the last step's raw gradient, for a picture; None before the first step."""
        return None if self._last_raw is None else pixel_norm(self._last_raw, norm=self.config.norm)

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint of the run must hold: an adaptive threshold's running quantile."""
        return {} if self._adaptive is None else {"threshold": self._adaptive.state_dict()}

    def load_run_state(self, state: dict[str, Any]) -> None:
        if self._adaptive is not None and "threshold" in state:
            self._adaptive.load_state_dict(state["threshold"])
