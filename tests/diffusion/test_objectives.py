import pytest
import torch

from threestudio_pgc.diffusion.objectives import WEIGHTINGS, cfg_combine, sds
from threestudio_pgc.diffusion.prior import NoisePrediction


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    cond, uncond, noise = torch.randn(3, 2, 4, 3, 3, generator=generator, dtype=torch.float64)
    return NoisePrediction(cond, uncond), noise, torch.tensor([0.9, 0.25], dtype=torch.float64).view(2, 1, 1, 1)


def test_an_empty_batch_gives_an_empty_gradient():
    empty = torch.zeros(0, 4, 3, 3)
    assert sds(NoisePrediction(empty, empty), empty, torch.zeros(0, 1, 1, 1), 100.0).shape == (0, 4, 3, 3)


def test_sds_is_the_equation_element_by_element(case):
    prediction, noise, alpha_bar = case
    weights = {
        "sds": lambda a: 1 - a,
        "uniform": lambda a: 1.0,
        "fantasia3d": lambda a: a**0.5 * (1 - a),
    }
    assert set(weights) == set(WEIGHTINGS)
    for name, weight in weights.items():
        gradient = sds(prediction, noise, alpha_bar, 7.5, weighting=name)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in noise.shape)).tolist():
            b, place = index[0], tuple(index)
            eps_y, eps = prediction.cond[place].item(), prediction.uncond[place].item()
            expected = weight(alpha_bar[b].item()) * (eps_y + 7.5 * (eps_y - eps) - noise[place].item())
            assert gradient[place].item() == pytest.approx(expected, rel=1e-12)


def test_authors_form_at_s_is_diffusers_form_at_s_plus_one(case):
    prediction = case[0]
    authors = cfg_combine(prediction, 100.0)
    torch.testing.assert_close(authors, cfg_combine(prediction, 101.0, "diffusers"), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(authors, cfg_combine(prediction, 100.0, "diffusers"))


def test_plain_conditional_prediction(case):
    prediction = case[0]
    assert torch.equal(cfg_combine(prediction, 0.0), prediction.cond)
    torch.testing.assert_close(cfg_combine(prediction, 1.0, "diffusers"), prediction.cond)
    assert torch.equal(cfg_combine(prediction, 0.0, "diffusers"), prediction.uncond)


def test_the_gradient_vanishes_where_the_noise_is_predicted(case):
    _, noise, alpha_bar = case
    assert not sds(NoisePrediction(noise, noise), noise, alpha_bar, 100.0).any()


def test_a_view_does_not_see_its_neighbours(case):
    prediction, noise, alpha_bar = case
    alone = sds(NoisePrediction(prediction.cond[1:], prediction.uncond[1:]), noise[1:], alpha_bar[1:], 100.0)
    assert torch.equal(sds(prediction, noise, alpha_bar, 100.0)[1:], alone)


def test_unknown_names_are_refused(case):
    prediction, noise, alpha_bar = case
    with pytest.raises(ValueError, match="'vanilla'.*authors, diffusers"):
        cfg_combine(prediction, 1.0, "vanilla")
    with pytest.raises(ValueError, match="'sigma'.*sds, uniform, fantasia3d"):
        sds(prediction, noise, alpha_bar, 1.0, weighting="sigma")
