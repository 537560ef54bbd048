import pytest
import torch

from threestudio_pgc.diffusion.timesteps import sample_timesteps, timestep_bounds


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
