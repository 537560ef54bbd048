"""Fields start as the shape and in the colours they are given, and the report says how nearly."""

import numpy as np
import pytest
import torch
import trimesh

from threestudio_pgc.scene.fields import HashGridField
from threestudio_pgc.scene.initial import FitError, FitReport, fit_sdf, fit_texture
from threestudio_pgc.scene.materials import AlbedoMaterial
from threestudio_pgc.scene.mesh import FaceColors, TriangleMesh
from threestudio_pgc.scene.mesh_colors import surface_colors
from threestudio_pgc.scene.signed_distance import EllipsoidDistance, MeshDistance, SphereDistance, initial_distance

MATERIAL = AlbedoMaterial()
SMALL = dict(n_levels=5, log2_hashmap_size=12, base_resolution=4, max_resolution=48)


def small_field(n_output=4, **overrides) -> HashGridField:
    torch.manual_seed(0)
    return HashGridField.from_preset("pocket", n_output=n_output, **{**SMALL, **overrides})


def fit(field, distance, **options) -> FitReport:
    return fit_sdf(field, distance, **{"steps": 200, "points_per_step": 2048, "seed": 1, "progress": False, **options})


def half_dyed_ball(first, second) -> TriangleMesh:
    """A ball of radius 0.5 whose half with x > 0 has the first colour."""
    part = trimesh.creation.icosphere(3, 0.5)
    right = part.triangles_center[:, 0] > 0
    corners = np.where(right[:, None, None], np.float32(first), np.float32(second)) * np.ones((1, 3, 1), np.float32)
    nothing = np.full(len(right), -1, np.int32), np.zeros((len(right), 3, 2), np.float32)
    vertices, faces = torch.from_numpy(np.array(part.vertices)).float(), torch.from_numpy(np.array(part.faces))
    return TriangleMesh(vertices, faces, face_colors=FaceColors(corners, [], *nothing))


# --------------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("options", [{"steps": 0}, {"points_per_step": 0}, {"lr": 0.0}, {"bound": -1.0}])
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=rf"fit {next(iter(options))}: found .*, wanted"):
        fit(small_field(), SphereDistance(), **options)


def test_a_field_of_other_width_is_refused():
    with pytest.raises(ValueError, match=r"fit result: found .*\(1, 3\).*, wanted \(1, 4\): a distance and a deformation"):
        fit(small_field(n_output=3), SphereDistance())


# ---------------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "distance",
    [SphereDistance(0.5), EllipsoidDistance([0.3, 0.4, 0.7]), MeshDistance(half_dyed_ball((1, 0, 0), (0, 0, 1)))],
    ids=["sphere", "ellipsoid", "mesh"],
)
def test_a_field_takes_the_shape(distance):
    report = fit(small_field(), distance)
    assert report.near.mean < 0.005 and report.near.max < 0.06 and report.near.wrong_sign < 0.06
    assert report.cube.mean < 0.015 and report.cube.max < 0.25 and report.cube.wrong_sign < 0.005


def test_a_bundled_mesh_in_the_pocket_presets_field():
    torch.manual_seed(0)
    field = HashGridField.from_preset("pocket", n_output=4)
    report = fit(field, initial_distance("mesh:builtin:bunny"), steps=150)
    assert report.near.mean < 0.008 and report.near.wrong_sign < 0.08 and report.cube.mean < 0.02
    assert (report.steps, report.seconds > 0) == (150, True)


def test_the_deformation_goes_to_zero():
    field, points = small_field(), torch.rand(2000, 3) * 2 - 1
    with torch.no_grad():
        field.mlp[-1].bias[1:] = torch.tensor([1.0, -2.0, 3.0])
    fit(field, SphereDistance())
    assert field(points)[:, 1:].square().mean().sqrt() < 0.1


def test_the_report_is_of_the_field_as_it_is_left():
    """Against errors measured here, on points of this test's own."""
    field, distance = small_field(), SphereDistance(0.5)
    report = fit(field, distance, steps=30)
    points = torch.rand(50_000, 3, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        found, expected = field(points)[:, 0], distance(points)
    near = expected.abs() < 0.05
    for where, told in ((near, report.near), (torch.ones_like(near), report.cube)):
        error = (found - expected)[where].abs()
        assert told.mean == pytest.approx(error.mean().item(), rel=0.15)
        assert told.wrong_sign == pytest.approx(((found < 0) != (expected < 0))[where].float().mean().item(), rel=0.3, abs=1e-3)
        assert told.mean < told.max < 3 * error.max()


def test_more_steps_fit_better():
    few, many = (fit(small_field(), SphereDistance(), steps=steps) for steps in (20, 200))
    assert many.near.mean < few.near.mean / 2 and many.cube.mean < few.cube.mean / 2


def test_a_larger_cube_is_filled_as_well():
    field = small_field(bound=2.0)
    report = fit(field, SphereDistance(0.5), bound=2.0)
    corner = torch.tensor([[1.9, -1.9, 1.9]])
    assert field(corner)[0, 0].item() == pytest.approx(SphereDistance(0.5)(corner).item(), abs=0.2)
    assert report.cube.mean < 0.03


def test_the_same_seed_fits_the_same_and_global_randomness_is_left_alone():
    state = torch.random.get_rng_state()
    fields = [small_field() for _ in range(3)]
    torch.random.set_rng_state(state)
    for field, seed in zip(fields, (1, 1, 2)):
        fit(field, SphereDistance(), steps=10, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = ([parameter.detach() for parameter in field.parameters()] for field in fields)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_nothing_of_the_optimiser_stays_and_it_works_where_gradients_are_off():
    field = small_field()
    before = field.encoding.table.clone()
    with torch.no_grad():
        fit(field, SphereDistance(), steps=5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in field.parameters())
    assert not torch.equal(field.encoding.table, before)


def test_a_bar_is_shown_if_asked_for(capsys):
    fit(small_field(), SphereDistance(), steps=5, progress=True)
    assert "Fitting the shape: 100%" in capsys.readouterr().err
    fit(small_field(), SphereDistance(), steps=5, progress=False)
    assert capsys.readouterr().err == ""


def test_a_report_reads_as_one_line():
    report = FitReport(FitError(0.00101, 0.0137, 0.0119), FitError(0.003, 0.0435, 0.0005), 500, 2.34)
    assert str(report) == (
        "distance fitted in 500 steps, 2.3 s; error within 0.05 of the surface: mean 0.0010, max 0.0137, wrong sign 1.19 %; "
        "in the whole cube: mean 0.0030, max 0.0435, wrong sign 0.05 %"
    )


# -------------------------------------------------------------------------------------------------------------------- textures


def dye(field, mesh, to_color=MATERIAL, **options) -> float:
    return fit_texture(
        field, to_color, surface_colors(mesh), **{"steps": 100, "points_per_step": 2048, "seed": 1, "progress": False, **options}
    )


@pytest.mark.parametrize("options", [{"steps": 0}, {"points_per_step": 0}, {"lr": -1.0}])
def test_options_of_a_texture_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=rf"fit {next(iter(options))}: found .*, wanted"):
        dye(small_field(3), half_dyed_ball((1, 0, 0), (0, 0, 1)), **options)


def test_a_texture_takes_the_colours_of_the_mesh_on_its_surface_and_beside_it():
    field = small_field(3)
    error = dye(field, half_dyed_ball((0.8, 0.3, 0.4), (0.2, 0.6, 0.1)))
    points = torch.nn.functional.normalize(torch.randn(2000, 3, generator=torch.Generator().manual_seed(2)), dim=1)
    points = points[points[:, 0].abs() > 0.1]
    expected = torch.where(points[:, :1] > 0, torch.tensor([0.8, 0.3, 0.4]), torch.tensor([0.2, 0.6, 0.1]))
    for radius in (0.49, 0.5, 0.51):
        assert (MATERIAL(field(points * radius)) - expected).abs().mean() < 0.03
    assert 0 < error < 0.08  # most of it at the seam


def test_colours_outside_of_the_materials_range_become_its_nearest():
    material = AlbedoMaterial(low=0.3, high=0.7)
    field = small_field(3)
    error = dye(field, half_dyed_ball((0, 0.5, 1), (0, 0.5, 1)), material)
    colors = material(field(torch.tensor([[0.5, 0, 0], [0, -0.5, 0]])))
    torch.testing.assert_close(colors, torch.tensor([[0.3, 0.5, 0.7]] * 2), rtol=0, atol=0.03)
    assert error < 0.03
    assert field(torch.tensor([[0.5, 0, 0]])).abs().max() < 8  # the sigmoid still has a slope
