"""Which timesteps a distillation step looks at."""

from __future__ import annotations

import torch
from torch import Tensor


def timestep_bounds(t_range: tuple[float, float], num_train_timesteps: int = 1000) -> tuple[int, int]:
    """Fractions of the schedule to integer timesteps, both inclusive: (0.02, 0.5) of 1000 is 20..500, (0, 1) is 0..999.

    Raises ValueError where the fractions are not 0 <= lo <= hi <= 1.
    """
    low, high = (float(value) for value in t_range)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"t_range: found ({low}, {high}), wanted fractions with 0 <= lo <= hi <= 1")
    last = num_train_timesteps - 1
    return min(round(low * num_train_timesteps), last), min(round(high * num_train_timesteps), last)


def sample_timesteps(
    batch: int,
    t_range: tuple[float, float] = (0.02, 0.5),
    num_train_timesteps: int = 1000,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(batch,) int64 timesteps, uniform over `timestep_bounds(t_range)`, drawn independently for every view.

    Drawn on the generator's device (the CPU without one's own) and then moved to `device`, so that a CPU seed gives the same
    timesteps on every machine.
    """
    low, high = timestep_bounds(t_range, num_train_timesteps)
    source = generator.device if generator is not None else "cpu"
    return torch.randint(low, high + 1, (batch,), generator=generator, device=source).to(device or source)


def dreamtime_timestep(progress: float, t_range: tuple[float, float] = (0.02, 0.5), num_train_timesteps: int = 1000) -> int:
    """DreamTime's timestep (Huang et al. 2023, arXiv 2306.12422) at `progress` in [0, 1] of the run; it never rises.

    It spends time on the timesteps in proportion to W(t): 1 on [500, 800], exp(-(t - 800)^2 / (2 300^2)) above,
    exp(-(t - 500)^2 / (2 100^2)) below, all of a schedule of 1000. With W normalised over `timestep_bounds(t_range)`, the timestep is
    the t where the sum of W from the upper bound down to t is nearest to `progress`.

    Raises ValueError for a progress outside [0, 1].
    """
    _check_progress(progress)
    low, high = timestep_bounds(t_range, num_train_timesteps)
    t = torch.arange(low, high + 1, dtype=torch.float64) * (1000 / num_train_timesteps)
    weight = torch.exp(-((t - 800).clamp(min=0) ** 2) / (2 * 300**2) - (500 - t).clamp(min=0) ** 2 / (2 * 100**2))
    spent = (weight / weight.sum()).flip(0).cumsum(0)  # from the upper bound down
    return high - int((spent - progress).abs().argmin())


def annealed_timestep(progress: float, t_range: tuple[float, float] = (0.02, 0.5), num_train_timesteps: int = 1000) -> int:
    """HiFA's timestep (Zhu & Zhuang 2023, arXiv 2305.18766) at `progress` in [0, 1]: t_max - (t_max - t_min) sqrt(progress), rounded.

    t_min and t_max are `timestep_bounds(t_range)`. Raises ValueError for a progress outside [0, 1].
    """
    _check_progress(progress)
    low, high = timestep_bounds(t_range, num_train_timesteps)
    return round(high - (high - low) * progress**0.5)


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: found {progress}, wanted a share of the run in [0, 1]")


SCHEDULED = {"dreamtime": dreamtime_timestep, "sqrt-anneal": annealed_timestep}
SAMPLINGS = ("uniform", *SCHEDULED)


def draw_timesteps(
    sampling: str,
    batch: int,
    t_range: tuple[float, float] = (0.02, 0.5),
    num_train_timesteps: int = 1000,
    progress: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(batch,) int64 timesteps in one of the ways of SAMPLINGS.

    uniform: `sample_timesteps`, every view its own. dreamtime, sqrt-anneal: `dreamtime_timestep`, `annealed_timestep`, the same for all
    views, a function of `progress` alone.

    Raises ValueError for another name.
    """
    if sampling == "uniform":
        return sample_timesteps(batch, t_range, num_train_timesteps, generator, device)
    if sampling not in SCHEDULED:
        raise ValueError(f"timestep_sampling: found {sampling!r}, wanted one of {', '.join(SAMPLINGS)}")
    t = SCHEDULED[sampling](progress, t_range, num_train_timesteps)
    return torch.full((batch,), t, dtype=torch.int64, device=device or (generator.device if generator is not None else "cpu"))
