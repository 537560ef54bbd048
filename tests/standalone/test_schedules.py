import math

import pytest
from omegaconf import OmegaConf

from threestudio_pgc.standalone.schedules import C

ramp = [0, 0.5, 0.05, 100]
pieces = [0, 1.0, 2.0, 10, 4.0, 20, 0.0, 40]


@pytest.mark.parametrize(
    "value, epoch, step, expected",
    [
        (3, 0, 0, 3),
        (0.25, 9, 9, 0.25),
        (ramp, 0, 0, 0.5),
        (ramp, 0, 50, 0.275),
        (ramp, 0, 100, 0.05),
        (ramp, 0, 1000, 0.05),
        (ramp[1:], 0, 50, 0.275),  # start is 0 where it is left out
        ([10, 1, 2, 20], 0, 0, 1),
        ([10, 1, 2, 20], 0, 15, 1.5),
        ([10, 1, 2, 10], 0, 9, 1),  # a jump
        ([10, 1, 2, 10], 0, 10, 2),
        ([0, 1, 2, 4.0], 1, 999, 1.25),  # the end as a float counts epochs
        ([0, 1, 2, 4.0], 9, 0, 2),
        (pieces, 0, 0, 1),
        (pieces, 0, 5, 1.5),
        (pieces, 0, 10, 2),
        (pieces, 0, 15, 3),
        (pieces, 0, 20, 4),
        (pieces, 0, 30, 2),
        (pieces, 0, 99, 0),
    ],
)
def test_table(value, epoch, step, expected):
    assert C(value, epoch, step) == pytest.approx(expected, abs=1e-12)
    if isinstance(value, list):
        assert C(OmegaConf.create(value), epoch, step) == pytest.approx(expected, abs=1e-12)


def test_exp_is_linear_in_the_logarithm():
    assert C([0, 1.0, 0.01, 10], 0, 5, "exp") == pytest.approx(0.1)
    assert C([0, 1.0, 0.01, 10], 0, 99, "exp") == pytest.approx(0.01)
    assert math.isclose(C([0, 2.0, 2.0, 10], 0, 3, "exp"), 2.0)


@pytest.mark.parametrize("value", [None, "0.5", True, {"v": 1}, ["a", 1, 2, 3]])
def test_what_is_no_schedule_is_refused(value):
    with pytest.raises(ValueError, match="a schedule is a number or a list"):
        C(value, 0, 0)


@pytest.mark.parametrize("value", [[], [1], [1, 2], [0, 1, 2, 3, 4]])
def test_wrong_length_is_refused(value):
    with pytest.raises(ValueError, match="found"):
        C(value, 0, 0)


def test_exp_needs_positive_values():
    with pytest.raises(ValueError, match="positive"):
        C([0, 0.0, 1.0, 10], 0, 5, "exp")
    with pytest.raises(ValueError, match="'linear' or 'exp'"):
        C([0, 0.0, 1.0, 10], 0, 5, "cubic")
