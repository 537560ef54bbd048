"""Random numbers that depend on the seed, the step and the process alone: a resumed run draws what the uninterrupted one would have."""

import torch

from ..host import get_rank, get_seed
from ..host import step_generator as seeded_generator


def step_generator(stream: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator for one named use in one step of this process, e.g. ("timesteps", 120), the same under either host."""
    return seeded_generator(get_seed(), step, get_rank(), stream, device)
