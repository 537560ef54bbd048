"""Neighbours across edges, on meshes small enough to list and against a search over all pairs."""

import itertools
from dataclasses import replace

import pytest
import torch
import trimesh

from threestudio_pgc.scene.adjacency import face_adjacency, surface_edges
from threestudio_pgc.scene.mesh import TriangleMesh

TETRAHEDRON = torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])


def searched(faces: torch.Tensor) -> torch.Tensor:
    """Adjacency by comparing every edge with every other."""
    edges = [(f, {face[k], face[(k + 1) % 3]}) for f, face in enumerate(faces.tolist()) for k in range(3)]
    found = []
    for f, edge in edges:
        same = [g for g, other in edges if other == edge]
        found.append(next(g for g in same if g != f) if len(edge) == 2 and len(same) == 2 and same[0] != same[1] else -1)
    return torch.tensor(found, dtype=torch.int32).reshape(-1, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_no_faces(dtype):
    faces = torch.zeros(0, 3, dtype=dtype)
    adjacency = face_adjacency(faces)
    assert adjacency.shape == (0, 3) and adjacency.dtype == torch.int32
    edges, edge_faces = surface_edges(faces, adjacency)
    assert edges.shape == edge_faces.shape == (0, 2)


def test_one_triangle_has_three_open_edges():
    faces = torch.tensor([[4, 7, 5]])
    assert torch.equal(face_adjacency(faces), torch.full((1, 3), -1, dtype=torch.int32))
    edges, edge_faces = surface_edges(faces, face_adjacency(faces))
    assert edges.tolist() == [[4, 7], [7, 5], [5, 4]] and edge_faces.tolist() == [[0, -1]] * 3


def test_two_triangles_meet_across_the_edge_they_share_in_either_direction():
    expected = torch.tensor([[-1, -1, 1], [0, -1, -1]], dtype=torch.int32)
    assert torch.equal(face_adjacency(torch.tensor([[0, 1, 2], [0, 2, 3]])), expected)
    assert torch.equal(face_adjacency(torch.tensor([[0, 1, 2], [2, 0, 3]])), expected)


def test_an_edge_of_three_triangles_has_no_neighbour():
    fan = torch.tensor([[0, 1, 2], [1, 0, 3], [0, 1, 4]])
    assert (face_adjacency(fan) == -1).all()


def test_a_vertex_named_twice_makes_no_neighbour():
    assert (face_adjacency(torch.tensor([[0, 1, 1], [1, 1, 2]])) == -1).all()


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_search_over_all_pairs(seed):
    faces = torch.randint(0, 9, (25, 3), generator=torch.Generator().manual_seed(seed))
    expected = searched(faces)
    assert (expected >= 0).any() and (expected < 0).any()
    assert torch.equal(face_adjacency(faces), expected) and torch.equal(face_adjacency(faces.int()), expected)


@pytest.mark.parametrize("faces", [TETRAHEDRON, torch.from_numpy(trimesh.creation.icosphere(3).faces)], ids=["tetrahedron", "sphere"])
def test_a_closed_mesh_lists_every_edge_once(faces):
    adjacency = face_adjacency(faces)
    assert (adjacency >= 0).all()
    assert all(f in adjacency[g] for f, row in enumerate(adjacency.tolist()) for g in row)
    edges, edge_faces = surface_edges(faces, adjacency)
    assert len(edges) == len(faces) * 3 // 2 == len({frozenset(edge) for edge in edges.tolist()})
    for edge, pair in itertools.islice(zip(edges.tolist(), edge_faces.tolist()), 50):
        assert pair[0] != pair[1] and all(set(edge) <= set(faces[f].tolist()) for f in pair)


def test_a_mesh_keeps_its_adjacency_until_its_faces_are_replaced():
    mesh = TriangleMesh(torch.eye(4)[:, :3], TETRAHEDRON)
    first = mesh.face_adjacency()
    mesh.vertices = mesh.vertices + 1
    assert mesh.face_adjacency() is first
    mesh.faces = TETRAHEDRON[:2].clone()
    assert torch.equal(mesh.face_adjacency(), face_adjacency(TETRAHEDRON[:2]))


def test_a_mesh_gives_back_the_adjacency_it_was_given():
    given = face_adjacency(TETRAHEDRON)
    mesh = TriangleMesh(torch.eye(4)[:, :3], TETRAHEDRON, adjacency=given)
    assert mesh.face_adjacency() is given
    assert replace(mesh, vertices=mesh.vertices + 1).face_adjacency() is given
    assert torch.equal(mesh.to("cpu").face_adjacency(), given)
