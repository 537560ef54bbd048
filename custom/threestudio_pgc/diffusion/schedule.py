"""The noise schedule of a diffusers scheduler configuration, and the arithmetic around it, each as its equation."""

from __future__ import annotations

import torch
from torch import Tensor

from .prior import NoiseLevel


def betas(config: dict) -> Tensor:
    """(T,) float64 variances beta_t of the forward process, from `num_train_timesteps`, `beta_start`, `beta_end`, `beta_schedule`.

    scaled_linear (Stable Diffusion): sqrt(beta_t) is linear in t. linear: beta_t is. squaredcos_cap_v2 (Nichol & Dhariwal 2021,
    eq. 17): abar follows cos^2((t + 0.008) / 1.008 * pi / 2). `trained_betas` overrides all.

    Raises KeyError for a missing entry, ValueError for an unknown schedule.
    """
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    steps, schedule = config["num_train_timesteps"], config["beta_schedule"]
    if schedule == "linear":
        return torch.linspace(config["beta_start"], config["beta_end"], steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        s = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((s + 0.008) / 1.008 * torch.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule: found {schedule!r}, wanted scaled_linear, linear or squaredcos_cap_v2")


def alphas_cumprod(config: dict) -> Tensor:
    """(T,) float64: abar_t = prod_{s <= t} (1 - beta_s); with `rescale_betas_zero_snr`, shifted so that abar_T = 0.

    The shift is algorithm 1 of Lin et al. 2023: sqrt(abar) is mapped linearly so that its last value is 0 and its first unchanged.
    """
    alpha_bar = torch.cumprod(1 - betas(config), dim=0)
    if config.get("rescale_betas_zero_snr"):
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


def noise_from_output(output: Tensor, z_t: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """The noise a network predicts, whatever it was trained to put out; tensors (B, C, h, w).

    epsilon: the output itself. v_prediction (Salimans & Ho 2022): v = alpha eps - sigma z, hence eps = alpha v + sigma z_t.
    flow (Lipman et al. 2023; Esser et al. 2024): v = eps - z with alpha + sigma = 1, hence eps = z_t + alpha v.

    Raises ValueError for another prediction type.
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return level.alpha * output + level.sigma * z_t
    if prediction_type == "flow":
        return z_t + level.alpha * output
    raise ValueError(f"prediction_type: found {prediction_type!r}, wanted epsilon, v_prediction or flow")
