"""Shading against what must come out: the white furnace, mirror and diffuse limits, a Monte-Carlo of the BRDF, gradients in float64."""

import math

import numpy as np
import pytest
import torch

from threestudio_pgc.scene.environment import EnvironmentLight, texel_directions
from threestudio_pgc.scene.mesh import linear_to_srgb, srgb_to_linear
from threestudio_pgc.scene.shading import TONE_MAPPINGS, _split_sum_table, shade, split_sum, to_display, to_linear, tone_map

WHITE_LIGHT = EnvironmentLight(torch.ones(8, 16, 3))
ANGLES_DEG = (0, 20, 45, 60, 75, 85, 89)
ROUGHNESSES = (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def picture(height=6, seed=0):
    return 3 * torch.rand(height, 2 * height, 3, generator=torch.Generator().manual_seed(seed))


def random_directions(n, seed=0, dtype=torch.float64):
    directions = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return directions / directions.norm(dim=-1, keepdim=True)


def surface(base, roughness, metallic, angles_deg):
    """Arguments of `shade` for points whose normal is up, seen at these angles."""
    angles = torch.deg2rad(torch.tensor(angles_deg, dtype=torch.float32))
    n = len(angles)
    view = torch.stack([angles.sin(), torch.zeros(n), angles.cos()], dim=-1)
    normal = torch.tensor([[0.0, 0.0, 1.0]]).expand(n, 3)
    return torch.tensor(base).expand(n, 3), torch.full((n, 1), roughness), torch.full((n, 1), metallic), normal, view


def test_no_points():
    empty, one = torch.zeros(0, 3), torch.zeros(0, 1)
    assert shade(WHITE_LIGHT, empty, one, one, empty, empty).shape == (0, 3)
    assert tone_map(empty).shape == (0, 3)


@pytest.mark.parametrize("roughness", ROUGHNESSES)
@pytest.mark.parametrize("metallic", [0.0, 0.3, 0.5, 1.0])
def test_white_furnace(roughness, metallic):
    radiance = shade(WHITE_LIGHT, *surface([1.0, 1.0, 1.0], roughness, metallic, ANGLES_DEG))
    torch.testing.assert_close(radiance, torch.ones_like(radiance), atol=0.02, rtol=0)


@pytest.mark.parametrize("roughness", ROUGHNESSES)
@pytest.mark.parametrize("metallic", [0.0, 0.5, 1.0])
def test_a_coloured_surface_takes_some_of_the_light(roughness, metallic):
    radiance = shade(WHITE_LIGHT, *surface([0.5, 0.2, 0.0], roughness, metallic, ANGLES_DEG))
    assert (radiance < 1).all() and (radiance >= 0).all()
    assert (radiance[:, 0] > radiance[:, 1]).all() and (radiance[:, 1] > radiance[:, 2]).all()


def test_a_black_dielectric_reflects_4_percent_head_on_and_all_at_grazing():
    radiance = shade(WHITE_LIGHT, *surface([0.0, 0.0, 0.0], 0.0, 0.0, (0, 89.99)))
    torch.testing.assert_close(radiance, torch.tensor([[0.04] * 3, [1.0] * 3]), atol=5e-3, rtol=0)


def test_mirror_limit():
    light = EnvironmentLight(picture(16))
    normal, view = random_directions(300, 1, torch.float32), random_directions(300, 2, torch.float32)
    view = torch.where((normal * view).sum(-1, keepdim=True) < 0, -view, view)
    mirrored = 2 * (normal * view).sum(-1, keepdim=True) * normal - view
    seen = shade(light, torch.ones(300, 3), torch.zeros(300, 1), torch.ones(300, 1), normal, view)
    torch.testing.assert_close(seen, light.radiance(mirrored), atol=1e-4, rtol=1e-4)


def test_a_coloured_mirror_head_on_has_its_colour():
    light = EnvironmentLight(picture(16))
    normal, base = random_directions(50, 1, torch.float32), torch.tensor([[0.9, 0.5, 0.1]]).expand(50, 3)
    seen = shade(light, base, torch.zeros(50, 1), torch.ones(50, 1), normal, normal)
    torch.testing.assert_close(seen, base * light.radiance(normal), atol=1e-4, rtol=1e-3)


def test_diffuse_limit():
    """Under a sky 1 + z, of irradiance / pi 1 + 2/3 n.z, what the base colour adds is base x that x what is not reflected."""
    light = EnvironmentLight((1 + texel_directions(64)[0][..., 2:]).expand(-1, -1, 3))
    normal = random_directions(200, 4, torch.float32)
    base, rough, dielectric = torch.tensor([[0.7, 0.3, 0.1]]).expand(200, 3), torch.ones(200, 1), torch.zeros(200, 1)
    black = shade(light, torch.zeros(200, 3), rough, dielectric, normal, normal)
    reflected = shade(WHITE_LIGHT, torch.zeros(1, 3), rough[:1], dielectric[:1], normal[:1], normal[:1])
    assert (reflected < 0.05).all()
    expected = base * (1 + 2 / 3 * normal[:, 2:]) * (1 - reflected)
    torch.testing.assert_close(shade(light, base, rough, dielectric, normal, normal) - black, expected, atol=3e-3, rtol=0)


def test_occlusion_multiplies_all():
    arguments = surface([0.8, 0.4, 0.2], 0.4, 0.5, ANGLES_DEG)
    light, share = EnvironmentLight(picture()), torch.linspace(0, 1, len(ANGLES_DEG))[:, None]
    torch.testing.assert_close(shade(light, *arguments, share), shade(light, *arguments) * share)


def test_a_normal_that_faces_away_is_seen_edge_on():
    radiance = shade(WHITE_LIGHT, *surface([0.5, 0.5, 0.5], 0.4, 0.0, (90, 91, 120, 180)))
    assert radiance.isfinite().all() and (radiance <= 1).all()
    torch.testing.assert_close(radiance, radiance[:1].expand_as(radiance), atol=1e-4, rtol=0)


@pytest.mark.parametrize("roughness", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n_dot_v", [0.1, 0.35, 0.7, 1.0])
def test_split_sum_is_that_of_directions_drawn_over_the_hemisphere(n_dot_v, roughness):
    """The table integrates over half vectors; here directions of light, one a cell, and the BRDF is written in full."""
    cells = torch.cartesian_prod(torch.arange(800), torch.arange(500)).double()
    within = torch.rand(len(cells), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform = (cells + within) / torch.tensor([800, 500])
    around, turn = (1 - uniform[:, 0] ** 2).sqrt(), 2 * math.pi * uniform[:, 1]
    light = torch.stack([around * turn.cos(), around * turn.sin(), uniform[:, 0]], dim=-1)
    view = torch.tensor([math.sqrt(1 - n_dot_v**2), 0, n_dot_v], dtype=torch.float64)
    half = (light + view) / (light + view).norm(dim=-1, keepdim=True)
    alpha, nl, nh, vh = roughness**2, light[:, 2], half[:, 2], half @ view

    def smith(cosine):
        return (-1 + (1 + alpha**2 * (1 / cosine**2 - 1)) ** 0.5) / 2

    distribution = alpha**2 / (math.pi * (nh**2 * (alpha**2 - 1) + 1) ** 2)
    shadowing = 1 / (1 + smith(nl) + smith(torch.tensor(n_dot_v, dtype=torch.float64)))
    share = distribution * shadowing / (4 * nl * n_dot_v) * nl * (2 * math.pi)  # BRDF x cosine / density
    fresnel = (1 - vh) ** 5
    scale, bias = split_sum(torch.tensor([[n_dot_v]]), torch.tensor([[roughness]]))
    assert scale.item() == pytest.approx((share * (1 - fresnel)).mean().item(), abs=4e-3)
    assert bias.item() == pytest.approx((share * fresnel).mean().item(), abs=4e-3)


def test_split_sum_of_a_smooth_surface_is_fresnel_s():
    n_dot_v = torch.linspace(0, 1, 50)[:, None]
    scale, bias = split_sum(n_dot_v, torch.zeros(50, 1))
    torch.testing.assert_close(bias, (1 - n_dot_v) ** 5, atol=1e-3, rtol=0)
    torch.testing.assert_close(scale + bias, torch.ones(50, 1), atol=1e-3, rtol=0)


def test_a_table_made_in_inference_mode_serves_training():
    _split_sum_table.cache_clear()
    with torch.inference_mode():
        split_sum(torch.full((3, 1), 0.5), torch.full((3, 1), 0.5))
    roughness = torch.full((3, 1), 0.5, requires_grad=True)
    split_sum(torch.full((3, 1), 0.5), roughness)[0].sum().backward()
    assert (roughness.grad < 0).all()


def points(n=6):
    """Float64 surface points away from the kinks of the tables, and a light that is not uniform."""
    generator = torch.Generator().manual_seed(5)
    base = 0.1 + 0.8 * torch.rand(n, 3, generator=generator, dtype=torch.float64)
    roughness, metallic = (0.05 + 0.9 * torch.rand(n, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    normal, view = random_directions(n, 6), random_directions(n, 7)
    view = torch.where((normal * view).sum(-1, keepdim=True) < 0, -view, view)
    return base, roughness, metallic, normal, view


def test_gradients_of_the_surface():
    light = EnvironmentLight(picture(), rotation_deg=10).double()
    *arguments, view = points()
    occlusion = torch.full((6, 1), 0.7, dtype=torch.float64)

    def seen(base, roughness, metallic, normal, occlusion):
        return shade(light, base, roughness, metallic, normal, view, occlusion)

    assert torch.autograd.gradcheck(seen, [argument.requires_grad_() for argument in (*arguments, occlusion)])


def test_gradients_of_the_light():
    light = EnvironmentLight(picture(3), trainable=True).double()
    assert torch.autograd.gradcheck(lambda _: shade(light, *points()), (light.log_radiance,))


def test_gradients_are_finite_at_the_ends_of_every_range():
    ends = torch.tensor([0.0, 1.0])
    grid = torch.cartesian_prod(ends, ends, ends).requires_grad_()
    normal = torch.tensor([[0.0, 0.0, 1.0]]).expand(8, 3).clone().requires_grad_()
    seen = shade(EnvironmentLight(picture()), grid[:, :1].expand(8, 3), grid[:, 1:2], grid[:, 2:], normal, normal.detach())
    tone_map(seen).sum().backward()
    assert grid.grad.isfinite().all() and normal.grad.isfinite().all()


def test_display_and_linear_are_the_numpy_twins_and_each_other_s_inverse():
    values = torch.linspace(0, 1, 1001, dtype=torch.float64)
    np.testing.assert_allclose(to_linear(values), srgb_to_linear(values.numpy()), atol=1e-15)
    np.testing.assert_allclose(to_display(values), linear_to_srgb(values.numpy()), atol=1e-15)
    torch.testing.assert_close(to_linear(to_display(values)), values, atol=1e-6, rtol=0)


def test_gradients_of_display_and_linear():
    values = torch.tensor([0.0, 1e-3, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    for function, slope in ((to_display, 12.92), (to_linear, 1 / 12.92)):
        assert torch.autograd.grad(function(values).sum(), values)[0][0].item() == pytest.approx(slope)
        assert torch.autograd.gradcheck(function, (values,))


def test_neutral_keeps_the_base_colours_of_a_white_light():
    base = torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.76
    torch.testing.assert_close(to_linear(tone_map(base + 0.04))[base.amin(-1) > 0.04], base[base.amin(-1) > 0.04], atol=1e-6, rtol=0)


def khronos_neutral(color):
    """The published algorithm, for one colour: https://github.com/KhronosGroup/ToneMapping"""
    x = min(color)
    offset = x - 6.25 * x * x if x < 0.08 else 0.04
    color = [channel - offset for channel in color]
    peak = max(color)
    if peak < 0.76:
        return color
    new_peak = 1 - 0.24 * 0.24 / (peak + 0.24 - 0.76)
    g = 1 - 1 / (0.15 * (peak - new_peak) + 1)
    return [channel * new_peak / peak * (1 - g) + new_peak * g for channel in color]


def test_neutral_is_the_published_one():
    colors = 4 * torch.rand(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    expected = torch.tensor([khronos_neutral(color) for color in colors.tolist()], dtype=torch.float64)
    torch.testing.assert_close(to_linear(tone_map(colors)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mapping", TONE_MAPPINGS)
def test_any_radiance_is_shown_within_the_display_s_range(mapping):
    ramp = torch.tensor([0.0, 1e-6, 0.1, 1.0, 10.0, 1e6])
    shown = tone_map(torch.cartesian_prod(ramp, ramp, ramp), mapping)
    assert (shown >= 0).all() and (shown <= 1).all()
    assert not tone_map(torch.zeros(1, 3), mapping).any()
    grey = tone_map(torch.linspace(0, 5, 200)[:, None].expand(200, 3), mapping)
    assert (grey.diff(dim=0) >= 0).all()


def test_srgb_and_none_cut_off_at_one():
    colors = torch.tensor([[0.0, 0.5, 2.0]])
    torch.testing.assert_close(tone_map(colors, "srgb"), torch.tensor([[0.0, 0.735357, 1.0]]))
    torch.testing.assert_close(tone_map(colors, "none"), torch.tensor([[0.0, 0.5, 1.0]]))


@pytest.mark.parametrize("mapping", TONE_MAPPINGS)
def test_gradients_of_tone_mapping(mapping):
    colors = torch.rand(10, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * torch.linspace(0.05, 0.95, 10)[:, None]
    if mapping == "neutral":
        colors = torch.cat([colors, 3 * colors])
    assert torch.autograd.gradcheck(lambda color: tone_map(color, mapping), (colors.requires_grad_(),))


def test_neutral_has_a_finite_gradient_at_black():
    black = torch.zeros(1, 3, requires_grad=True)
    tone_map(black).sum().backward()
    assert black.grad.isfinite().all()


def test_an_unknown_tone_mapping_is_refused():
    with pytest.raises(ValueError, match="tone mapping: found 'filmic', wanted one of neutral, srgb, none"):
        tone_map(torch.zeros(1, 3), "filmic")
