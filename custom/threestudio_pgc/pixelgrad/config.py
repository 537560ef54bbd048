"""The `pgc:` block, the same in every guidance."""

from dataclasses import dataclass
from typing import Any

from .adaptive import QuantileThreshold
from .rules import RULES, Norm

PULLBACKS = ("vae", "linear", "none")


@dataclass
class PGCConfig:
    """How an image gradient is formed and regulated.

    enabled: False leaves the raw gradient (non-finite pixels are zeroed all the same) and changes nothing else.
    rule: "clip-norm" (PGC-N, paper), "clip-value" (PGC-V), "normalize" (PNGD), "none", or what to compare them with: "clip-global", each
        view's gradient clipped as a whole, and "view-rms", each scaled to one RMS.
    norm: length of a pixel's gradient: "l2" (paper) or "linf" (authors' code).
    threshold: c > 0, a number or a schedule [start_step, from, to, end_step]. Per view, at the rendered image with values in [0, 1],
        before any batch size, loss weight or AMP scale. The paper uses 0.1. Or {quantile: 0.99}, optionally with {window: 100}: c is that
        running quantile of the pixel norms, see `QuantileThreshold`.
    pullback: "vae", the exact encoder backward; "linear", through an affine map instead; "none", the image is itself the latent.
    linear_map: the map of pullback "linear": a safetensors file with `weight` (C, 3) and `bias` (C,), as `gradient_lab.py fit-linear`
        writes it, or "paper" (also null), the paper's map for the SDXL VAE.
    views_per_pullback: views that share one encoder backward, or "auto".
    """

    enabled: bool = True
    rule: str = "clip-norm"
    norm: str = "l2"
    threshold: Any = 0.1
    pullback: str = "vae"
    linear_map: Any = None
    views_per_pullback: Any = "auto"


def check_pgc(config: Any, *, where: str = "system.guidance.pgc") -> None:
    """Refuse a block that could only fail later. `config` has PGCConfig's fields; `where` is its key, for the message.

    Raises:
        ValueError: naming the key, the value found and the values wanted.
    """

    def refuse(key: str, found: Any, wanted: str) -> None:
        raise ValueError(f"{where}.{key}: found {found!r}, wanted {wanted}")

    if config.rule not in RULES:
        refuse("rule", config.rule, f"one of {', '.join(RULES)}")
    if config.norm not in ("l2", "linf"):
        refuse("norm", config.norm, "'l2' or 'linf'")
    if config.pullback not in PULLBACKS:
        refuse("pullback", config.pullback, f"one of {', '.join(PULLBACKS)}")
    schedule = config.threshold
    if _is_mapping(schedule):
        for key in schedule:
            if key not in ("quantile", "window"):
                refuse(f"threshold.{key}", schedule[key], "only the keys quantile and window")
        if "quantile" not in schedule:
            refuse("threshold", dict(schedule), "a number, a schedule, or {quantile: 0.99}")
        make_threshold(config)
        values = []
    elif isinstance(schedule, (int, float)):
        values = [schedule]
    elif isinstance(schedule, (str, bytes)) or not hasattr(schedule, "__len__") or len(schedule) not in (3, 4):
        values = refuse("threshold", schedule, "a number, a schedule [start_step, from, to, end_step], or {quantile: 0.99}")
    else:
        values = list(schedule)[-3:-1]
    if not all(isinstance(value, (int, float)) and value > 0 for value in values):
        refuse("threshold", schedule, "values greater than 0")
    views = config.views_per_pullback
    if views != "auto" and (isinstance(views, bool) or not isinstance(views, int) or views < 1):
        refuse("views_per_pullback", views, "'auto' or an integer of at least 1")
    if config.linear_map is not None and config.pullback != "linear":
        refuse("linear_map", config.linear_map, f"null, because pullback is {config.pullback!r}")


def make_threshold(config: Any) -> QuantileThreshold | None:
    """The adaptive threshold that a block asks for with `threshold: {quantile: ...}`, or None where it is a number or a schedule."""
    if not _is_mapping(config.threshold):
        return None
    norm: Norm = config.norm
    return QuantileThreshold(**{str(key): value for key, value in config.threshold.items()}, norm=norm)


def _is_mapping(value: Any) -> bool:
    return hasattr(value, "keys")  # a dict, or the mapping of a configuration library, which is not registered as one
