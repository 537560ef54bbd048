import dataclasses

import pytest
import torch

from threestudio_pgc.scene.fields import (
    FIELD_PRESETS,
    FieldConfig,
    HashGridEncoding,
    HashGridField,
    evaluate_in_chunks,
    field_config,
)

# Two dense levels (4 and 7 nodes per axis) and two hashed ones.
SMALL = dict(n_levels=4, log2_hashmap_size=10, base_resolution=4, max_resolution=20)


def random_encoding(backend, features=2, dtype=torch.float32, **overrides):
    encoding = HashGridEncoding(n_features_per_level=features, backend=backend, **{**SMALL, **overrides})
    encoding = encoding.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        encoding.table.copy_(torch.randn(encoding.table.shape, generator=generator, dtype=dtype))
    return encoding


def random_points(count, dtype=torch.float32, reach=1.2):
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(count, 3, generator=generator, dtype=dtype) * 2 - 1) * reach


def table_gradient(encoding, features, weights):
    return torch.autograd.grad((features * weights).sum(), encoding.table)[0]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_no_points(backend):
    field = HashGridField(FieldConfig(backend=backend, **SMALL))
    features = field(torch.zeros(0, 3))
    assert features.shape == (0, 3)
    features.sum().backward()
    assert torch.equal(field.encoding.table.grad, torch.zeros_like(field.encoding.table))


@pytest.mark.parametrize("features", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_kernel_equals_its_torch_twin(features, dtype):
    encoding = random_encoding("numba", features, dtype)
    points = random_points(3000, dtype)
    fused, plain = encoding(points), encoding.forward_torch(points)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, fused.numel(), dtype=dtype).view_as(fused)
    gradients = table_gradient(encoding, fused, weights), table_gradient(encoding, plain, weights)
    # Only the order of summation differs, so the error is relative to the largest sums, not to each of them.
    tolerance = (1e-5 if dtype == torch.float32 else 1e-14) * gradients[1].abs().max().item()
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance)


def test_fused_kernel_equals_its_torch_twin_at_the_finest_reference_level():
    """A lattice of 4096 nodes leaves few bits for the position in a cell: both must round the coordinate alike."""
    encoding = random_encoding("numba", **{**SMALL, "max_resolution": 4096})
    points = random_points(3000)
    torch.testing.assert_close(encoding(points), encoding.forward_torch(points), rtol=1e-6, atol=1e-6)


def test_gradcheck_of_the_twin_in_points_and_table():
    encoding = random_encoding("torch", dtype=torch.float64, n_levels=2, log2_hashmap_size=6, max_resolution=9)
    points = random_points(12, torch.float64, reach=0.9).requires_grad_()

    def features(points, table):
        return torch.func.functional_call(encoding, {"table": table}, (points,))

    assert torch.autograd.gradcheck(features, (points, encoding.table))


def test_gradcheck_of_the_fused_kernel_in_the_table():
    encoding = random_encoding("numba", dtype=torch.float64, n_levels=2, log2_hashmap_size=6, max_resolution=9)
    points = random_points(12, torch.float64)
    assert torch.autograd.gradcheck(lambda table: torch.func.functional_call(encoding, {"table": table}, (points,)), (encoding.table,))


def test_the_fused_kernels_gradient_in_the_points_is_its_twins():
    encoding = random_encoding("numba", dtype=torch.float64)
    points = torch.cat([random_points(400, torch.float64, reach=1.2), torch.tensor([[float("nan"), 0.1, 0.2], [1.0, -1.0, 0.3]])])
    weights = torch.randn(len(points), encoding.n_output, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (encoding, encoding.forward_torch):
        leaf = points.clone().requires_grad_()
        (function(leaf) * weights).sum().backward()
        found.append(leaf.grad)
    assert torch.isfinite(found[0]).all() and (found[0] != 0).any()
    assert (found[0][points.abs() > 1] == 0).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_gradcheck_of_the_fused_kernel_in_points_and_table():
    encoding = random_encoding("numba", dtype=torch.float64, n_levels=2, log2_hashmap_size=6, max_resolution=9)
    points = random_points(12, torch.float64, reach=0.9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda points, table: torch.func.functional_call(encoding, {"table": table}, (points,)), (points, encoding.table)
    )


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_interpolation_is_exact_at_the_nodes_of_a_dense_level(backend):
    encoding = random_encoding(backend, dtype=torch.float64, n_levels=1, base_resolution=5, max_resolution=5)
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, 5, dtype=torch.float64)] * 3, indexing="ij")
    nodes = torch.stack([x, y, z], -1).reshape(-1, 3)  # x fastest, as the table is laid out
    torch.testing.assert_close(encoding(nodes), encoding.table.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_interpolation_is_continuous_across_cells(backend):
    encoding = random_encoding(backend, dtype=torch.float64)
    line = torch.linspace(-1.1, 1.1, 20001, dtype=torch.float64)
    points = torch.stack([line, 0.3 * line + 0.1, -0.7 * line], -1)
    jumps = encoding(points).detach().diff(dim=0).abs().max()
    # Table entries are within 5 of zero and a step is at most 1.1e-3 cells of the finest level long.
    assert jumps < 2 * 5 * 3 * 1.1e-3 * 1.1


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_points_outside_read_the_surface_of_the_bound_and_nan_its_lower_end(backend):
    encoding = random_encoding(backend, bound=2.0)
    bad = [float("nan"), float("inf"), -float("inf")]
    outside = torch.tensor([[9.0, -9.0, 0.5], bad, [2.0001, 0.0, 0.0]])
    inside = torch.tensor([[2.0, -2.0, 0.5], [-2.0, 2.0, -2.0], [2.0, 0.0, 0.0]])
    assert torch.equal(encoding(outside), encoding(inside))


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_bound_only_scales_the_lattice(backend):
    points = random_points(50)
    torch.testing.assert_close(random_encoding(backend, bound=2.0)(points * 2), random_encoding(backend)(points))


def test_forward_and_backward_are_deterministic():
    def run():
        torch.manual_seed(5)
        field = HashGridField.from_preset("pocket")
        features = field(random_points(2000))
        features.square().sum().backward()
        return features.detach(), field.encoding.table.grad

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "preset, encoding, mlp",
    [
        ("reference", 3_636_768, 64 * 32 + 32 + 32 * 3 + 3),
        ("fantasia3d", 2 * (16**3 + 24**3 + 34**3 + 49**3 + 71**3 + 11 * 2**19), 32 * 32 + 32 * 32 + 32 * 3),
    ],
)
def test_presets_have_the_published_sizes(preset, encoding, mlp):
    groups = HashGridField.from_preset(preset).parameter_groups()
    assert sum(parameter.numel() for parameter in groups["encoding"]) == encoding
    assert sum(parameter.numel() for parameter in groups["mlp"]) == mlp


def test_parameter_groups_hold_every_parameter_once():
    field = HashGridField.from_preset("pocket")
    grouped = [id(parameter) for group in field.parameter_groups().values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in field.parameters())


def test_gain_multiplies_what_the_grid_says():
    torch.manual_seed(0)
    plain = HashGridField(FieldConfig(**SMALL, bias=False, hidden_layers=0))
    loud = HashGridField(FieldConfig(**SMALL, bias=False, hidden_layers=0, gain=10.0))
    loud.load_state_dict(plain.state_dict())
    points = random_points(50)
    torch.testing.assert_close(loud(points), 10 * plain(points))


def test_a_field_learns_a_pattern_on_a_surface():
    torch.manual_seed(0)
    field = HashGridField.from_preset("pocket")
    groups = field.parameter_groups()
    optimizer = torch.optim.Adam([{"params": groups["encoding"], "lr": 1e-2}, {"params": groups["mlp"], "lr": 1e-3}], eps=1e-15)
    points = torch.nn.functional.normalize(random_points(1000), dim=-1) * 0.8
    target = torch.sign(torch.sin(6 * points))
    losses = []
    for _ in range(100):
        loss = (field(points) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_state_round_trip_between_backends():
    """A checkpoint of the fused path loads in the plain one and gives the same features."""
    fused = HashGridField(FieldConfig(backend="numba", **SMALL))
    plain = HashGridField(FieldConfig(backend="torch", **SMALL))
    plain.load_state_dict(fused.state_dict())
    points = random_points(100)
    torch.testing.assert_close(plain(points), fused(points), rtol=1e-6, atol=1e-6)


def test_every_config_entry_is_checked_and_named():
    with pytest.raises(ValueError, match="preset: found 'referense'.*did you mean 'reference'"):
        field_config("referense")
    with pytest.raises(ValueError, match="unknown key 'n_level'.*did you mean 'n_levels'"):
        field_config("pocket", n_level=3)
    bad = dict(n_levels=0, n_features_per_level=0, log2_hashmap_size=2, base_resolution=1, max_resolution=3, bound=0.0)
    bad |= dict(hidden_width=0, hidden_layers=-1, n_output=0, gain=0.0, backend="cuda")
    for key, value in bad.items():
        with pytest.raises(ValueError, match=f"{key}: found {value!r}"):
            HashGridField(dataclasses.replace(FieldConfig(**SMALL), **{key: value}))
    assert set(bad) | {"bias"} == {entry.name for entry in dataclasses.fields(FieldConfig)}


def test_presets_are_not_changed_by_overrides():
    assert field_config("pocket", n_levels=3).n_levels == 3
    assert FIELD_PRESETS["pocket"].n_levels != 3


def test_evaluation_in_chunks_equals_evaluation_at_once():
    field = HashGridField(FieldConfig(**SMALL))
    points = random_points(1000)
    seen = []
    parts = evaluate_in_chunks(field, points, chunk=333, progress=lambda done, total: seen.append((done, total)))
    assert not parts.requires_grad
    torch.testing.assert_close(parts, field(points).detach(), rtol=1e-6, atol=1e-7)
    assert seen == [(333, 1000), (666, 1000), (999, 1000), (1000, 1000)]
    assert evaluate_in_chunks(field, torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match="chunk: found 0"):
        evaluate_in_chunks(field, points, chunk=0)
