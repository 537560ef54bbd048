"""Randomness that depends on the step and not on the past, so that a resumed run draws what the uninterrupted one would.

A generator's state cannot simply be stored with the checkpoint: Lightning fetches the next batch before it saves, and validation
pictures draw numbers too. Numbers that are a function of (seed, step, process, purpose) need nothing stored.
"""

import hashlib
import os
import random


def get_seed() -> int:
    """Seed of the run, as both hosts' launchers leave it in the environment; 0 outside of a run."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed that is a hash of `seed` and `key`; the same on every machine."""
    text = "/".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def step_generator(seed: int, step: int, rank: int = 0, stream: str = "", device="cpu"):
    """A torch.Generator for one purpose in one step of one process.

    Args:
        seed: seed of the run.
        step: optimiser steps done (`true_global_step`), or the index of the batch.
        rank: process (`get_rank()`): each GPU sees its own views and noise.
        stream: what the numbers are for ("cameras", "timesteps", ...): streams are independent of each other.
        device: where the generator lives; draws on CPU and CUDA differ.

    Use it where a batch is made ahead of its step (a data set that is prefetched) and wherever else the global generator may
    not be in step; `torch.randn` in `training_step` itself is in step in the standalone host (see `seed_step`).
    """
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, step, rank, stream))


def seed_step(seed: int, step: int, micro_batch: int = 0, rank: int = 0) -> None:
    """Seed Python's, numpy's and torch's global generators (all devices) for one training batch."""
    import numpy as np
    import torch

    value = derive_seed(seed, step, micro_batch, rank)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002  libraries draw from the global one
    torch.manual_seed(value)
