import math

import pytest
import torch

from threestudio_pgc.scene.marching_tetrahedra import (
    EmptySurfaceError,
    close_at_boundary,
    marching_tetrahedra,
    marching_tetrahedra_reference,
)
from threestudio_pgc.scene.tetrahedra import make_grid

BACKENDS = ["torch", "numba"]
SMALL, MEDIUM, LARGE = (make_grid(resolution) for resolution in (8, 16, 40))  # 27, 216 and 4096 cubes


def sphere(points, radius=0.6):
    return points.norm(dim=-1) - radius


def torus(points):
    ring = points[:, :2].norm(dim=-1) - 0.55
    return torch.stack([ring, points[:, 2]], dim=-1).norm(dim=-1) - 0.25


def random(points, seed=0):
    return torch.randn(len(points), generator=torch.Generator().manual_seed(seed), dtype=points.dtype)


def one_inside(points):
    values = torch.zeros(len(points), dtype=points.dtype)
    values[points.square().sum(dim=-1).argmin()] = -0.1
    return values


FIELDS = {
    "random": random,
    "sphere": sphere,
    "torus": torus,
    "zero at many vertices": lambda points: (sphere(points) * 4).round() / 4,
    "random and zero": lambda points: random(points).round(),
    "zero but for one": one_inside,
    "huge": lambda points: random(points) * 1e300,
    "huge and tiny": lambda points: random(points) * 10 ** (40 * random(points, 1)),
    "checkerboard": lambda points: (-1.0) ** torch.arange(len(points)) * (1 + random(points).abs()),
    "all but one inside": lambda points: -one_inside(points) - 0.05,
}


def points_of(grid):
    return grid.vertices.double()


def directed_edges(faces):
    """(3F, 2): from corner k to corner k + 1 of each face."""
    return torch.stack([faces, faces.roll(-1, dims=1)], dim=-1).view(-1, 2)


def brute_force_adjacency(faces):
    owner = {tuple(edge): side // 3 for side, edge in enumerate(directed_edges(faces).tolist())}
    return torch.tensor([owner.get((b, a), -1) for a, b in directed_edges(faces).tolist()], dtype=torch.int32).view(-1, 3)


def euler_number(surface):
    edges = len(torch.unique(directed_edges(surface.faces).sort(dim=-1).values, dim=0))
    return len(surface.vertices) - edges + len(surface.faces)


def volume(surface):
    a, b, c = surface.vertices[surface.faces].unbind(1)
    return (torch.linalg.cross(a, b) * c).sum().item() / 6


def assert_closed_and_oriented(surface):
    adjacency = surface.adjacency.long()
    assert adjacency.min() >= 0
    index = torch.arange(len(adjacency))
    assert (adjacency[adjacency] == index[:, None, None]).any(dim=-1).all()  # the neighbour's neighbour
    edges = directed_edges(surface.faces)
    assert len(torch.unique(edges, dim=0)) == len(edges)
    assert torch.equal(torch.unique(edges, dim=0), torch.unique(edges.flip(-1), dim=0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.25, r"positive everywhere \(nothing is inside\), from 0.25 to 0.25; wanted both signs. Lower the learning rate"),
        (0.0, r"positive or zero everywhere \(nothing is inside\)"),
        (-0.25, r"negative everywhere \(nothing is outside\), from -0.25 to -0.25"),
    ],
)
def test_a_field_of_one_sign_has_no_surface(backend, value, message):
    with pytest.raises(EmptySurfaceError, match=message):
        marching_tetrahedra(SMALL.vertices, torch.full_like(SMALL.vertices[:, 0], value), SMALL, backend=backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_field_that_is_not_finite_is_refused_with_the_count(bad):
    sdf = sphere(SMALL.vertices)
    sdf[[3, 5]] = bad
    with pytest.raises(ValueError, match="sdf: found 2 of 91 values that are not finite, wanted none"):
        marching_tetrahedra(SMALL.vertices, sdf, SMALL)


def test_shapes_that_do_not_fit_are_refused():
    sdf = sphere(SMALL.vertices)
    for vertices, values in ((SMALL.vertices[1:], sdf), (SMALL.vertices, sdf[1:]), (SMALL.vertices, sdf[:, None])):
        with pytest.raises(ValueError, match=r"vertices, sdf: found .*, wanted \(91, 3\) and \(91,\)"):
            marching_tetrahedra(vertices, values, SMALL)


def test_backends_that_do_not_fit_are_refused():
    sdf = sphere(SMALL.vertices)
    with pytest.raises(ValueError, match="backend: found 'cuda', wanted one of auto, torch, numba"):
        marching_tetrahedra(SMALL.vertices, sdf, SMALL, backend="cuda")
    with pytest.raises(ValueError, match="found devices cpu, meta, cpu, wanted one"):
        marching_tetrahedra(SMALL.vertices, sdf.to("meta"), SMALL)
    with pytest.raises(ValueError, match="backend: found 'numba' for tensors on meta, wanted 'auto' or 'torch'"):
        marching_tetrahedra(SMALL.vertices.to("meta"), sdf.to("meta"), SMALL.to("meta"), backend="numba")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("field", FIELDS)
def test_both_paths_equal_the_plain_twin(backend, field):
    vertices = (points_of(SMALL) + 0.5 * SMALL.max_displacement * random(SMALL.vertices).view(-1, 1)).requires_grad_()
    sdf = FIELDS[field](points_of(SMALL)).requires_grad_()
    surface = marching_tetrahedra(vertices, sdf, SMALL, backend=backend)
    expected, faces = marching_tetrahedra_reference(vertices, sdf, SMALL.tets)
    assert torch.equal(surface.vertices, expected) and torch.equal(surface.faces, faces)
    assert torch.equal(surface.adjacency, brute_force_adjacency(faces))
    assert surface.faces.dtype == torch.int64 and surface.adjacency.dtype == torch.int32
    weights = random(expected.detach())[:, None] * torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    for got, wanted in zip(*(torch.autograd.grad((points * weights).sum(), (vertices, sdf)) for points in (surface.vertices, expected))):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12 * wanted.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [False, True])
def test_vertices_stay_on_their_edges_at_the_ends_of_the_number_range(backend, dtype, largest):
    info = torch.finfo(dtype)
    scale = info.max if largest else info.smallest_normal * info.eps  # the smallest denormal
    points = SMALL.vertices.to(dtype)
    sdf = random(points).sign() * scale
    surface = marching_tetrahedra(points, sdf, SMALL, backend=backend)
    inside = sdf < 0
    ends = SMALL.edges[inside[SMALL.edges[:, 0]] != inside[SMALL.edges[:, 1]]].long()
    assert len(ends) == len(surface.vertices)
    a, b = points[ends].unbind(1)
    assert ((surface.vertices - a).norm(dim=1) + (surface.vertices - b).norm(dim=1) <= (1 + 1e-5) * (b - a).norm(dim=1)).all()
    assert torch.equal(surface.vertices, marching_tetrahedra_reference(points, sdf, SMALL.tets)[0])


def test_the_default_is_a_path_that_gives_the_same():
    points = points_of(LARGE)
    a, b, c = (marching_tetrahedra(points, torus(points), LARGE, backend=backend) for backend in ("auto", *BACKENDS))
    assert torch.equal(a.vertices, b.vertices) and torch.equal(a.faces, b.faces) and torch.equal(a.adjacency, b.adjacency)
    assert torch.equal(a.vertices, c.vertices) and torch.equal(a.faces, c.faces) and torch.equal(a.adjacency, c.adjacency)


def test_a_vertex_lies_where_the_field_is_zero_between_the_ends_of_its_edge():
    points = points_of(SMALL)
    sdf = points @ torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64) - 0.1
    surface = marching_tetrahedra(points, sdf, SMALL)
    values = surface.vertices @ torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64) - 0.1
    assert values.abs().max() < 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend):
    vertices = points_of(SMALL).requires_grad_()
    sdf = sphere(points_of(SMALL), 0.71).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: marching_tetrahedra(*inputs, SMALL, backend=backend).vertices, (vertices, sdf))


def test_fields_and_positions_of_different_precision():
    surface = marching_tetrahedra(SMALL.vertices, sphere(points_of(SMALL)), SMALL)
    assert surface.vertices.dtype == torch.float64
    assert marching_tetrahedra(SMALL.vertices, sphere(SMALL.vertices).half(), SMALL).vertices.dtype == torch.float32


@pytest.mark.parametrize(("shape", "euler", "wanted"), [(sphere, 2, 4 / 3 * math.pi * 0.6**3), (torus, 0, 2 * math.pi**2 * 0.55 * 0.25**2)])
def test_sphere_and_torus_are_closed_with_their_euler_number_and_volume(shape, euler, wanted):
    points = points_of(LARGE)
    surface = marching_tetrahedra(points, shape(points), LARGE)
    assert_closed_and_oriented(surface)
    assert euler_number(surface) == euler
    assert volume(surface) == pytest.approx(wanted, rel=0.05)


def test_normals_point_outwards_on_a_deformed_grid():
    generator = torch.Generator().manual_seed(3)
    moves = torch.randint(0, 2, LARGE.vertices.shape, generator=generator) * 2 - 1
    moves[LARGE.boundary] = 0
    points = points_of(LARGE) + LARGE.max_displacement * moves
    surface = marching_tetrahedra(points, sphere(points), LARGE)
    assert_closed_and_oriented(surface)
    a, b, c = surface.vertices[surface.faces].unbind(1)
    assert ((torch.linalg.cross(b - a, c - a) * (a + b + c)).sum(dim=-1) > 0).float().mean() > 0.95  # slivers may lean over
    assert volume(surface) == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.03)


@pytest.mark.parametrize("field", FIELDS)
def test_a_shape_cut_by_the_cube_is_open_there_until_it_is_closed(field):
    sdf = FIELDS[field](points_of(MEDIUM))
    points = points_of(MEDIUM) + MEDIUM.max_displacement * random(MEDIUM.vertices).clamp(-1, 1).view(-1, 1)
    closed = marching_tetrahedra(points, close_at_boundary(sdf, MEDIUM, 0.01), MEDIUM)
    assert_closed_and_oriented(closed)
    assert volume(closed) > 0
    open_ = marching_tetrahedra(points, sdf, MEDIUM)
    assert (open_.adjacency.min() == -1) == bool(((sdf < 0) & MEDIUM.boundary).any() and ((sdf >= 0) & MEDIUM.boundary).any())


def test_closing_leaves_the_inside_and_its_gradient_alone():
    sdf = random(points_of(SMALL)).requires_grad_()
    closed = close_at_boundary(sdf, SMALL, 0.2)
    assert closed[SMALL.boundary].min() == 0.2
    assert torch.equal(closed[~SMALL.boundary], sdf[~SMALL.boundary])
    (grad,) = torch.autograd.grad(closed.sum(), sdf)
    assert torch.equal(grad == 1, ~SMALL.boundary | (sdf > 0.2))
    for margin in (0, -1, math.nan):
        with pytest.raises(ValueError, match="margin: found .*, wanted a positive number"):
            close_at_boundary(sdf, SMALL, margin)
