"""Every rule against its equation, written out literally in float64, and against the inputs that break naive versions."""

import math

import pytest
import torch

from threestudio_pgc.pixelgrad import RULES, clip_global, clip_norm, clip_value, none, normalize, pixel_norm, view_rms

PIXEL_RULES = [clip_norm, clip_value, normalize, none]
ALL_RULES = list(RULES.values())
NORMS = ["l2", "linf"]


def length(vector, norm):
    return math.sqrt(sum(v * v for v in vector)) if norm == "l2" else max(abs(v) for v in vector)


def twin(rule, vector, c, norm):
    """The paper's equations for one pixel, on plain Python floats (float64)."""
    size = length(vector, norm)
    if rule is clip_norm:  # eq. 10
        return [min(size, c) * v / size if size else 0.0 for v in vector]
    if rule is clip_value:  # section 4.4
        return [min(max(v, -c), c) for v in vector]
    if rule is normalize:  # eq. 9
        return [c / (size + c) * v for v in vector]
    return list(vector)


def random_gradient(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(*shape, generator=generator, dtype=dtype)
    return direction * torch.exp(2 * torch.randn(*shape[:-1], 1, generator=generator, dtype=dtype))


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("norm", NORMS)
def test_empty_and_zero_gradients_pass_through(rule, norm):
    assert rule(torch.zeros(0, 4, 4, 3), 0.1, norm=norm).shape == (0, 4, 4, 3)
    assert torch.equal(rule(torch.zeros(2, 4, 4, 3), 0.1, norm=norm), torch.zeros(2, 4, 4, 3))


@pytest.mark.parametrize("rule", PIXEL_RULES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("c", [0.01, 0.1, 1.0])
def test_rule_equals_its_equation(rule, norm, c):
    gradient = random_gradient(2, 5, 6, 3)
    expected = torch.tensor([twin(rule, p.tolist(), c, norm) for p in gradient.reshape(-1, 3)], dtype=torch.float64)
    torch.testing.assert_close(rule(gradient, c, norm=norm).reshape(-1, 3), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rule", [clip_norm, normalize])
@pytest.mark.parametrize("norm", NORMS)
def test_direction_is_kept_and_length_never_grows(rule, norm):
    gradient = random_gradient(4, 8, 8, 3, dtype=torch.float32)
    ruled = rule(gradient, 0.1, norm=norm)
    cosine = torch.nn.functional.cosine_similarity(gradient.double(), ruled.double(), dim=-1)
    assert (cosine - 1).abs().max() < 1e-6
    assert (pixel_norm(ruled, norm=norm) <= torch.minimum(pixel_norm(gradient, norm=norm), torch.tensor(0.1)) * (1 + 1e-6)).all()


def test_clip_value_turns_the_direction_which_is_its_flaw():
    pixel = torch.tensor([[[[0.4, 0.1, 0.0]]]])
    torch.testing.assert_close(clip_value(pixel, 0.1), torch.tensor([[[[0.1, 0.1, 0.0]]]]))


@pytest.mark.parametrize("norm", NORMS)
def test_clip_norm_leaves_everything_alone_above_the_largest_norm(norm):
    gradient = random_gradient(2, 4, 4, 3)
    assert torch.equal(clip_norm(gradient, gradient.abs().max().item() * 2, norm=norm), gradient)


@pytest.mark.parametrize("rule", [clip_norm, clip_value, none, clip_global, view_rms])
def test_idempotent_rules_are(rule):
    gradient = random_gradient(2, 4, 4, 3)
    once = rule(gradient, 0.1)
    torch.testing.assert_close(rule(once, 0.1), once, rtol=1e-13, atol=0)


def test_pngd_gain():
    gradient = random_gradient(1, 4, 4, 3)
    gain = pixel_norm(normalize(gradient, 0.1)) / pixel_norm(gradient)
    torch.testing.assert_close(gain, 0.1 / (pixel_norm(gradient) + 0.1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_pixels_become_zero_and_neighbours_stay(rule, norm, poison):
    gradient = random_gradient(1, 4, 4, 3, dtype=torch.float32)
    clean = gradient.clone()
    clean[0, 1, 2] = 0
    gradient[0, 1, 2, 1] = poison
    assert torch.equal(rule(gradient, 0.1, norm=norm), rule(clean, 0.1, norm=norm))


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30, 1e-42])
def test_extreme_magnitudes_stay_finite(rule, norm, size):
    gradient = torch.tensor([[[[1.0, -1.0, 0.5], [0.2, 0.0, 0.0]]]]) * size
    ruled = rule(gradient, 0.1, norm=norm)
    assert torch.isfinite(ruled).all()
    if rule is clip_norm and size > 1:
        expected = torch.tensor([1.0, -1.0, 0.5]) / (1.5 if norm == "l2" else 1.0) * 0.1
        torch.testing.assert_close(ruled[0, 0, 0], expected)


def test_the_colour_axis_can_be_anywhere():
    gradient = random_gradient(2, 4, 5, 3)
    for rule in PIXEL_RULES:
        assert torch.equal(rule(gradient.movedim(-1, 1), 0.1, dim=1).movedim(1, -1), rule(gradient, 0.1))


def test_view_rms_gives_every_view_the_same_rms_and_clips_nothing():
    gradient = random_gradient(3, 8, 8, 3) * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64).view(3, 1, 1, 1)
    ruled = view_rms(gradient, 0.1)
    torch.testing.assert_close(pixel_norm(ruled).square().mean(dim=(1, 2)).sqrt(), torch.full((3,), 0.1, dtype=torch.float64))
    ratio = ruled / gradient
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))


@pytest.mark.parametrize("norm", NORMS)
def test_global_clip_is_the_textbook_one_per_view(norm):
    """Twin: torch's own clip_grad_norm_ on each view's pixel norms, with its maximum at c sqrt(pixels)."""
    gradient = random_gradient(3, 5, 6, 3) * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).view(3, 1, 1, 1)
    ruled = clip_global(gradient, 0.1, norm=norm)
    for view, found in zip(gradient, ruled):
        norms = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
        norms.grad = pixel_norm(view, norm=norm).flatten().clone()
        torch.nn.utils.clip_grad_norm_([norms], 0.1 * 30**0.5)
        torch.testing.assert_close(pixel_norm(found, norm=norm).flatten(), norms.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm
    assert torch.equal(ruled[0], gradient[0]), "a view below the threshold is left alone"


def test_one_outlier_costs_a_global_clip_everything_and_a_pixel_clip_nothing():
    gradient = random_gradient(1, 16, 16, 3) * 0.01
    spoilt = gradient.clone()
    spoilt[0, 3, 4] = 1e6
    rest = torch.ones(16, 16, dtype=torch.bool)
    rest[3, 4] = False
    assert torch.equal(clip_norm(spoilt, 0.1)[0, rest], clip_norm(gradient, 0.1)[0, rest])
    kept = pixel_norm(clip_global(spoilt, 0.1))[0, rest] / pixel_norm(gradient)[0, rest]
    assert kept.max() < 1e-5


@pytest.mark.parametrize("rule", [clip_norm, clip_value, normalize, view_rms, clip_global])
@pytest.mark.parametrize("threshold", [0, -0.1, float("nan")])
def test_a_threshold_that_is_not_positive_is_refused(rule, threshold):
    with pytest.raises(ValueError, match="pgc.threshold"):
        rule(torch.ones(1, 1, 1, 3), threshold)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="pgc.norm.*'l1'"):
        clip_norm(torch.ones(1, 1, 1, 3), 0.1, norm="l1")
