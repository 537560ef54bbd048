import pytest
import torch

from threestudio_pgc.diffusion import schedule

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
    z_t = schedule.add_noise(z, eps, alpha_bar)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z
    torch.testing.assert_close(schedule.noise_from_output(v, z_t, alpha_bar, "v_prediction"), eps, rtol=1e-12, atol=1e-12)
    assert schedule.noise_from_output(v, z_t, alpha_bar, "epsilon") is v
    with pytest.raises(ValueError, match="found 'sample'"):
        schedule.noise_from_output(v, z_t, alpha_bar, "sample")
