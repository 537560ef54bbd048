import pytest
import torch

from threestudio_pgc.pixelgrad import gradient_statistics, nonfinite_pixels


def test_no_gradient_gives_zeros():
    assert set(gradient_statistics(torch.zeros(2, 4, 4, 3), 0.1).values()) == {0.0}
    assert set(gradient_statistics(torch.zeros(0, 4, 4, 3), 0.1).values()) == {0.0}


def test_quantiles_share_and_counts():
    norms = torch.arange(1, 1001, dtype=torch.float32) / 1000
    gradient = torch.zeros(1, 100, 20, 3)  # half the pixels are background and must not count
    gradient[0, :, :10, 0] = norms.view(100, 10)
    gradient[0, 0, 15, 1] = float("nan")
    found = gradient_statistics(gradient, 0.9)
    assert found["norm_p50"] == pytest.approx(0.5, abs=2e-3)
    assert found["norm_p99"] == pytest.approx(0.99, abs=2e-3)
    assert found["norm_max"] == 1.0
    assert found["share_clipped"] == pytest.approx(0.1)
    assert found["nonfinite"] == 1


def test_nonfinite_pixels_counts_pixels_not_channels():
    gradient = torch.zeros(1, 2, 2, 3)
    gradient[0, 0, 0] = float("inf")
    assert nonfinite_pixels(gradient).sum() == 1
