from math import ceil

import pytest
import torch

from threestudio_pgc.diffusion import schedule
from threestudio_pgc.diffusion.objectives import sdi
from threestudio_pgc.diffusion.prior import NoiseLevel
from threestudio_pgc.diffusion.trajectories import ddim_step, denoise, even_timesteps, invert, noise_between, solver_steps

SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHA_BAR = schedule.alphas_cumprod(SDXL)


def diffusion(t):
    alpha_bar = ALPHA_BAR[t].view(-1, 1, 1, 1)
    return NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def flow_matching(t):
    sigma = ((t + 1) / 1001).double().view(-1, 1, 1, 1)
    return NoiseLevel(1 - sigma, sigma)


@pytest.fixture(params=[diffusion, flow_matching])
def noise_level(request):
    return request.param


@pytest.fixture
def pair():
    """Latents and noise of three views."""
    return torch.randn(2, 3, 4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


T = torch.tensor([20, 371, 950])  # one for each view


class Recorder:
    """A predictor that writes down what it was asked; its noise depends on z and on t."""

    def __init__(self):
        self.z, self.t, self.eps = [], [], []

    def __call__(self, z, t):
        self.z.append(z)
        self.t.append(t)
        self.eps.append(torch.sin(3 * z) + t.view(-1, 1, 1, 1) / 1000)
        return self.eps[-1]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------ one step


def test_a_step_with_the_true_noise_stays_on_the_line_to_the_latents(pair, noise_level):
    z, eps = pair
    level, next_level = noise_level(T), noise_level(T // 2)
    close(ddim_step(level.add_noise(z, eps), eps, level, next_level), next_level.add_noise(z, eps))


def test_a_diffusion_step_is_the_one_of_diffusers(pair):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SDXL, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    for t in (951, 501):
        theirs = scheduler.step(pair[1], t - 1, pair[0]).prev_sample
        ours = ddim_step(*pair, diffusion(torch.tensor([t - 1] * 3)), diffusion(torch.tensor([t - 51] * 3)))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # their schedule is float32


def test_a_flow_matching_step_is_euler(pair):
    z, eps = pair
    level, next_level = flow_matching(T), flow_matching(T // 3)
    velocity = eps - level.clean(z, eps)
    close(ddim_step(z, eps, level, next_level), z + (next_level.sigma - level.sigma) * velocity)


# ----------------------------------------------------------------------------------------------------------------- denoising


def test_an_empty_batch(noise_level):
    nothing, t = torch.zeros(0, 4, 3, 2, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    timesteps = even_timesteps(t, 3)
    assert timesteps.shape == (3, 0)
    assert even_timesteps(t, solver_steps(t, 1000)).shape == (1, 0)
    z, eps = invert(nothing, timesteps, Recorder(), noise_level)
    assert z.shape == eps.shape == denoise(z, timesteps.flip(0), Recorder(), noise_level).shape == nothing.shape


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_knowing_the_noise_gives_the_latents_back(pair, noise_level, steps):
    z, eps = pair
    close(denoise(noise_level(T).add_noise(z, eps), even_timesteps(T, steps).flip(0), lambda z_t, t: eps, noise_level), z)


def test_one_step_of_denoising_is_the_clean_estimate(pair, noise_level):
    ask = Recorder()
    close(denoise(pair[0], T[None], ask, noise_level), noise_level(T).clean(pair[0], ask.eps[0]))


def test_denoising_is_the_steps_written_out(pair, noise_level):
    ask, timesteps = Recorder(), even_timesteps(T, 3).flip(0)
    result = denoise(pair[0], timesteps, ask, noise_level)
    z = pair[0]
    for index in range(3):
        assert torch.equal(ask.t[index], timesteps[index])
        close(ask.z[index], z)
        level = noise_level(timesteps[index])
        clean = (z - level.sigma * ask.eps[index]) / level.alpha
        z = clean
        if index < 2:
            after = noise_level(timesteps[index + 1])
            z = after.alpha * clean + after.sigma * ask.eps[index]
    assert len(ask.t) == 3
    close(result, z)


# ----------------------------------------------------------------------------------------------------------------- inversion


def test_inversion_is_the_steps_written_out(pair, noise_level):
    ask, timesteps = Recorder(), even_timesteps(T, 3)
    result, last = invert(pair[0], timesteps, ask, noise_level)
    z, alpha, sigma = pair[0], 1, 0
    for index in range(3):
        assert torch.equal(ask.t[index], timesteps[index - 1] if index else torch.zeros_like(T))
        close(ask.z[index], z)
        after = noise_level(timesteps[index])
        z = after.alpha * (z - sigma * ask.eps[index]) / alpha + after.sigma * ask.eps[index]
        alpha, sigma = after
    assert len(ask.t) == 3
    assert last is ask.eps[-1]
    close(result, z)


def test_one_step_of_inversion_adds_the_noise_predicted_at_the_latents(pair, noise_level):
    ask = Recorder()
    z_t, eps = invert(pair[0], T[None], ask, noise_level)
    assert torch.equal(ask.z[0], pair[0])
    close(z_t, noise_level(T).add_noise(pair[0], eps))
    close(noise_between(pair[0], z_t, noise_level(T)), eps)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_inverting_and_denoising_is_a_round_trip(pair, noise_level, steps):
    z, eps = pair
    timesteps = even_timesteps(T, steps)
    z_t, used = invert(z, timesteps, lambda z_t, t: eps, noise_level)
    assert used is eps
    close(z_t, noise_level(T).add_noise(z, eps))
    close(denoise(z_t, timesteps.flip(0), lambda z_t, t: eps, noise_level), z)


def test_the_noise_between_explains_where_an_inversion_ended(pair, noise_level):
    z_t, last = invert(pair[0], even_timesteps(T, 4), Recorder(), noise_level)
    found = noise_between(pair[0], z_t, noise_level(T))
    close(noise_level(T).add_noise(pair[0], found), z_t)
    assert not torch.allclose(found, last)
    assert not sdi(found, found, noise_level(T)).any()


def test_a_repeated_timestep_changes_nothing(pair, noise_level):
    once, twice = T[None], torch.stack([T, T])
    close(denoise(pair[0], twice, lambda z, t: pair[1], noise_level), denoise(pair[0], once, lambda z, t: pair[1], noise_level))
    z_once, z_twice = (invert(pair[0], timesteps, Recorder(), noise_level)[0] for timesteps in (once, twice))
    close(z_once, z_twice)


def test_a_view_does_not_see_its_neighbours(pair, noise_level):
    timesteps = even_timesteps(T, solver_steps(T, 1000))
    together = denoise(pair[0], timesteps.flip(0), Recorder(), noise_level)
    z_t, eps = invert(pair[0], even_timesteps(T, 3), Recorder(), noise_level)
    for view in range(3):
        only, t = slice(view, view + 1), T[view : view + 1]
        alone = denoise(pair[0][only], even_timesteps(t, solver_steps(t, 1000)).flip(0), Recorder(), noise_level)
        close(together[only], alone)
        z_alone, eps_alone = invert(pair[0][only], even_timesteps(t, 3), Recorder(), noise_level)
        close(z_t[only], z_alone)
        close(eps[only], eps_alone)


def test_timesteps_in_the_wrong_order_are_refused(pair):
    up = even_timesteps(T, 2)
    with pytest.raises(ValueError, match="timesteps: found .* wanted one or more rows, not decreasing"):
        invert(pair[0], up.flip(0), Recorder(), diffusion)
    with pytest.raises(ValueError, match="wanted one or more rows, not increasing"):
        denoise(pair[0], up, Recorder(), diffusion)
    for walk in (invert, denoise):
        with pytest.raises(ValueError, match=r"timesteps: found \[\]"):
            walk(pair[0], up[:0], Recorder(), diffusion)


# ----------------------------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_even_timesteps_are_even(steps):
    t = torch.tensor([0, 3, 20, 371, 999])
    timesteps = even_timesteps(t, steps)
    assert timesteps.shape == (steps, 5)
    assert timesteps.dtype == torch.int64
    assert torch.equal(timesteps[-1], t)
    assert (timesteps.diff(dim=0) >= 0).all()
    exact = t * torch.arange(1, steps + 1)[:, None] / steps
    assert (timesteps - exact).abs().max() <= 0.5


def test_each_view_takes_its_own_number_of_steps():
    timesteps = even_timesteps(torch.tensor([90, 900]), torch.tensor([1, 3]))
    assert timesteps.tolist() == [[90, 300], [90, 600], [90, 900]]


def test_no_steps_are_refused():
    for steps in (0, torch.tensor([2, 0, 1])):
        with pytest.raises(ValueError, match="steps: found .* wanted 1 or more"):
            even_timesteps(T, steps)


@pytest.mark.parametrize("num_train_timesteps", [1000, 100, 999])
def test_solver_steps_are_the_quarters_begun(num_train_timesteps):
    t = torch.arange(num_train_timesteps)
    expected = [max(ceil(4 * value / num_train_timesteps), 1) for value in range(num_train_timesteps)]
    assert solver_steps(t, num_train_timesteps).tolist() == expected


def test_the_reference_denoises_in_three_steps_then_in_two():
    assert solver_steps(torch.tensor([681, 501, 500, 251]), 1000).tolist() == [3, 3, 2, 2]
