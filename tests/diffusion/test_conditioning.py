import pytest
import torch

from threestudio_pgc.diffusion.conditioning import (
    DIRECTIONS,
    direction_index,
    perp_neg,
    view_prompts,
)


def test_view_prompts():
    assert view_prompts("a cup") == ["a cup, side view", "a cup, front view", "a cup, back view", "a cup, overhead view"]
    assert DIRECTIONS == ("side", "front", "back", "overhead")


def test_direction_of_no_view():
    assert direction_index(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    "elevation, azimuth, direction",
    [
        (0, 0, "front"),
        (0, 44.9, "front"),
        (0, -44.9, "front"),
        (0, 315.1, "front"),
        (0, 360, "front"),
        (0, 45, "side"),
        (0, 90, "side"),
        (0, -90, "side"),
        (0, 270, "side"),
        (0, 135, "side"),
        (0, 135.1, "back"),
        (0, 180, "back"),
        (0, -180, "back"),
        (0, 224.9, "back"),
        (0, 225, "side"),
        (60, 0, "front"),
        (60.1, 0, "overhead"),
        (89, 180, "overhead"),
        (-80, 0, "front"),
    ],
)
def test_direction_index(elevation, azimuth, direction):
    index = direction_index(torch.tensor([float(elevation)]), torch.tensor([float(azimuth)]))
    assert index.dtype == torch.int64
    assert DIRECTIONS[index.item()] == direction


def test_direction_thresholds():
    index = direction_index(torch.tensor([0.0, 0.0, 40.0]), torch.tensor([50.0, 100.0, 0.0]), front=60, back=85, overhead=30)
    assert [DIRECTIONS[i] for i in index] == ["front", "back", "overhead"]


# ---------------------------------------------------------------------------------------------------------------- perp-neg


def directions(towards):
    """The shares of one view by name, without those that are 0."""
    return {name: round(share, 6) for name, share in zip(DIRECTIONS, towards.tolist()) if share}


def test_perp_neg_of_no_view():
    towards, away = perp_neg(torch.zeros(0), torch.zeros(0))
    assert towards.shape == (0, 4) and away.shape == (2, 0)


@pytest.mark.parametrize(
    "azimuth, towards, front, side",
    [
        (0, {"front": 1.0}, 0.000123, 1.574),
        (45, {"front": 0.5, "side": 0.5}, 0.689203, 0.689203),
        (-45, {"front": 0.5, "side": 0.5}, 0.689203, 0.689203),
        (315, {"front": 0.5, "side": 0.5}, 0.689203, 0.689203),
        (22.5, {"front": 0.75, "side": 0.25}, 0.323157, 1.103988),
        (90, {"side": 1.0}, 1.573531, 0.000531),
        (135, {"side": 0.5, "back": 0.5}, 1.745801, 0.172801),
        (-135, {"side": 0.5, "back": 0.5}, 1.745801, 0.172801),
        (180, {"back": 1.0}, 1.967, 0.394),
        (-180, {"back": 1.0}, 1.967, 0.394),
    ],
)
def test_perp_neg_by_azimuth(azimuth, towards, front, side):
    found = perp_neg(torch.tensor([10.0], dtype=torch.float64), torch.tensor([float(azimuth)], dtype=torch.float64))
    assert directions(found.towards[0]) == towards
    torch.testing.assert_close(found.away[:, 0], torch.tensor([front, side], dtype=torch.float64), rtol=0, atol=1e-6)


def test_perp_neg_from_above_mixes_and_leaves_nothing():
    found = perp_neg(torch.tensor([60.0, 60.1]), torch.tensor([0.0, 100.0]))
    assert [directions(row) for row in found.towards] == [{"front": 1.0}, {"overhead": 1.0}]
    assert found.away[0, 1] == found.away[1, 1] == 0
    assert directions(perp_neg(torch.tensor([40.0]), torch.tensor([0.0]), overhead=30).towards[0]) == {"overhead": 1.0}


def test_perp_neg_is_continuous_around_the_object():
    azimuth = torch.arange(-200.0, 200.0, 0.5, dtype=torch.float64)
    found = perp_neg(torch.zeros_like(azimuth), azimuth)
    torch.testing.assert_close(found.towards.sum(dim=1), torch.ones_like(azimuth), rtol=0, atol=1e-12)
    assert found.towards.diff(dim=0).abs().max() < 0.006
    assert found.away.diff(dim=1).abs().max() < 0.012
    assert found.away.min() >= 0
