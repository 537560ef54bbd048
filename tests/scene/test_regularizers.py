"""Regularisers against values known by hand, and their gradients against finite differences."""

import math

import pytest
import torch

from threestudio_pgc.scene.regularizers import eikonal, laplacian, normal_consistency, sign_entropy, smoothness

LOG2 = math.log(2)
TETRAHEDRON = torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])  # faces, outward for corners of positive volume


def neighbours(faces):
    """adjacency (F, 3) the slow way: who else has this edge."""
    owners = {}
    for face, corners in enumerate(faces.tolist()):
        for corner in range(3):
            owners.setdefault(frozenset((corners[corner], corners[(corner + 1) % 3])), []).append((face, corner))
    adjacency = torch.full((len(faces), 3), -1, dtype=torch.int32)
    for pair in owners.values():
        if len(pair) == 2:
            (one, here), (other, there) = pair
            adjacency[one, here], adjacency[other, there] = other, one
    return adjacency


def surface(vertices, faces):
    faces = torch.as_tensor(faces)
    return torch.as_tensor(vertices, dtype=torch.float64), faces, neighbours(faces)


def random_solid():
    return surface(torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), TETRAHEDRON)


def hinge(angle):
    """Two unit right triangles on the x axis; their normals differ by `angle` (radians)."""
    return surface([[0, 0, 0], [1, 0, 0], [0, -1, 0], [0, math.cos(angle), math.sin(angle)]], [[0, 1, 3], [1, 0, 2]])


def random_tets():
    """Three tetrahedra around an edge, and values at their corners."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0.5], [-0.5, 1, 0.5], [-0.5, -1, 0.5]], dtype=torch.float64)
    corners = corners + 0.1 * torch.rand(5, 3, generator=generator, dtype=torch.float64)
    sdf = torch.randn(5, generator=generator, dtype=torch.float64)
    return corners, sdf, torch.tensor([[0, 1, 2, 3], [0, 1, 3, 4], [0, 1, 4, 2]])


def zero_with_a_gradient_of_zeros(value, *inputs):
    assert value == 0 and value.shape == ()
    return all(not gradient.any() for gradient in torch.autograd.grad(value, inputs, materialize_grads=True))


@pytest.mark.parametrize("regularizer", [normal_consistency, laplacian])
def test_no_surface_costs_nothing(regularizer):
    vertices = torch.rand(3, 3, requires_grad=True)
    empty = torch.zeros(0, 3, dtype=torch.int64)
    assert zero_with_a_gradient_of_zeros(regularizer(vertices, empty, empty.int()), vertices)


def test_no_tetrahedron_and_no_crossing_cost_nothing():
    vertices, sdf = torch.rand(3, 3, requires_grad=True), torch.tensor([1.0, 2, 0], requires_grad=True)
    assert zero_with_a_gradient_of_zeros(eikonal(vertices, sdf, torch.zeros(0, 4, dtype=torch.int64)), vertices, sdf)
    assert zero_with_a_gradient_of_zeros(sign_entropy(sdf, torch.zeros(0, 2, dtype=torch.int64)), sdf)
    assert zero_with_a_gradient_of_zeros(sign_entropy(sdf, torch.tensor([[0, 1], [1, 2]])), sdf)  # zero is outside


def test_one_triangle_has_no_edge_to_be_consistent_over():
    vertices, faces, adjacency = surface([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
    vertices.requires_grad_()
    assert zero_with_a_gradient_of_zeros(normal_consistency(vertices, faces, adjacency), vertices)


@pytest.mark.parametrize("height", [0.0, 1e-300, 1e-12])
def test_slivers_do_not_count_and_do_not_spoil_the_gradient(height):
    """The hinge with a flat triangle on its free edge: value and gradient are the hinge's."""
    vertices, faces, _ = hinge(1.0)
    lone = normal_consistency(*hinge(1.0))
    middle = (vertices[0] + vertices[3]) / 2 - torch.tensor([height, 0, 0])
    vertices = torch.cat([vertices, middle[None]]).requires_grad_()
    faces = torch.cat([faces, torch.tensor([[0, 3, 4]])])
    value = normal_consistency(vertices, faces, neighbours(faces))
    (gradient,) = torch.autograd.grad(value, vertices)
    assert value.item() == pytest.approx(lone.item()) and gradient.isfinite().all() and not gradient[4].any()


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, 3.0, math.pi])
def test_normal_consistency_of_a_hinge_is_one_minus_the_cosine(angle):
    assert normal_consistency(*hinge(angle)) == pytest.approx(1 - math.cos(angle), abs=1e-12)


def test_normal_consistency_counts_every_edge_once_and_ignores_the_size():
    vertices, faces, adjacency = surface([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], TETRAHEDRON)
    # Three right angles, and three edges whose normals have the cosine -1/sqrt(3).
    expected = (3 * 1 + 3 * (1 + 1 / math.sqrt(3))) / 6
    assert normal_consistency(vertices, faces, adjacency) == pytest.approx(expected)
    assert normal_consistency(vertices * 1e-5, faces, adjacency) == pytest.approx(expected)
    assert normal_consistency(vertices.float() * 1e-5, faces, adjacency) == pytest.approx(expected, rel=1e-5)


def test_laplacian_of_a_triangle_and_a_square():
    equilateral = surface([[1, 0, 0], [-0.5, math.sqrt(0.75), 0], [-0.5, -math.sqrt(0.75), 0]], [[0, 1, 2]])
    assert laplacian(*equilateral) == pytest.approx(1.5**2)
    # The ends of the diagonal have three neighbours, whose mean is the centre moved a third of the way to the other end.
    square = surface([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    assert laplacian(*square) == pytest.approx((2 * 2 * (2 / 3) ** 2 + 2 * 0.5) / 4)


def test_laplacian_leaves_out_vertices_of_no_face_and_does_not_see_where_the_shape_is():
    vertices, faces, adjacency = random_solid()
    alone = laplacian(vertices, faces, adjacency)
    assert laplacian(torch.cat([vertices, torch.ones(2, 3)]), faces, adjacency) == pytest.approx(alone.item())
    far = laplacian((vertices + 1000).float(), faces, adjacency)
    assert far == pytest.approx(alone.item(), rel=1e-3)


def test_eikonal_of_a_linear_field_is_exact():
    vertices, _, tets = random_tets()
    slope = torch.tensor([0.0, 3, -4], dtype=torch.float64)
    assert eikonal(vertices, vertices @ slope + 2, tets) == pytest.approx((5 - 1) ** 2)
    assert eikonal(vertices, vertices @ (slope / 5), tets) == pytest.approx(0, abs=1e-20)
    assert eikonal(vertices, vertices @ (slope / 5), tets[:, [1, 0, 2, 3]]) == pytest.approx(0, abs=1e-20)  # negative volume


def test_eikonal_weighs_tetrahedra_alike_and_has_a_gradient_where_the_field_is_constant():
    vertices = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -9]], dtype=torch.float64)
    tets = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 4]])
    sdf = torch.tensor([0, 0, 0, 3, 0], dtype=torch.float64)
    assert eikonal(vertices, sdf, tets) == pytest.approx(((3 - 1) ** 2 + (0 - 1) ** 2) / 2)  # the second is nine times as large
    sdf = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    value = eikonal(vertices, sdf, tets)
    (gradient,) = torch.autograd.grad(value, sdf)
    assert value == 1 and gradient.isfinite().all()


@pytest.mark.parametrize("height", [0.0, 1e-300, 1e-12])
def test_flat_tetrahedra_do_not_count(height):
    vertices, sdf, tets = random_tets()
    above = vertices[[0, 1, 2]].mean(0) + height
    more = torch.cat([vertices, above[None]]).requires_grad_()
    values = torch.cat([sdf, torch.ones(1)]).requires_grad_()
    value = eikonal(more, values, torch.cat([tets, torch.tensor([[0, 1, 2, 5]])]))
    gradients = torch.autograd.grad(value, (more, values))
    assert value.item() == pytest.approx(eikonal(vertices, sdf, tets).item())
    assert all(gradient.isfinite().all() and not gradient[5].any() for gradient in gradients)


def test_sign_entropy_of_edges_known_by_hand():
    sdf = torch.tensor([-1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    edges = torch.tensor([[0, 1], [2, 0], [1, 3], [2, 3]])
    outside_wanted, inside_wanted = (lambda s: math.log1p(math.exp(-s))), (lambda s: math.log1p(math.exp(s)))
    first = outside_wanted(-1) + inside_wanted(2)
    second = outside_wanted(-1) + inside_wanted(0)
    assert sign_entropy(sdf, edges) == pytest.approx((first + second) / 2)
    assert sign_entropy(sdf * 1e-9, edges[:1]) == pytest.approx(2 * LOG2)


def test_sign_entropy_is_the_same_inside_out_and_pulls_both_ends_over():
    sdf = torch.tensor([-0.3, 0.2, 0.7], dtype=torch.float64, requires_grad=True)
    edges = torch.tensor([[0, 1], [1, 2]])
    value = sign_entropy(sdf, edges)
    assert value.item() == pytest.approx(sign_entropy(-sdf, edges).item())
    (gradient,) = torch.autograd.grad(value, sdf)
    assert gradient[0] < -0.4 and gradient[1] > 0.4 and gradient[2] == 0


@pytest.mark.parametrize("regularizer", [normal_consistency, laplacian])
def test_gradients_of_the_surface(regularizer):
    vertices, faces, adjacency = random_solid()
    assert torch.autograd.gradcheck(lambda moved: regularizer(moved, faces, adjacency), vertices.requires_grad_())


def test_gradients_of_the_field():
    vertices, sdf, tets = random_tets()
    edges = torch.combinations(torch.arange(5))
    assert torch.autograd.gradcheck(lambda moved, values: eikonal(moved, values, tets), (vertices.requires_grad_(), sdf.requires_grad_()))
    assert torch.autograd.gradcheck(lambda values: sign_entropy(values, edges), sdf)
    assert sign_entropy(sdf, edges) > 0


def test_smoothness_of_no_points_and_of_equal_maps_is_zero():
    empty = torch.zeros(0, 4, requires_grad=True)
    smoothness(empty, empty).backward()
    assert empty.grad.shape == (0, 4)
    values = torch.rand(5, 3)
    assert smoothness(values, values) == 0


def test_smoothness_is_the_mean_over_points_and_channels():
    values, nearby = torch.tensor([[0.1, 0.5], [0.3, 0.3]]), torch.tensor([[0.2, 0.1], [0.3, 0.0]])
    torch.testing.assert_close(smoothness(values, nearby), torch.tensor((0.1 + 0.4 + 0.0 + 0.3) / 4))


def test_gradient_of_smoothness():
    values, nearby = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(smoothness, (values, nearby))
