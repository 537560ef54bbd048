import pytest
import torch

from threestudio_pgc.scene.materials import MATERIALS, AlbedoMaterial


def test_no_points():
    assert AlbedoMaterial()(torch.zeros(0, 3)).shape == (0, 3)


def test_range_is_the_sigmoid_s_stretched():
    features = torch.tensor([[-1e4, 0.0, 1e4]])
    torch.testing.assert_close(AlbedoMaterial()(features), torch.tensor([[0.05, 0.5, 0.95]]))
    torch.testing.assert_close(AlbedoMaterial(0.0, 1.0)(features), torch.tensor([[0.0, 0.5, 1.0]]))


def test_equals_the_authors_formula():
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(AlbedoMaterial()(features), torch.sigmoid(features) * 0.9 + 0.05)


def test_gradient():
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MATERIALS["albedo"](), (features,))


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_a_bad_range_is_refused_by_name(low, high):
    with pytest.raises(ValueError, match="material low, high: found"):
        AlbedoMaterial(low, high)


def test_a_wrong_number_of_features_is_refused():
    with pytest.raises(ValueError, match="found 4 channels, wanted 3"):
        AlbedoMaterial()(torch.zeros(2, 4))
