"""The light from far away: directions by hand, the lobes' means against a plain loop over all texels and closed forms, gradients."""

import math

import pytest
import torch

from threestudio_pgc.scene.environment import (
    ROUGHNESS_LEVELS,
    EnvironmentLight,
    cosine_weight,
    direction_of,
    ggx_weight,
    texel_directions,
    uv_of,
)

FRONT, RIGHT, BACK, UP, DOWN = (1.0, 0, 0), (0, 1.0, 0), (-1.0, 0, 0), (0, 0, 1.0), (0, 0, -1.0)


def rows(*directions, dtype=torch.float32):
    return torch.tensor(directions, dtype=dtype)


def random_directions(n, seed=0, dtype=torch.float64):
    directions = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return directions / directions.norm(dim=-1, keepdim=True)


def random_picture(height, seed=0):
    return 3 * torch.rand(height, 2 * height, 3, generator=torch.Generator().manual_seed(seed))


def lamp(height, azimuth_deg, elevation_deg, width_deg=12.0):
    """A round blob of light (H, 2H, 3)."""
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    x, y = math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth)
    cosine = texel_directions(height)[0] @ torch.tensor([x, y, math.sin(elevation)])
    return torch.exp((cosine - 1) / math.radians(width_deg) ** 2)[..., None].expand(-1, -1, 3).contiguous()


def loop_mean(picture, weight, direction):
    """The mean of a picture (H, 2H, 3) over a lobe around a direction (3,): one texel after the other."""
    directions, solid_angles = texel_directions(picture.shape[0], torch.float64)
    total, weights = torch.zeros(3, dtype=torch.float64), 0.0
    for row in range(picture.shape[0]):
        for column in range(picture.shape[1]):
            cosine = directions[row, column] @ direction
            share = weight(cosine) * solid_angles[row, column, 0]
            total += share * picture[row, column]
            weights += share
    return total / weights


def test_no_directions():
    light = EnvironmentLight(random_picture(4))
    assert light.diffuse(torch.zeros(0, 3)).shape == (0, 3)
    assert light.radiance(torch.zeros(0, 3)).shape == (0, 3)
    assert light.specular(torch.zeros(0, 3), torch.zeros(0, 1)).shape == (0, 3)


def test_places_in_the_picture_by_hand():
    u, v = uv_of(rows(FRONT, RIGHT, BACK, (0, -1, 0), UP, DOWN, (0, 2, 2)))
    torch.testing.assert_close(u, torch.tensor([0.5, 0.25, 0.0, 0.75, 0.5, 0.5, 0.25]))
    torch.testing.assert_close(v, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.25]), atol=1e-6, rtol=0)


def test_a_place_leads_back_to_its_direction():
    directions = random_directions(500)
    torch.testing.assert_close(direction_of(*uv_of(directions)), directions)


def test_the_texels_cover_the_sphere():
    directions, solid_angles = texel_directions(7, torch.float64)
    assert solid_angles.sum().item() == pytest.approx(4 * math.pi, abs=1e-12)
    torch.testing.assert_close((directions * solid_angles).sum((0, 1)), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (directions[0, :, 2] > 0.9).all() and (directions[3, 6:8, 0] > 0.9).all() and (directions[:, 2:4, 1] > 0).all()


def test_a_texel_s_centre_shows_the_texel():
    picture = random_picture(8)
    seen = EnvironmentLight(picture).radiance(texel_directions(8)[0].reshape(-1, 3))
    torch.testing.assert_close(seen.view(8, 16, 3), picture, atol=1e-5, rtol=0)


def test_between_two_texels_is_their_mean_and_the_seam_is_no_exception():
    picture = random_picture(8)
    light = EnvironmentLight(picture)
    v = torch.tensor([2.5 / 8, 2.5 / 8])
    seen = light.radiance(direction_of(torch.tensor([5 / 16, 0.0]), v))
    expected = torch.stack([picture[2, 4:6].mean(0), (picture[2, 15] + picture[2, 0]) / 2])
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


def test_a_pole_has_a_single_colour():
    picture = random_picture(8)
    around = torch.arange(0, 360.0, 7).deg2rad()
    for height, row in ((1.0, 0), (-1.0, -1)):
        near = torch.stack([1e-4 * around.cos(), 1e-4 * around.sin(), torch.full_like(around, height)], dim=-1)
        seen = EnvironmentLight(picture).radiance(near)
        torch.testing.assert_close(seen, picture[row].mean(0).expand_as(seen), atol=0.01, rtol=0)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_uniform_light_is_uniform(trainable):
    light = EnvironmentLight(torch.tensor([0.25, 1.0, 3.0]).expand(13, 26, 3), trainable=trainable)
    directions = random_directions(200, dtype=torch.float32)
    for roughness in (0.0, 0.05, 0.37, 1.0):
        seen = light.specular(directions, torch.full((200, 1), roughness))
        torch.testing.assert_close(seen, torch.tensor([[0.25, 1.0, 3.0]]).expand(200, 3), atol=0, rtol=1e-5)
    torch.testing.assert_close(light.diffuse(directions), torch.tensor([[0.25, 1.0, 3.0]]).expand(200, 3), atol=0, rtol=1e-5)


@pytest.mark.parametrize("height", [5, 8])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_levels_are_the_means_of_a_plain_loop(height, trainable):
    picture = random_picture(height)
    levels = EnvironmentLight(picture, trainable=trainable).levels()
    directions = texel_directions(height, torch.float64)[0]
    weights = [lambda cosine, alpha=roughness**2: ggx_weight(cosine, alpha) for roughness in ROUGHNESS_LEVELS[1:]] + [cosine_weight]
    assert levels.shape == (len(ROUGHNESS_LEVELS) + 1, height + 2, 2 * height, 3)
    torch.testing.assert_close(levels[0, 1:-1], picture, atol=1e-3 if trainable else 0, rtol=0)
    for level, weight in enumerate(weights, start=1):
        for row, column in ((0, 3), (2, 0), (height // 2, 2 * height - 1), (height - 1, 5)):
            expected = loop_mean(picture, weight, directions[row, column]).float()
            torch.testing.assert_close(levels[level, 1 + row, column], expected, atol=1e-3 if trainable else 1e-6, rtol=0)


def test_a_lobe_is_that_of_ggx_with_n_v_and_r_alike():
    n = v = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    alpha = 0.3
    for light in random_directions(20):
        half = (light + v) / (light + v).norm()
        distribution = alpha**2 / (math.pi * ((n @ half) ** 2 * (alpha**2 - 1) + 1) ** 2)
        expected = distribution * (n @ light).clamp(min=0)
        torch.testing.assert_close(ggx_weight(n @ light, alpha) * alpha**2 / math.pi, expected)


def test_between_two_levels_the_lobe_is_nearly_that_of_its_roughness():
    light = EnvironmentLight(lamp(64, 30, 40))
    directions = random_directions(40, dtype=torch.float32)
    texels, solid_angles = texel_directions(64)
    for roughness in (0.25, 0.37, 0.52, 0.7, 0.9):
        weights = ggx_weight(torch.einsum("nc,hwc->nhw", directions, texels), roughness**2)[..., None] * solid_angles
        expected = (weights * lamp(64, 30, 40)).sum((1, 2)) / weights.sum((1, 2))
        torch.testing.assert_close(light.specular(directions, torch.full((40, 1), roughness)), expected, atol=0.02, rtol=0)


def test_the_irradiance_of_a_sky_linear_in_height():
    z = texel_directions(64)[0][..., 2:]
    light = EnvironmentLight((1 + z).expand(-1, -1, 3))
    normals = random_directions(100, dtype=torch.float32)
    torch.testing.assert_close(light.diffuse(normals), (1 + 2 / 3 * normals[:, 2:]).expand(-1, 3), atol=2e-3, rtol=0)


def test_the_irradiance_of_a_hemisphere():
    light = EnvironmentLight((texel_directions(64)[0][..., 2:] > 0).float().expand(-1, -1, 3))
    normals = random_directions(100, dtype=torch.float32)
    torch.testing.assert_close(light.diffuse(normals), ((1 + normals[:, 2:]) / 2).expand(-1, 3), atol=2e-3, rtol=0)


def test_a_coarse_trainable_light_has_nearly_that_irradiance():
    z = texel_directions(64)[0][..., 2:]
    light = EnvironmentLight((1 + z).expand(-1, -1, 3), trainable=True)
    assert light.log_radiance.shape == (16, 32, 3)
    normals = random_directions(100, dtype=torch.float32)
    torch.testing.assert_close(light.diffuse(normals), (1 + 2 / 3 * normals[:, 2:]).expand(-1, 3), atol=0.02, rtol=0)


def test_rough_surfaces_see_a_wider_lamp():
    light = EnvironmentLight(lamp(32, 0, 0))
    ahead = torch.cat([light.specular(rows(FRONT), torch.tensor([[roughness]])) for roughness in (0.0, 0.1, 0.15, 0.3, 0.5, 1.0)])[:, 0]
    aside = torch.cat([light.specular(rows(RIGHT), torch.tensor([[roughness]])) for roughness in (0.0, 0.3, 0.6, 1.0)])[:, 0]
    assert (ahead.diff() < 0).all() and (aside.diff() > 0).all()


def test_roughness_outside_of_its_range_is_clamped():
    light = EnvironmentLight(random_picture(8))
    directions = random_directions(4, dtype=torch.float32)
    outside = light.specular(directions, torch.tensor([[-1.0], [0.0], [1.0], [7.0]]))
    assert torch.equal(outside[:2], light.radiance(directions[:2]))
    assert torch.equal(outside[2:], light.specular(directions[2:], torch.ones(2, 1)))


@pytest.mark.parametrize("turn, direction", [(0, FRONT), (90, RIGHT), (180, BACK), (-90, (0, -1.0, 0)), (450, RIGHT)])
def test_a_turned_light_carries_its_lamp_counter_clockwise(turn, direction):
    light = EnvironmentLight(lamp(32, 0, 0), rotation_deg=turn)
    seen = light.radiance(rows(FRONT, RIGHT, BACK, (0, -1.0, 0)))[:, 0]
    assert seen.argmax() == [FRONT, RIGHT, BACK, (0, -1.0, 0)].index(direction)
    torch.testing.assert_close(light.diffuse(rows(direction)), EnvironmentLight(lamp(32, 0, 0)).diffuse(rows(FRONT)))


def test_a_lamp_above_stays_above_and_turns_by_any_angle():
    light, there = EnvironmentLight(lamp(64, 25, 50), rotation_deg=33.3), EnvironmentLight(lamp(64, 58.3, 50))
    directions = random_directions(200, dtype=torch.float32)
    torch.testing.assert_close(light.radiance(directions), there.radiance(directions), atol=0.02, rtol=0)


def test_intensity_scales_all():
    picture, directions = random_picture(8), random_directions(50, dtype=torch.float32)
    roughness = torch.linspace(0, 1, 50)[:, None]
    dim, bright = EnvironmentLight(picture), EnvironmentLight(picture, intensity=2.5)
    torch.testing.assert_close(bright.diffuse(directions), 2.5 * dim.diffuse(directions))
    torch.testing.assert_close(bright.radiance(directions), 2.5 * dim.radiance(directions))
    torch.testing.assert_close(bright.specular(directions, roughness), 2.5 * dim.specular(directions, roughness))
    torch.testing.assert_close(bright.color_deviation(), 2.5 * dim.color_deviation())


def test_a_high_picture_is_averaged_and_a_low_one_kept():
    picture = random_picture(12)
    coarse = EnvironmentLight(picture, resolution=4).levels()[0, 1:-1]
    torch.testing.assert_close(coarse, picture.view(4, 3, 8, 3, 3).mean(dim=(1, 3)))
    assert EnvironmentLight(picture, resolution=100).levels().shape[1] == 14


def test_color_deviation_is_zero_for_white_and_by_hand_else():
    assert EnvironmentLight(random_picture(8)[..., :1].expand(-1, -1, 3)).color_deviation() < 1e-6
    picture = torch.ones(8, 16, 3)
    picture[:4] = torch.tensor([3.0, 0.0, 0.0])  # the upper half: |2|, |-1|, |-1|
    assert EnvironmentLight(picture).color_deviation().item() == pytest.approx(0.5 * 4 / 3)


def test_one_bright_texel_leaves_no_ripple_in_the_dark():
    picture = torch.full((64, 128, 3), 1e-3)
    picture[16, 40] = 1e5
    light = EnvironmentLight(picture)
    away = -texel_directions(64)[0][16, 40][None]
    torch.testing.assert_close(light.diffuse(away), torch.full((1, 3), 1e-3), rtol=1e-3, atol=0)
    assert (light.levels() >= 0).all()


def test_gradients_of_directions_and_roughness():
    light = EnvironmentLight(random_picture(6)).double()
    directions = random_directions(12, seed=3).requires_grad_()
    roughness = torch.linspace(0.03, 0.97, 12, dtype=torch.float64)[:, None].requires_grad_()
    assert torch.autograd.gradcheck(light.specular, (directions, roughness))
    assert torch.autograd.gradcheck(light.diffuse, (directions,))
    assert torch.autograd.gradcheck(light.radiance, (directions,))


def test_gradients_are_finite_at_the_poles_and_of_no_direction():
    light = EnvironmentLight(random_picture(6))
    near = [(1e-7, 0, 1.0), (1e-5, -1e-5, -1.0), (1e-3, 0, 1.0), (0, 0, 0), BACK]
    directions = rows(UP, DOWN, *near).requires_grad_()
    light.specular(directions, torch.full((len(directions), 1), 0.05)).sum().backward()
    assert directions.grad.isfinite().all()
    slopes = directions.grad[[0, 1, 2, 3, 4]].norm(dim=-1)
    assert (slopes < 100).all(), "a pole is no steeper than other places: a texel is half a radian, its colours are up to 3 apart"


def test_directions_that_are_nan_do_no_harm():
    seen = EnvironmentLight(random_picture(4)).specular(torch.full((2, 3), float("nan")), torch.full((2, 1), float("nan")))
    assert seen.isfinite().all()


def test_gradients_of_a_trainable_light():
    light = EnvironmentLight(random_picture(3), trainable=True, rotation_deg=20).double()
    directions = random_directions(5, seed=1)
    roughness = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)[:, None]

    def results(_):  # of the parameter, which gradcheck moves in place
        return light.specular(directions, roughness), light.diffuse(directions), light.radiance(directions), light.color_deviation()

    assert torch.autograd.gradcheck(results, (light.log_radiance,))


def test_a_trainable_light_learns_where_a_lamp_stands():
    normals = random_directions(300, dtype=torch.float32)
    target = EnvironmentLight(lamp(16, 60, 30, 30)).specular(normals, torch.full((300, 1), 0.3)).detach()
    light = EnvironmentLight(torch.full((16, 32, 3), 0.2), trainable=True)
    optimizer = torch.optim.Adam(light.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (light.specular(normals, torch.full((300, 1), 0.3)) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    brightest = light.log_radiance.detach().sum(-1).argmax()
    found = texel_directions(16)[0].reshape(-1, 3)[brightest]
    assert found @ rows((math.cos(1.0472) * 0.866, math.sin(1.0472) * 0.866, 0.5))[0] > math.cos(math.radians(20))


def test_only_a_trainable_light_has_a_state_and_it_comes_back():
    assert not EnvironmentLight(random_picture(4)).state_dict()
    light, other = EnvironmentLight(random_picture(4), trainable=True), EnvironmentLight(random_picture(4, 1), trainable=True)
    assert list(light.state_dict()) == ["log_radiance"]
    other.load_state_dict(light.state_dict())
    assert torch.equal(other.diffuse(rows(UP)), light.diffuse(rows(UP)))


@pytest.mark.parametrize("trainable", [False, True])
def test_autocast_changes_nothing(trainable):
    light = EnvironmentLight(random_picture(6), trainable=trainable)
    directions, roughness = random_directions(30, dtype=torch.float32), torch.linspace(0, 1, 30)[:, None]
    plain = light.specular(directions, roughness), light.diffuse(directions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(light.specular(directions, roughness), plain[0])
        assert torch.equal(light.diffuse(directions), plain[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"radiance": torch.ones(0, 0, 3)}, r"light radiance: found \(0, 0, 3\), wanted \(H, 2H, 3\)"),
        ({"radiance": torch.ones(4, 4, 3)}, r"light radiance: found \(4, 4, 3\)"),
        ({"radiance": torch.ones(4, 8)}, r"light radiance: found \(4, 8\)"),
        ({"radiance": torch.full((4, 8, 3), float("nan"))}, "light radiance: found 96 values that are NaN"),
        ({"radiance": torch.full((4, 8, 3), -1.0)}, "light radiance: found 96 values .* negative"),
        ({"intensity": -1.0}, "light intensity: found -1.0, wanted"),
        ({"intensity": float("nan")}, "light intensity: found nan"),
        ({"rotation_deg": float("inf")}, "light rotation_deg: found inf"),
        ({"resolution": 1}, "light resolution: found 1, wanted 2 to 256"),
        ({"resolution": 1024}, "light resolution: found 1024"),
    ],
)
def test_a_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        EnvironmentLight(**({"radiance": torch.ones(4, 8, 3)} | arguments))
