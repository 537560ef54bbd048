"""Shapes on a tetrahedral grid: what is read out, the narrow band, the bound of the deformation."""

import pytest
import torch

from threestudio_pgc.scene.dmtet import FieldShape, VertexShape, band_vertices, band_vertices_torch, read_out
from threestudio_pgc.scene.fields import FieldConfig, HashGridField
from threestudio_pgc.scene.marching_tetrahedra import EmptySurfaceError
from threestudio_pgc.scene.signed_distance import SphereDistance
from threestudio_pgc.scene.tetrahedra import make_grid

SMALL = FieldConfig(n_levels=4, log2_hashmap_size=12, base_resolution=4, max_resolution=32, hidden_layers=1, n_output=4, backend="torch")


@pytest.fixture(scope="module")
def grid():
    return make_grid(24)


@pytest.fixture
def field(grid):
    torch.manual_seed(0)
    shape = FieldShape(SMALL)
    shape.fit(SphereDistance(0.5), grid, steps=60, seed=0, progress=False)
    return shape.train()


def everywhere(field):
    """The plain twin: the same field, asked at all vertices with gradients."""

    def shape(grid):
        values = HashGridField.forward(field, grid.vertices)
        return values[:, 0], values[:, 1:]

    return shape


def test_nothing_inside_is_an_error(grid):
    with pytest.raises(EmptySurfaceError):
        read_out(VertexShape(grid), grid)


def test_a_field_of_another_width_is_refused():
    with pytest.raises(ValueError, match="n_output: found 3, wanted 4"):
        FieldShape(FieldConfig(n_output=3))
    with pytest.raises(ValueError, match="rings: found 0"):
        FieldShape(SMALL, rings=0)


def test_values_are_the_distance_itself(grid):
    shape = VertexShape(grid, radius=2.0)
    shape.fit(SphereDistance(0.9), grid)
    mesh = read_out(shape, grid, 2.0)
    assert torch.allclose(shape.sdf, grid.vertices.mul(2).norm(dim=-1) - 0.9, atol=1e-6)
    assert (mesh.vertices.norm(dim=-1) - 0.9).abs().max() < 0.02
    assert (mesh.vertex_normals() * mesh.vertices).sum(-1).min() > 0


def test_a_shape_that_leaves_the_grid_is_closed_there(grid):
    shape = VertexShape(grid)
    shape.fit(SphereDistance(1.3), grid)
    mesh = read_out(shape, grid)
    assert (mesh.adjacency >= 0).all() and mesh.vertices.abs().max() <= 1


def test_no_deformation_turns_a_tetrahedron_over(grid):
    shape = VertexShape(grid)
    shape.fit(SphereDistance(0.5), grid)
    with torch.no_grad():
        shape.deformation.copy_(torch.randn(shape.deformation.shape, generator=torch.Generator().manual_seed(1)) * 100)
    mesh = read_out(shape, grid)
    a, b, c, d = mesh.grid_positions.double()[grid.tets.long()].unbind(1)
    before = grid.vertices.double()[grid.tets.long()].unbind(1)
    volume = [(torch.linalg.cross(q - p, r - p) * (s - p)).sum(-1) for p, q, r, s in ((a, b, c, d), before)]
    assert (volume[0] * volume[1].sign()).min() > 0
    assert (mesh.adjacency >= 0).all()
    still = read_out(shape, grid, deform=False)
    assert torch.equal(still.grid_positions, grid.vertices)


def test_crossed_tetrahedra_have_corners_on_both_sides(grid):
    shape = VertexShape(grid)
    shape.fit(SphereDistance(0.5), grid)
    mesh = read_out(shape, grid)
    inside = (mesh.sdf < 0)[mesh.crossed_tets()].sum(1)
    assert len(inside) and inside.min() == 1 and inside.max() == 3
    assert len(inside) <= len(mesh.faces) <= 2 * len(inside)


def test_the_band_is_the_crossed_edges_and_rings_around_them(grid):
    sdf = grid.vertices.norm(dim=-1) - 0.5
    edges = grid.edges.tolist()
    neighbours = [set() for _ in sdf]
    for a, b in edges:
        neighbours[a].add(b)
        neighbours[b].add(a)
    wanted = {v for a, b in edges if (sdf[a] < 0) != (sdf[b] < 0) for v in (a, b)}
    for rings in range(3):
        assert band_vertices(sdf, grid.edges, rings).tolist() == sorted(wanted)
        assert band_vertices_torch(sdf, grid.edges, rings).tolist() == sorted(wanted)
        wanted = wanted | {n for v in wanted for n in neighbours[v]}
    assert len(band_vertices(torch.ones(len(sdf)), grid.edges, 2)) == 0


def test_the_band_gives_the_full_evaluations_surface_and_gradient(field, grid):
    """The distances of a training run, at every step once from the band and once from all vertices."""
    optimizer = torch.optim.Adam(field.parameters(), lr=2e-3)
    direction = torch.tensor([1.0, 0.5, -0.3])
    sizes = []
    for step in range(40):
        if step % 10 == 0:
            field.refresh()
        mesh, full = read_out(field, grid), read_out(everywhere(field), grid)
        assert torch.equal(mesh.faces, full.faces) and torch.allclose(mesh.vertices, full.vertices, atol=1e-5)
        loss = (mesh.vertices @ direction).square().mean() + (mesh.vertices.norm(dim=-1) - 0.4).square().mean()
        gradient = torch.autograd.grad(loss, list(field.parameters()), retain_graph=True)
        whole = torch.autograd.grad(
            (full.vertices @ direction).square().mean() + (full.vertices.norm(dim=-1) - 0.4).square().mean(), list(field.parameters())
        )
        for ours, theirs in zip(gradient, whole):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6 + 1e-4 * float(theirs.abs().max()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sizes.append(len(band_vertices(field._known[:, 0], grid.edges, field.rings)))
    assert max(sizes) < 0.6 * len(grid.vertices)
    assert full.vertices.norm(dim=-1).mean() < 0.47, "the surface has moved by more than a cell"


def test_what_comes_up_outside_of_the_band_is_seen_at_the_next_refresh():
    grid = make_grid(48)
    shape = FieldShape(SMALL).train()
    shape.fit(SphereDistance(0.25), grid, steps=80, seed=0, progress=False)
    before = read_out(shape, grid).vertices.abs().max()
    with torch.no_grad():
        shape.mlp[-1].bias[0] -= 2.0  # the whole cube is inside now
    missed = read_out(shape, grid).vertices.abs().max()
    shape.refresh()
    assert before < 0.4 and missed < 0.7 and read_out(shape, grid).vertices.abs().max() > 0.9


def test_a_surrounding_autocast_does_not_reach_the_surface(field, grid):
    field.refresh()
    plain = read_out(field, grid)
    field.refresh()
    with torch.autocast("cpu", torch.bfloat16):
        cast = read_out(field, grid)
    assert torch.equal(plain.vertices, cast.vertices) and cast.sdf.dtype == torch.float32


def test_evaluation_asks_every_vertex(field, grid):
    read_out(field, grid)
    with torch.no_grad():
        field.mlp[-1].bias[0] -= 2.0
    field.eval()
    assert read_out(field, grid).vertices.abs().max() > 0.9
