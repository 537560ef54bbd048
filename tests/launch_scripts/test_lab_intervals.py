import math

import numpy as np
import pytest

from launch_scripts.lab.intervals import difference, grouped, interval, spelled


def test_nothing_has_no_interval():
    assert math.isnan(interval([]).mean) and spelled(interval([[], []])) == "-"


def test_one_value_is_its_own_interval():
    assert interval([[0.25]]) == (0.25, 0.25, 0.25)


def test_groups_count_alike_whatever_their_size():
    assert interval([[0.0], [1.0, 1.0, 1.0]]).mean == 0.5


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    """Twelve pairs that differ, three seeds that differ less: of 200 such studies about 95 % must cover the mean of all pairs."""
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(200):
        values = rng.normal(0.5, 0.2, (12, 1)) + rng.normal(0, 0.05, (12, 3))
        found = interval(values, seed=study)
        covered += found.low <= 0.5 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_resampling_runs_as_if_independent_would_be_too_narrow():
    values = np.repeat(np.linspace(0, 1, 6)[:, None], 30, axis=1)  # seeds agree, pairs do not
    together, apart = interval(values), interval(values.reshape(-1, 1))
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_a_difference_is_of_the_same_pair_and_seed():
    reference = {(pair, seed): pair * 10.0 + seed for pair in range(4) for seed in range(3)}
    better = {key: value + 1.0 for key, value in reference.items()} | {("alone", 0): 99.0}
    assert difference(better, reference) == pytest.approx((1.0, 1.0, 1.0))
    assert grouped(reference)[2] == [20.0, 21.0, 22.0]
