from math import exp, sqrt

import pytest
import torch

from threestudio_pgc.diffusion.timesteps import (
    SAMPLINGS,
    annealed_timestep,
    draw_timesteps,
    dreamtime_timestep,
    sample_timesteps,
    timestep_bounds,
)


def test_an_empty_batch():
    assert sample_timesteps(0).shape == (0,)


def test_both_bounds_are_included_and_drawn_evenly():
    t = sample_timesteps(60_000, (0.02, 0.05), generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=51)
    assert (t.min(), t.max()) == (20, 50)
    assert not counts[:20].any()
    expected = 60_000 / 31
    assert (counts[20:] - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize(
    "t_range, steps, bounds",
    [
        ((0.02, 0.5), 1000, (20, 500)),
        ((0.29, 0.57), 1000, (290, 570)),  # 0.29 * 1000 is 289.99... in floating point
        ((0, 1), 1000, (0, 999)),
        ((1, 1), 1000, (999, 999)),
        ((0.5, 0.5), 10, (5, 5)),
    ],
)
def test_bounds(t_range, steps, bounds):
    assert timestep_bounds(t_range, steps) == bounds
    t = sample_timesteps(50, t_range, steps)
    assert bounds[0] <= t.min() and t.max() <= bounds[1]


def test_views_are_drawn_independently():
    t = sample_timesteps(20_000, (0.0, 1.0), generator=torch.Generator().manual_seed(1)).double()
    first, second = t[::2], t[1::2]
    assert (first != second).double().mean() > 0.99
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.04


def test_a_seed_repeats():
    draws = [sample_timesteps(16, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], sample_timesteps(16, generator=torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("t_range", [(0.5, 0.02), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_bad_ranges_are_refused(t_range):
    with pytest.raises(ValueError, match="t_range: found"):
        sample_timesteps(1, t_range)


# ------------------------------------------------------------------------------------------------------------------ scheduled


def dreamtime_written_out(progress, low, high, steps):
    """argmin_t |sum_{u >= t} W(u) / sum W - progress|, one timestep at a time."""

    def w(t):
        t = t * 1000 / steps
        if t > 800:
            return exp(-((t - 800) ** 2) / (2 * 300**2))
        if t < 500:
            return exp(-((t - 500) ** 2) / (2 * 100**2))
        return 1.0

    total = sum(w(t) for t in range(low, high + 1))
    return min(range(high, low - 1, -1), key=lambda t: abs(sum(w(u) for u in range(t, high + 1)) / total - progress))


@pytest.mark.parametrize("t_range, steps, bounds", [((0.2, 0.68), 1000, (200, 680)), ((0, 1), 100, (0, 99)), ((0.3, 0.3), 50, (15, 15))])
def test_dreamtime_is_the_equation(t_range, steps, bounds):
    for progress in (0.0, 0.01, 0.3, 0.77, 1.0):
        assert dreamtime_timestep(progress, t_range, steps) == dreamtime_written_out(progress, *bounds, steps)


def test_dreamtime_gives_the_numbers_of_the_reference():
    found = [dreamtime_timestep(progress, (0.2, 0.68)) for progress in (0, 0.25, 0.5, 0.75, 0.999)]
    assert found == [680, 605, 528, 450, 220]


@pytest.mark.parametrize("schedule", [dreamtime_timestep, annealed_timestep])
def test_a_schedule_falls_from_one_bound_to_the_other(schedule):
    for t_range, steps in (((0.02, 0.98), 1000), ((0.0, 1.0), 50), ((0.5, 0.5), 1000)):
        t = [schedule(step / 400, t_range, steps) for step in range(401)]
        assert (t[-1], t[0]) == timestep_bounds(t_range, steps)
        assert t == sorted(t, reverse=True)
        assert all(type(value) is int for value in t)


def test_dreamtime_spends_its_time_in_the_middle():
    t = torch.tensor([dreamtime_timestep(step / 999, (0.0, 1.0)) for step in range(1000)])
    middle = ((t >= 500) & (t <= 800)).double().mean()
    weights = [exp(-((min(t - 500, 0) / 100) ** 2) / 2 - (max(t - 800, 0) / 300) ** 2 / 2) for t in range(1000)]
    assert middle.item() == pytest.approx(301 / sum(weights), abs=0.005)


def test_the_annealed_timestep_is_hifa_s():
    for progress in (0.0, 0.04, 0.1, 0.25, 0.5, 1.0):
        assert annealed_timestep(progress, (0.2, 0.7)) == round(700 - 500 * sqrt(progress))


@pytest.mark.parametrize("schedule", [dreamtime_timestep, annealed_timestep])
@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_a_progress_outside_the_run_is_refused(schedule, progress):
    with pytest.raises(ValueError, match="progress: found"):
        schedule(progress)


def test_uniform_drawing_is_sample_timesteps():
    t = draw_timesteps("uniform", 16, (0.1, 0.9), 500, progress=0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(t, sample_timesteps(16, (0.1, 0.9), 500, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("sampling, schedule", [("dreamtime", dreamtime_timestep), ("sqrt-anneal", annealed_timestep)])
def test_scheduled_drawing_gives_all_views_the_same(sampling, schedule):
    for batch in (0, 3):
        t = draw_timesteps(sampling, batch, (0.1, 0.9), 500, progress=0.3)
        assert t.dtype == torch.int64
        assert t.tolist() == [schedule(0.3, (0.1, 0.9), 500)] * batch


def test_every_sampling_has_a_test_and_others_are_refused():
    assert SAMPLINGS == ("uniform", "dreamtime", "sqrt-anneal")
    with pytest.raises(ValueError, match="timestep_sampling: found 'linear', wanted one of uniform, dreamtime, sqrt-anneal"):
        draw_timesteps("linear", 1)
