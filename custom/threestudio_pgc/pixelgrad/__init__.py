"""The method: regulate a distillation gradient pixel by pixel. Torch only; knows no diffusion, no meshes, no host."""

from .adaptive import QuantileThreshold
from .config import PULLBACKS, PGCConfig, check_pgc, make_threshold
from .pullback import pullback, views_at_a_time
from .rules import RULES, Norm, Rule, clip_global, clip_norm, clip_value, none, normalize, pixel_norm, view_rms, zero_nonfinite
from .statistics import gradient_statistics, isolated_outliers, kurtosis, nonfinite_pixels
from .surrogate import surrogate_loss

__all__ = [
    "PULLBACKS",
    "RULES",
    "Norm",
    "PGCConfig",
    "QuantileThreshold",
    "Rule",
    "check_pgc",
    "clip_global",
    "clip_norm",
    "clip_value",
    "gradient_statistics",
    "isolated_outliers",
    "kurtosis",
    "make_threshold",
    "none",
    "nonfinite_pixels",
    "normalize",
    "pixel_norm",
    "pullback",
    "surrogate_loss",
    "view_rms",
    "views_at_a_time",
    "zero_nonfinite",
]
