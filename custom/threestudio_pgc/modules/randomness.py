"""Random numbers that depend on the seed, the step and the process alone: a resumed run draws what the uninterrupted one would have."""

import os

import torch

from ..host import get_rank
from ..host import step_generator as seeded_generator


def step_generator(stream: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator for one named use in one step, e.g. ("timesteps", 120), the same under either host.

    The base is the seed of the run, which Lightning's `seed_everything` leaves in the environment; 0 where nothing was seeded.
    """
    return seeded_generator(int(os.environ.get("PL_GLOBAL_SEED", "0")), step, get_rank(), stream, device)
