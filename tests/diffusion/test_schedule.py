import pytest
import torch

from threestudio_pgc.diffusion import schedule
from threestudio_pgc.diffusion.prior import NoiseLevel

SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 400},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.3]},
    ],
)
def test_agrees_with_diffusers(changes):
    from diffusers import DDIMScheduler

    config = SDXL | changes
    ours = schedule.alphas_cumprod(config)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, DDIMScheduler(**config).alphas_cumprod.double(), rtol=3e-4, atol=1e-6)


def test_sdxl_is_the_product_written_out():
    ours = schedule.alphas_cumprod(SDXL)
    kept = 1.0
    for t in range(1000):
        beta = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2
        kept *= 1 - beta
        assert ours[t].item() == pytest.approx(kept, rel=1e-11)


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="found 'exp', wanted scaled_linear"):
        schedule.betas(SDXL | {"beta_schedule": "exp"})
    with pytest.raises(KeyError, match="beta_schedule"):
        schedule.betas({"num_train_timesteps": 10})


def test_v_prediction_gives_the_noise_back():
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    alpha_bar = torch.tensor([0.999, 0.5, 1e-4], dtype=torch.float64).view(3, 1, 1, 1)
    level = NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    z_t = level.add_noise(z, eps)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z
    torch.testing.assert_close(schedule.noise_from_output(v, z_t, level, "v_prediction"), eps, rtol=1e-12, atol=1e-12)
    assert schedule.noise_from_output(v, z_t, level, "epsilon") is v
    with pytest.raises(ValueError, match="found 'sample'"):
        schedule.noise_from_output(v, z_t, level, "sample")


def test_a_flows_velocity_gives_the_noise_back():
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64).view(3, 1, 1, 1)
    level = NoiseLevel(1 - sigma, sigma)
    torch.testing.assert_close(schedule.noise_from_output(eps - z, level.add_noise(z, eps), level, "flow"), eps, rtol=1e-12, atol=1e-12)
