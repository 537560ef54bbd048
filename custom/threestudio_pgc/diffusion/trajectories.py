"""Deterministic paths between clean and noisy latents: DDIM steps (Song et al. 2020, arXiv 2010.02502, eta = 0), both ways.

All take `predict`, the noise (B, C, h, w) at z_t (B, C, h, w) and t (B,), and the `noise_level` of a prior. Every view has its own
timesteps. What `predict` builds of a graph is kept: call within `torch.no_grad()`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .prior import NoiseLevel

Predict = Callable[[Tensor, Tensor], Tensor]


def ddim_step(z: Tensor, eps: Tensor, level: NoiseLevel, next_level: NoiseLevel) -> Tensor:
    """z at the next level: alpha' z_0 + sigma' eps with z_0 = (z - sigma eps) / alpha.

    For a flow-matching model this is the Euler step z + (sigma' - sigma) (eps - z_0). A level without signal (alpha = 0) has no z_0.
    """
    return next_level.add_noise(level.clean(z, eps), eps)


def invert(latents: Tensor, timesteps: Tensor, predict: Predict, noise_level: Callable[[Tensor], NoiseLevel]) -> tuple[Tensor, Tensor]:
    """DDIM inversion: from clean latents to z at timesteps[-1], and the noise that the last step used, both (B, C, h, w).

    timesteps (K, B) integers, not decreasing. Each step predicts where it starts: the first at the clean latents and t = 0, a later one
    at z and the timestep before its own. So the noise of the last step is the eps(z_s; s) of `objectives.ism`, s = timesteps[-2], or 0
    for a single step. LucidDreamer's code does the same, from latents noised to its lowest timestep; SDI's code too, but tells the
    network a timestep below 0 in the first step.

    Raises ValueError for timesteps that are empty or decrease.
    """
    _check_order(timesteps, ascending=True)
    z, t = latents, torch.zeros_like(timesteps[0])
    level = NoiseLevel(latents.new_ones(len(latents), 1, 1, 1), latents.new_zeros(len(latents), 1, 1, 1))
    for next_t in timesteps:
        eps, next_level = predict(z, t), noise_level(next_t)
        z, t, level = ddim_step(z, eps, level, next_level), next_t, next_level
    return z, eps


def denoise(z_t: Tensor, timesteps: Tensor, predict: Predict, noise_level: Callable[[Tensor], NoiseLevel]) -> Tensor:
    """Clean latents (B, C, h, w) after K DDIM steps from z_t at timesteps[0]; the last step goes to the clean level (1, 0).

    timesteps (K, B) integers, not increasing: `even_timesteps(...).flip(0)`.

    Raises ValueError for timesteps that are empty or increase.
    """
    _check_order(timesteps, ascending=False)
    z, level = z_t, noise_level(timesteps[0])
    for t, next_t in pairwise(timesteps):
        next_level = noise_level(next_t)
        z, level = ddim_step(z, predict(z, t), level, next_level), next_level
    return level.clean(z, predict(z, timesteps[-1]))


def noise_between(latents: Tensor, z_t: Tensor, level: NoiseLevel) -> Tensor:
    """The noise kappa that takes the latents to z_t in one go, z_t = alpha z + sigma kappa; the inverted noise of `objectives.sdi`.

    Not the noise of the inversion's last step, unless there was only one. A level without noise (sigma = 0) has none.
    """
    return (z_t - level.alpha * latents) / level.sigma


def even_timesteps(t: Tensor, steps: int | Tensor) -> Tensor:
    """(K, B) int64 timesteps of about equal distance from 0, left out, up to t (B,), the last.

    steps: K, or how many each view takes, (B,); K is then the largest. A view that takes fewer stays at its t for the rest, where a DDIM
    step changes nothing: it is denoised as if it were alone.

    Raises ValueError where a number of steps is below 1.
    """
    steps = torch.as_tensor(steps, device=t.device)
    if (steps < 1).any():
        raise ValueError(f"steps: found {steps.tolist()}, wanted 1 or more")
    count = int(steps.max()) if steps.numel() else 1
    index = torch.minimum(torch.arange(1, count + 1, device=t.device)[:, None], steps)
    return (2 * t * index + steps) // (2 * steps)  # t * index / steps, rounded in integers


def solver_steps(t: Tensor, num_train_timesteps: int) -> Tensor:
    """(B,) how many steps the authors' HiFA objective denoises in from t (B,): ceil(t / (T / 4)), at least 1."""
    return (-(-4 * t // num_train_timesteps)).clamp(min=1)


def _check_order(timesteps: Tensor, ascending: bool) -> None:
    difference = timesteps.diff(dim=0) if ascending else -timesteps.diff(dim=0)
    if len(timesteps) == 0 or (difference < 0).any():
        wanted = "not decreasing" if ascending else "not increasing"
        raise ValueError(f"timesteps: found {timesteps.tolist()}, wanted one or more rows, {wanted}")
