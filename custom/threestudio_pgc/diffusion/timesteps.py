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
