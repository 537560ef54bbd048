import pytest
import torch

from threestudio_pgc.scene.environment import EnvironmentLight
from threestudio_pgc.scene.materials import PBR_PRESETS, AlbedoMaterial, PBRMaterial, PBRRanges, pbr_ranges


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
    assert torch.autograd.gradcheck(AlbedoMaterial(), (features,))


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_a_bad_range_is_refused_by_name(low, high):
    with pytest.raises(ValueError, match="material low, high: found"):
        AlbedoMaterial(low, high)


def test_a_wrong_number_of_features_is_refused():
    with pytest.raises(ValueError, match="found 4 channels, wanted 3"):
        AlbedoMaterial()(torch.zeros(2, 4))


def generator():
    return torch.Generator().manual_seed(0)


def unit(count, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=generator(), dtype=dtype), dim=-1)


def lit(material, features, normal, radiance=None):
    light = EnvironmentLight(torch.ones(8, 16, 3) if radiance is None else radiance).to(normal.dtype)
    return material(features, light, normal, normal)


def test_a_material_of_no_points():
    empty = torch.zeros(0, 3)
    material = PBRMaterial(PBRRanges(occlusion=(0.0, 1.0), metallic=(0.0, 1.0)))
    assert {name: tuple(values.shape) for name, values in material.maps(torch.zeros(0, 9), empty).items()} == {
        **{"base_color": (0, 3), "occlusion": (0, 1), "roughness": (0, 1), "metallic": (0, 1), "normal": (0, 3)}
    }
    assert lit(material, torch.zeros(0, 9), empty).shape == (0, 3)


def test_features_of_zero_are_the_middle_of_every_range_and_the_surfaces_own_normal():
    normal = unit(5)
    maps = PBRMaterial(PBRRanges(metallic=(0.0, 0.5))).maps(torch.zeros(5, 9, dtype=torch.float64), normal)
    for name, value in {"base_color": 0.5, "roughness": 0.54, "metallic": 0.25}.items():
        torch.testing.assert_close(maps[name], torch.full_like(maps[name], value))
    torch.testing.assert_close(maps["normal"], normal)


@pytest.mark.parametrize("preset", PBR_PRESETS)
def test_maps_stay_in_the_presets_ranges_and_reach_their_ends(preset):
    material = PBRMaterial(pbr_ranges(preset))
    for sign in (-1, 1):
        maps = material.maps(torch.full((1, 9), sign * 1e4))
        assert set(maps) == {"base_color", "roughness"} | ({"metallic"} if preset == "host" else set())
        for name in maps:
            end = getattr(material.ranges, name)[sign > 0]
            torch.testing.assert_close(maps[name], torch.full_like(maps[name], end))


def test_the_shading_normal_is_unit_leans_as_far_as_allowed_and_never_inwards():
    normal, features = unit(200), 20 * torch.randn(200, 9, generator=generator(), dtype=torch.float64)
    for reach in (0.2, 1.0, 4.0):
        found = PBRMaterial(PBRRanges(normal=reach)).maps(features, normal)["normal"]
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(200, dtype=torch.float64))
        cosine = (found * normal).sum(-1)
        assert cosine.min() >= (1 + 3 * reach**2) ** -0.5 - 1e-9  # the offset is at most the diagonal of its cube
        assert cosine.min() < (1 + reach**2) ** -0.5 + 0.05


def test_no_maps_of_what_they_would_be_without_one():
    assert set(PBRMaterial().maps(torch.zeros(2, 9))) == {"base_color", "roughness"}
    held = PBRMaterial(PBRRanges(occlusion=(0.5, 0.5), metallic=(1.0, 1.0))).maps(torch.zeros(2, 9))
    assert set(held) == {"base_color", "occlusion", "roughness", "metallic"}


def test_no_normal_map_where_none_is_wanted():
    assert "normal" not in PBRMaterial(PBRRanges(normal=0.0)).maps(torch.zeros(2, 9), unit(2, torch.float32))
    assert "normal" not in PBRMaterial().maps(torch.zeros(2, 9))


def test_a_white_surface_in_white_light_is_what_it_is_told_to_be():
    """Below 0.8 the tone mapping keeps colours, so a matte base colour is shown, but for the few percent that a dielectric reflects."""
    material = PBRMaterial(PBRRanges(base_color=(0.0, 1.0), roughness=(1.0, 1.0), normal=0.0))
    features = torch.tensor([[-0.5, 0.0, 0.5, 0, 0, 0, 0, 0, 0]])
    shown = lit(material, features, unit(1, torch.float32))
    torch.testing.assert_close(shown, material.maps(features)["base_color"], atol=0.05, rtol=0)


def test_occlusion_darkens():
    material = PBRMaterial(PBRRanges(occlusion=(0.0, 1.0)))
    open_, closed = torch.zeros(1, 9), torch.zeros(1, 9)
    open_[:, 3], closed[:, 3] = 10, -10
    normal = unit(1, torch.float32)
    assert (lit(material, closed, normal) < 0.1 * lit(material, open_, normal)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_lit_in_full_precision(dtype):
    features = torch.randn(50, 9, generator=generator()).to(dtype)
    normal = unit(50, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lit(PBRMaterial(), features.requires_grad_(), normal)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, lit(PBRMaterial(), features.detach().float(), normal))
    found.sum().backward()
    assert features.grad.isfinite().all() and features.grad.any()


def test_gradient_of_a_lit_material():
    radiance = torch.rand(8, 16, 3, generator=generator(), dtype=torch.float64) + 0.2
    features = torch.randn(3, 9, generator=generator(), dtype=torch.float64).requires_grad_()
    material = PBRMaterial(PBRRanges(occlusion=(0.3, 1.0), metallic=(0.0, 0.9), roughness=(0.2, 0.9), normal=0.3))
    normal = unit(3)
    assert torch.autograd.gradcheck(lambda features: lit(material, features, normal, radiance), (features,), atol=1e-5)


def test_the_values_that_a_regulariser_compares_are_the_maps_up_to_their_low_ends():
    material, features = PBRMaterial(PBR_PRESETS["host"]), torch.randn(20, 9, generator=generator())
    values, maps = material.values(features), material.maps(features)
    torch.testing.assert_close(values[:, :3], maps["base_color"])
    torch.testing.assert_close(values[:, 4:5] + 0.08, maps["roughness"])
    torch.testing.assert_close(values[:, 5:6], maps["metallic"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"roughness": [0.5, 0.2]}, "material roughness: found"),
        ({"metallic": [0.0, 1.5]}, "material metallic: found"),
        ({"base_color": [0.5, 0.5]}, "material base_color: found"),
        ({"normal": -1.0}, "material normal: found -1.0"),
        ({"preset": "mine"}, "material ranges: found 'mine', wanted one of authors"),
    ],
)
def test_a_bad_range_of_a_map_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        pbr_ranges(**change)
