"""Fragments: which pieces go, and that what stays is still the same mesh."""

import numpy as np
import pytest
import torch

from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.fragments import remove_fragments
from threestudio_pgc.scene.mesh import Similarity, TriangleMesh


def scatter(mesh, scales):
    """Copies of a mesh of these sizes side by side, their faces and their vertices shuffled together."""
    generator = np.random.default_rng(0)
    count, order = len(mesh.vertices), generator.permutation(len(mesh.vertices) * len(scales))
    vertices = torch.cat([mesh.vertices * scale + torch.tensor([3.0 * i, 0, 0]) for i, scale in enumerate(scales)])
    faces = torch.cat([mesh.faces + count * i for i in range(len(scales))])
    uv_faces = torch.cat([mesh.uv_faces + len(mesh.uvs) * i for i in range(len(scales))])
    shuffled = torch.from_numpy(generator.permutation(len(faces)))
    return TriangleMesh(
        vertices[np.argsort(order)],
        torch.from_numpy(order)[faces][shuffled],
        uvs=torch.cat([mesh.uvs / len(scales) + i / len(scales) for i in range(len(scales))]),
        uv_faces=uv_faces[shuffled],
        vertex_colors=torch.rand(len(vertices), 3),
        frame=Similarity(scale=7.0, offset=np.array([1.0, 2, 3])),
    )


def corners(mesh):
    """Everything that the faces' corners have, as a set of rows: position, texture coordinate, colour."""
    parts = [mesh.vertices[mesh.faces], mesh.uvs[mesh.uv_faces], mesh.vertex_colors[mesh.faces]]
    return {tuple(row) for row in torch.cat(parts, dim=-1).reshape(-1, 24).tolist()}


def test_a_mesh_without_faces_and_a_surface_without_area_stay_as_they_are():
    empty = TriangleMesh(torch.zeros(2, 3), torch.zeros(0, 3, dtype=torch.int64))
    points = TriangleMesh(torch.zeros(6, 3), torch.arange(6).view(2, 3))
    for mesh in (empty, points):
        kept, removed = remove_fragments(mesh, 0.5)
        assert kept is mesh and removed == 0


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(box, share):
    with pytest.raises(ExportError, match="min_share: found .*, wanted at least 0"):
        remove_fragments(box, share)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_nothing_to_remove_returns_the_very_same_mesh(box, share):
    mesh = scatter(box, [1.0, 0.5])  # a quarter of the area
    kept, removed = remove_fragments(mesh, share)
    assert kept is mesh and removed == 0


def test_pieces_below_the_share_of_the_largest_surface_go_and_the_rest_is_the_same(box):
    mesh = scatter(box, [0.5, 1.0, 0.1, 0.3])
    kept, removed = remove_fragments(mesh, 0.2)
    expected = {row for row in corners(mesh) if row[0] < 4.5}  # the first two stand at x = 0 and 3
    assert removed == 2 and corners(kept) == expected
    assert (len(kept.vertices), len(kept.faces), len(kept.uvs)) == (16, 24, 48)
    assert np.array_equal(kept.frame.apply(np.eye(3)), mesh.frame.apply(np.eye(3)))


def test_faces_vertices_and_texture_coordinates_keep_their_order(box):
    mesh = scatter(box, [1.0, 0.1])
    kept, _ = remove_fragments(mesh, 0.5)
    large = mesh.vertices[:, 0] < 2
    assert torch.equal(kept.vertices, mesh.vertices[large])
    assert torch.equal(kept.vertices[kept.faces], mesh.vertices[mesh.faces][large[mesh.faces[:, 0]]])
    assert torch.equal(kept.uvs, mesh.uvs[mesh.uvs[:, 0] < 0.5])


def test_the_area_counts_and_not_the_number_of_faces(bare_sphere):
    """A ball of 320 small faces beside one large triangle."""
    ball = bare_sphere.vertices * 0.1
    triangle = torch.tensor([[5.0, 0, 0], [9, 0, 0], [5, 4, 0]])
    mesh = TriangleMesh(torch.cat([ball, triangle]), torch.cat([bare_sphere.faces, torch.tensor([[0, 1, 2]]) + len(ball)]))
    kept, removed = remove_fragments(mesh, 0.5)
    assert removed == 1 and torch.equal(kept.vertices, triangle) and kept.faces.tolist() == [[0, 1, 2]]


def test_pieces_that_share_one_vertex_are_one_and_loose_vertices_are_none():
    bow_tie = torch.tensor([[0.0, 0, 0], [4, 0, 0], [0, 4, 0], [-0.1, 0, 0], [0, -0.1, 0], [9, 9, 9]])
    mesh = TriangleMesh(bow_tie, torch.tensor([[0, 1, 2], [0, 3, 4]]))
    assert remove_fragments(mesh, 0.9) == (mesh, 0)


def test_a_gradient_does_not_follow_the_mesh(box):
    mesh = scatter(box, [1.0, 0.1])
    mesh.vertices.requires_grad_()
    kept, removed = remove_fragments(mesh, 0.5)
    assert removed == 1 and not kept.vertices.requires_grad
