import pytest
import torch

from threestudio_pgc.pixelgrad import gradient_statistics, isolated_outliers, kurtosis, nonfinite_pixels


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


def test_no_pixels_no_outliers():
    assert isolated_outliers(torch.zeros(0, 4, 4)).shape == (0, 4, 4)
    assert not isolated_outliers(torch.zeros(2, 6, 6)).any()
    assert not isolated_outliers(torch.full((1, 1, 1), 3.0)).any()


def test_isolated_outliers_against_the_definition_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    norms = torch.exp(1.5 * torch.randn(2, 12, 9, generator=generator))
    expected = torch.zeros_like(norms, dtype=torch.bool)
    for view in range(2):
        for y in range(12):
            for x in range(9):
                rows, columns = [min(max(y + d, 0), 11) for d in range(-2, 3)], [min(max(x + d, 0), 8) for d in range(-2, 3)]
                around = norms[view][rows][:, columns].flatten().sort().values
                expected[view, y, x] = norms[view, y, x] > 10 * around[12]
    assert expected.any() and not expected.all()
    assert torch.equal(isolated_outliers(norms), expected)


def test_a_spike_is_isolated_and_a_bright_region_is_not():
    norms = torch.ones(1, 20, 20)
    norms[0, 2, 3] = 10.5
    norms[0, 10:16, 10:16] = 50.0
    found = isolated_outliers(norms)
    assert found[0, 2, 3] and not found[0, 12:14, 12:14].any()


def test_kurtosis_of_known_distributions():
    assert kurtosis(torch.zeros(0)) == kurtosis(torch.full((5,), 2.0)) == 0.0
    assert kurtosis(torch.tensor([-1.0, 1.0]).repeat(10)) == pytest.approx(1.0)
    assert kurtosis(torch.linspace(-1, 1, 100001)) == pytest.approx(1.8, rel=1e-3)  # uniform
    assert kurtosis(torch.randn(10**6, generator=torch.Generator().manual_seed(0)) * 1e30) == pytest.approx(3.0, rel=0.02)
