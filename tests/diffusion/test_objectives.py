"""Each objective against its equation, written out once more in Python floats, one latent at a time."""

from dataclasses import dataclass, fields, replace
from math import sqrt
from statistics import pstdev

import pytest
import torch
from torch import Tensor

from threestudio_pgc.diffusion.objectives import (
    WEIGHTINGS,
    bgt,
    bgt_image,
    cfg_combine,
    csd,
    effective_scale,
    ism,
    nfsd,
    sdi,
    sds,
    ssd,
    vsd,
)
from threestudio_pgc.diffusion.prior import NoiseLevel, NoisePrediction

SCALE = 7.5
WEIGHTS = {
    "sds": lambda alpha, sigma: sigma * sigma,
    "uniform": lambda alpha, sigma: 1.0,
    "fantasia3d": lambda alpha, sigma: alpha * sigma * sigma,
}


@dataclass
class Case:
    """B views of everything that an objective can be given, with two negatives."""

    cond: Tensor
    uncond: Tensor
    negatives: Tensor
    noise: Tensor
    other: Tensor
    latents: Tensor
    image: Tensor
    decoded: Tensor
    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor
    weights: Tensor

    @property
    def prediction(self):
        return NoisePrediction(self.cond, self.uncond, self.negatives)

    @property
    def one_negative(self):
        return NoisePrediction(self.cond, self.uncond, self.negatives[:1])

    @property
    def level(self):
        return NoiseLevel(self.alpha, self.sigma)

    def views(self, index):
        """These views alone."""
        cut = {name: getattr(self, name)[:, index] for name in ("negatives", "weights")}
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self) if field.name not in cut}, **cut)


OBJECTIVES = {
    "sds": lambda c, **k: sds(c.prediction, c.noise, c.level, SCALE, rescale=0.7, negative_weights=c.weights, **k),
    "csd": lambda c, **k: csd(c.one_negative, c.level, negative_scale=0.5, **k),
    "nfsd": lambda c, **k: nfsd(c.one_negative, c.level, c.timesteps, **k),
    "ssd": lambda c, **k: ssd(c.prediction, c.noise, c.level, c.timesteps, **k),
    "ism": lambda c, **k: ism(c.cond, c.other, c.level, **k),
    "sdi": lambda c, **k: sdi(c.cond, c.other, c.level, **k),
    "vsd": lambda c, **k: vsd(c.cond, c.other, c.level, **k),
    "bgt": lambda c, **k: bgt(c.latents, c.other, c.level, **k),
    "bgt_image": lambda c, **k: bgt_image(c.image, c.decoded, c.level, **k),
}


@pytest.fixture(params=["diffusion", "flow matching"])
def case(request):
    """Three views on all sides of the boundaries: t = 50, 150, 700."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond, noise, other, latents = torch.randn(5, 3, 4, 3, 2, generator=generator, dtype=torch.float64)
    image, decoded = torch.rand(2, 3, 5, 4, 3, generator=generator, dtype=torch.float64)
    alpha = torch.tensor([0.95, 0.5, 0.125], dtype=torch.float64).view(3, 1, 1, 1)
    return Case(
        cond=cond,
        uncond=uncond,
        negatives=torch.randn(2, 3, 4, 3, 2, generator=generator, dtype=torch.float64),
        noise=noise,
        other=other,
        latents=latents,
        image=image,
        decoded=decoded,
        alpha=alpha,
        sigma=1 - alpha if request.param == "flow matching" else (1 - alpha**2).sqrt(),
        timesteps=torch.tensor([50, 150, 700]),
        weights=torch.tensor([[0.5, 0.0, 2.0], [1.5, 1.0, 0.0]], dtype=torch.float64),
    )


def floats(view):
    """One view's numbers as a list."""
    return view.flatten().tolist()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def agree(gradient, view, expected):
    assert floats(gradient[view]) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def weight(case, view, name="sds"):
    return WEIGHTS[name](case.alpha[view].item(), case.sigma[view].item())


# ----------------------------------------------------------------------------------------------------------- what all share


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_empty_batch_gives_an_empty_gradient(case, name):
    empty = case.views(slice(0, 0))
    assert OBJECTIVES[name](empty).shape == (empty.image if name == "bgt_image" else empty.latents).shape


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_view_does_not_see_its_neighbours(case, name):
    together = OBJECTIVES[name](case)
    for view in range(3):
        alone = OBJECTIVES[name](case.views(slice(view, view + 1)))
        torch.testing.assert_close(together[view : view + 1], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_weighting_multiplies_the_gradient(case, name):
    assert set(WEIGHTS) == set(WEIGHTINGS)
    plain = OBJECTIVES[name](case, weighting="uniform")
    for weighting in WEIGHTS:
        gradient = OBJECTIVES[name](case, weighting=weighting)
        for view in range(3):
            agree(gradient, view, [weight(case, view, weighting) * g for g in floats(plain[view])])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_unknown_weighting_is_refused(case, name):
    with pytest.raises(ValueError, match="weighting: found 'sigma', wanted one of sds, uniform, fantasia3d"):
        OBJECTIVES[name](case, weighting="sigma")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_arithmetic_stays_in_its_own_precision(case, name, dtype):
    values = {field.name: getattr(case, field.name) for field in fields(case) if field.name not in ("timesteps", "weights")}
    low = replace(case, **{key: value.to(dtype) for key, value in values.items()})
    gradient = OBJECTIVES[name](low)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), OBJECTIVES[name](case), rtol=0.1, atol=0.5 if dtype == torch.bfloat16 else 1e-4)


# ------------------------------------------------------------------------------------------------------------------ guidance


def test_authors_form_at_s_is_diffusers_form_at_s_plus_one(case):
    authors = cfg_combine(case.prediction, 100.0)
    torch.testing.assert_close(authors, cfg_combine(case.prediction, 101.0, "diffusers"), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(authors, cfg_combine(case.prediction, 100.0, "diffusers"))


@pytest.mark.parametrize("form", ["authors", "diffusers"])
def test_the_effective_scale_is_the_one_of_the_diffusers_form(case, form):
    scale = effective_scale(100.0, form)
    assert scale == {"authors": 101.0, "diffusers": 100.0}[form]
    torch.testing.assert_close(cfg_combine(case.prediction, 100.0, form), cfg_combine(case.prediction, scale, "diffusers"))


def test_plain_conditional_prediction(case):
    prediction = case.prediction
    assert torch.equal(cfg_combine(prediction, 0.0), prediction.cond)
    torch.testing.assert_close(cfg_combine(prediction, 1.0, "diffusers"), prediction.cond)
    assert torch.equal(cfg_combine(prediction, 0.0, "diffusers"), prediction.uncond)


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescale_is_lin_et_al_eq_15_and_16(case, phi):
    result = cfg_combine(case.prediction, SCALE, rescale=phi)
    for view in range(3):
        positive = floats(case.cond[view])
        guided = [y + SCALE * (y - n) for y, n in zip(positive, floats(case.uncond[view]), strict=True)]
        factor = pstdev(positive) / pstdev(guided)
        agree(result, view, [phi * (factor * g) + (1 - phi) * g for g in guided])
        if phi == 1:
            assert pstdev(floats(result[view])) == pytest.approx(pstdev(positive))


def test_a_constant_prediction_survives_rescale():
    flat = torch.full((1, 4, 2, 2), 0.5)
    assert torch.equal(cfg_combine(NoisePrediction(flat, flat), SCALE, rescale=1.0), flat)


@pytest.mark.parametrize("form", ["authors", "diffusers"])
def test_perpendicular_negatives_are_the_equation_element_by_element(case, form):
    result = cfg_combine(case.prediction, SCALE, form, negative_weights=case.weights)
    for view in range(3):
        eps = floats(case.uncond[view])
        positive = [y - e for y, e in zip(floats(case.cond[view]), eps, strict=True)]
        direction = list(positive)
        for index in range(2):
            negative = [n - e for n, e in zip(floats(case.negatives[index, view]), eps, strict=True)]
            share = dot(negative, positive) / dot(positive, positive)
            w = case.weights[index, view].item()
            direction = [d - w * (n - share * p) for d, n, p in zip(direction, negative, positive, strict=True)]
        scale = SCALE + 1 if form == "authors" else SCALE
        agree(result, view, [e + scale * d for e, d in zip(eps, direction, strict=True)])


@pytest.mark.parametrize("form", ["authors", "diffusers"])
def test_negatives_without_weight_change_nothing(case, form):
    plain = cfg_combine(NoisePrediction(case.cond, case.uncond), SCALE, form)
    none_of_them = NoisePrediction(case.cond, case.uncond, case.negatives[:0])
    assert torch.equal(cfg_combine(case.prediction, SCALE, form), plain)
    assert torch.equal(cfg_combine(case.prediction, SCALE, form, negative_weights=torch.zeros(2, 3)), plain)
    assert torch.equal(cfg_combine(none_of_them, SCALE, form, negative_weights=torch.zeros(0, 3)), plain)


def test_a_negative_along_the_prompt_changes_nothing(case):
    along = case.uncond + 3 * (case.cond - case.uncond)
    result = cfg_combine(NoisePrediction(case.cond, case.uncond, along[None]), SCALE, negative_weights=torch.ones(1, 3))
    torch.testing.assert_close(result, cfg_combine(case.prediction, SCALE), rtol=1e-10, atol=1e-10)


def test_a_prompt_without_a_direction_still_leads_away(case):
    prediction = NoisePrediction(case.uncond, case.uncond, case.negatives[:1])
    result = cfg_combine(prediction, SCALE, "diffusers", negative_weights=torch.ones(1, 3))
    torch.testing.assert_close(result, case.uncond - SCALE * (case.negatives[0] - case.uncond))


def test_bad_guidance_is_refused(case):
    with pytest.raises(ValueError, match="cfg: found 'vanilla', wanted one of authors, diffusers"):
        cfg_combine(case.prediction, 1.0, "vanilla")
    with pytest.raises(ValueError, match="cfg: found 'vanilla'"):
        effective_scale(1.0, "vanilla")
    for phi in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rescale: found"):
            cfg_combine(case.prediction, 1.0, rescale=phi)
    with pytest.raises(ValueError, match="negatives: found none"):
        cfg_combine(NoisePrediction(case.cond, case.uncond), 1.0, negative_weights=case.weights)
    with pytest.raises(ValueError, match=r"negative_weights: found shape \(3, 2\), wanted \(2, 3\)"):
        cfg_combine(case.prediction, 1.0, negative_weights=case.weights.T)


# ---------------------------------------------------------------------------------------------------------------- objectives


def test_sds_is_the_equation_element_by_element(case):
    for name in WEIGHTINGS:
        gradient = sds(case.prediction, case.noise, case.level, SCALE, weighting=name)
        for view in range(3):
            rows = zip(floats(case.cond[view]), floats(case.uncond[view]), floats(case.noise[view]), strict=True)
            agree(gradient, view, [weight(case, view, name) * (y + SCALE * (y - e) - n) for y, e, n in rows])


def test_sds_hands_its_guidance_options_on(case):
    options = {"rescale": 0.4, "negative_weights": case.weights}
    expected = cfg_combine(case.prediction, SCALE, "diffusers", **options) - case.noise
    gradient = sds(case.prediction, case.noise, case.level, SCALE, cfg="diffusers", weighting="uniform", **options)
    torch.testing.assert_close(gradient, expected)


def test_sds_vanishes_where_the_noise_is_predicted(case):
    assert not sds(NoisePrediction(case.noise, case.noise), case.noise, case.level, 100.0).any()


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_csd_is_the_paper_s_weighted_form(case, a):
    gradient = csd(case.one_negative, case.level, negative_scale=a)
    omega_1, omega_2 = 1.0, a
    for view in range(3):
        rows = zip(floats(case.cond[view]), floats(case.uncond[view]), floats(case.negatives[0, view]), strict=True)
        agree(gradient, view, [weight(case, view) * (omega_1 * y + (omega_2 - omega_1) * e - omega_2 * n) for y, e, n in rows])


def test_csd_is_what_a_large_scale_leaves_of_sds(case):
    huge = sds(case.prediction, case.noise, case.level, 1e9, cfg="diffusers") / 1e9
    torch.testing.assert_close(huge, csd(NoisePrediction(case.cond, case.uncond), case.level), rtol=0, atol=1e-7)


def test_nfsd_is_the_equation_element_by_element(case):
    gradient = nfsd(case.one_negative, case.level, case.timesteps, SCALE)
    for view, t in enumerate(case.timesteps.tolist()):
        expected = []
        for y, e, n in zip(floats(case.cond[view]), floats(case.uncond[view]), floats(case.negatives[0, view]), strict=True):
            delta_d = e if t < 200 else e - n
            expected.append(weight(case, view) * (delta_d + SCALE * (y - e)))
        agree(gradient, view, expected)


def test_nfsd_changes_at_its_boundary(case):
    at = [nfsd(case.one_negative, case.level, torch.full((3,), t), 0.0, weighting="uniform") for t in (199, 200)]
    assert torch.equal(at[0], case.uncond)
    assert torch.equal(at[1], case.uncond - case.negatives[0])


def test_ssd_is_the_equation_element_by_element(case):
    gradient = ssd(case.prediction, case.noise, case.level, case.timesteps)
    for view, t in enumerate(case.timesteps.tolist()):
        y, e, n = (floats(tensor[view]) for tensor in (case.cond, case.uncond, case.noise))
        result = h = [a - b for a, b in zip(y, e, strict=True)]
        if t <= 100:
            r = dot(y, n) / dot(n, n)
            rest = [a - r * b for a, b in zip(y, n, strict=True)]
            result = [sqrt(dot(h, h)) / sqrt(dot(rest, rest)) * x for x in rest]
        agree(gradient, view, [weight(case, view) * x for x in result])


def test_ssd_below_its_boundary_is_free_of_the_noise_and_as_long_as_csd(case):
    below, above = (ssd(case.prediction, case.noise, case.level, torch.full((3,), t)) for t in (100, 101))
    plain = csd(case.prediction, case.level)
    assert torch.equal(above, plain)
    torch.testing.assert_close(below.flatten(1).norm(dim=1), plain.flatten(1).norm(dim=1))
    assert (below * case.noise).flatten(1).sum(dim=1).abs().max() < 1e-12


def test_ssd_of_nothing_but_noise_is_zero(case):
    early = torch.zeros(3, dtype=torch.int64)
    noise = torch.ones_like(case.noise)  # so that the projection is exact
    for cond in (2 * noise, torch.zeros_like(noise)):
        assert not ssd(NoisePrediction(cond, case.uncond), noise, case.level, early).any()


def test_ssd_without_noise_keeps_the_direction_of_the_prediction(case):
    early = torch.zeros(3, dtype=torch.int64)
    gradient = ssd(case.prediction, torch.zeros_like(case.noise), case.level, early).flatten(1)
    torch.testing.assert_close(torch.cosine_similarity(gradient, case.cond.flatten(1)), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("objective", [ism, sdi, vsd])
def test_ism_sdi_and_vsd_are_weighted_differences(case, objective):
    gradient = objective(case.cond, case.other, case.level)
    for view in range(3):
        rows = zip(floats(case.cond[view]), floats(case.other[view]), strict=True)
        agree(gradient, view, [weight(case, view) * (a - b) for a, b in rows])


def test_sdi_with_the_noise_that_was_drawn_is_sds(case):
    guided = cfg_combine(case.prediction, SCALE)
    assert torch.equal(sdi(guided, case.noise, case.level), sds(case.prediction, case.noise, case.level, SCALE))


def test_bgt_is_the_gradient_of_its_squares(case):
    z = case.latents.clone().requires_grad_()
    (case.sigma**2 * (z - case.other) ** 2).sum().backward()
    torch.testing.assert_close(bgt(case.latents, case.other, case.level, weighting="sds"), z.grad)


def test_bgt_after_one_step_is_sds_times_two_sigma_over_alpha(case):
    z_t = case.level.add_noise(case.latents, case.noise)
    z_hat = case.level.clean(z_t, cfg_combine(case.prediction, SCALE))
    expected = 2 * case.sigma / case.alpha * sds(case.prediction, case.noise, case.level, SCALE, weighting="uniform")
    torch.testing.assert_close(bgt(case.latents, z_hat, case.level), expected, rtol=1e-10, atol=1e-10)


def test_bgt_image_is_the_gradient_of_its_squares(case):
    x = case.image.clone().requires_grad_()
    (0.1 * case.sigma**2 * (x - case.decoded) ** 2).sum().backward()
    torch.testing.assert_close(bgt_image(case.image, case.decoded, case.level, weighting="sds"), x.grad)
    assert not bgt_image(case.image, case.decoded, case.level, lambda_rgb=0.0).any()


def test_one_negative_is_wanted_where_the_equation_has_one(case):
    none = NoisePrediction(case.cond, case.uncond)
    for prediction, found in ((none, 0), (case.prediction, 2)):
        with pytest.raises(ValueError, match=f"negatives: found {found}, wanted exactly one negative prompt for nfsd"):
            nfsd(prediction, case.level, case.timesteps)
        with pytest.raises(ValueError, match=f"negatives: found {found}, wanted exactly one negative prompt for csd"):
            csd(prediction, case.level, negative_scale=1.0)
    assert torch.equal(csd(none, case.level), csd(case.prediction, case.level))
