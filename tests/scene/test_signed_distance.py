"""Distances are exact and negative inside, whatever state the mesh is in, and what had to be guessed is said."""

import struct
import warnings

import numpy as np
import pytest
import torch
import trimesh
from omegaconf import OmegaConf

from threestudio_pgc.scene import signed_distance
from threestudio_pgc.scene.mesh import MeshError, TriangleMesh, load_mesh, normalize, sample_surface
from threestudio_pgc.scene.signed_distance import EllipsoidDistance, MeshDistance, SphereDistance, initial_distance

RADII = [0.3, 0.5, 0.8]


def as_mesh(part: trimesh.Trimesh) -> TriangleMesh:
    return TriangleMesh(torch.from_numpy(np.array(part.vertices)).float(), torch.from_numpy(np.array(part.faces)))


def ball(radius=0.5, centre=(0, 0, 0), subdivisions=3, inward=False) -> trimesh.Trimesh:
    part = trimesh.creation.icosphere(subdivisions, radius)
    part.apply_translation(centre)
    if inward:
        part.invert()
    return part


def points_in_cube(count, seed=0):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def quiet(mesh: TriangleMesh) -> MeshDistance:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MeshDistance(mesh)


# --------------------------------------------------------------------------------------------------------------- degenerate


@pytest.mark.parametrize("distance", [SphereDistance(), EllipsoidDistance(RADII), MeshDistance(as_mesh(ball()))])
def test_no_points(distance):
    assert distance(torch.zeros(0, 3)).shape == (0,)
    assert distance.surface_points(0, torch.Generator()).shape == (0, 3)


def test_a_mesh_without_faces_is_refused():
    with pytest.raises(MeshError, match="has no faces"):
        MeshDistance(TriangleMesh(torch.zeros(3, 3), torch.zeros(0, 3, dtype=torch.int64)))


def test_a_flat_open_sheet_has_no_inside():
    x, y = np.meshgrid(np.arange(5.0), np.arange(5.0))
    corner = np.arange(25).reshape(5, 5)
    a, b, c, d = (part.ravel() for part in (corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1]))
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    vertices = np.stack([x.ravel(), y.ravel(), np.zeros(25)], 1)
    with pytest.raises(MeshError, match="encloses nothing .*it is an open sheet"):
        MeshDistance(as_mesh(trimesh.Trimesh(vertices, faces, process=False)))
    with pytest.raises(MeshError, match="encloses nothing .*or has faces on both sides"):
        MeshDistance(as_mesh(trimesh.Trimesh(vertices, np.concatenate([faces, faces[:, ::-1]]), process=False)))


# ----------------------------------------------------------------------------------------------------------- sphere, ellipsoid


def test_sphere():
    points = torch.tensor([[0.0, 0, 0], [0, 0, 0.7], [0.2, 0, 0], [3, 4, 0]])
    torch.testing.assert_close(SphereDistance(0.7)(points), torch.tensor([-0.7, 0, -0.5, 4.3]))


def test_an_ellipsoid_with_equal_radii_is_a_sphere():
    points = points_in_cube(1000)
    torch.testing.assert_close(EllipsoidDistance([0.4] * 3)(points), SphereDistance(0.4)(points), rtol=0, atol=1e-6)


def test_ellipsoid_on_its_axes_and_planes_of_symmetry():
    points = torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0, -0.9, 0], [0.0, 0, 0.95], [0, 0, 0.79]])
    # next to a pointed end the sphere of curvature decides: its radius there is 0.3^2 / 0.8
    torch.testing.assert_close(EllipsoidDistance(RADII)(points), torch.tensor([-0.3, 0, 0.4, 0.15, -0.01]), rtol=0, atol=1e-6)


def test_ellipsoid_is_the_distance_to_the_nearest_of_its_points():
    distance = EllipsoidDistance(RADII)
    points = torch.cat([points_in_cube(300), points_in_cube(100) * torch.tensor([0.0, 1, 1])])
    surface = distance.surface_points(400_000, torch.Generator().manual_seed(1))
    nearest = torch.cat([torch.cdist(chunk, surface).min(dim=1).values for chunk in points.split(50)])
    assert (distance(points).abs() - nearest).abs().max() < 1e-3  # nearest is too large where the samples are sparse
    inside = (points / torch.tensor(RADII)).square().sum(dim=1) < 1
    assert torch.equal(distance(points) < 0, inside) and 0 < inside.sum() < len(points)


@pytest.mark.parametrize("distance", [SphereDistance(0.3), EllipsoidDistance(RADII), MeshDistance(as_mesh(ball()))])
def test_surface_points_have_distance_zero_and_come_from_the_generator(distance):
    points = distance.surface_points(500, torch.Generator().manual_seed(3))
    assert distance(points).abs().max() < 1e-6
    assert torch.equal(points, distance.surface_points(500, torch.Generator().manual_seed(3)))


# --------------------------------------------------------------------------------------------------------------------- meshes


def test_a_finely_meshed_sphere_has_the_spheres_distance_and_no_notes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance = MeshDistance(as_mesh(ball(0.6, subdivisions=5)))
    points = points_in_cube(5000)
    found = distance(points)
    assert found.dtype == torch.float32 and distance.notes == []
    torch.testing.assert_close(found, SphereDistance(0.6)(points), rtol=0, atol=5e-4)


def test_a_distance_to_a_face_an_edge_and_a_corner():
    distance = MeshDistance(as_mesh(trimesh.creation.box([1, 1, 1])))
    points = torch.tensor([[0.8, 0.1, 0.2], [0.8, 0.9, 0], [0.8, 0.8, 0.8], [0.4, 0, 0.1]])
    torch.testing.assert_close(distance(points), torch.tensor([0.3, 0.5, 0.27**0.5, -0.1]))


def test_points_are_taken_a_few_at_a_time_and_progress_is_told(monkeypatch):
    distance, points, told = MeshDistance(as_mesh(ball())), points_in_cube(250), []
    whole = distance(points)
    monkeypatch.setattr(signed_distance, "CHUNK", 100)
    assert torch.equal(distance(points, progress=lambda done, total: told.append((done, total))), whole)
    assert told == [(100, 250), (200, 250), (250, 250)]


def test_a_hole_is_closed_and_said_so():
    part = ball(0.5, subdivisions=4)
    part.update_faces(part.triangles_center[:, 2] < 0.42)
    with pytest.warns(UserWarning, match=r"not watertight: \d\.\d % of the edges .* a guess at \d\.\d % of the points"):
        distance = MeshDistance(as_mesh(part))
    points = points_in_cube(5000)
    sure = (points[:, 2] < 0.3) & (SphereDistance(0.5)(points).abs() > 0.01)
    assert torch.equal((distance(points) < 0)[sure], (SphereDistance(0.5)(points) < 0)[sure])
    assert len(distance.notes) == 1


def test_a_mesh_turned_inside_out_has_the_same_distance():
    with pytest.warns(UserWarning, match="inside-out: its faces look inward; it was turned over"):
        turned = MeshDistance(as_mesh(ball(inward=True)))
    assert len(turned.notes) == 1
    torch.testing.assert_close(turned(points_in_cube(500)), MeshDistance(as_mesh(ball()))(points_in_cube(500)))


def test_a_part_turned_inside_out_counts_as_inside():
    both = trimesh.util.concatenate([ball(0.4, (-0.5, 0, 0)), ball(0.2, (0.5, 0, 0), inward=True)])
    with pytest.warns(UserWarning, match=r"partly inside-out: \d+\.\d % of the inside"):
        distance = MeshDistance(as_mesh(both))
    assert (distance(torch.tensor([[-0.5, 0, 0], [0.5, 0, 0]])) < 0).all()


@pytest.mark.parametrize("second", [ball(0.4, (0.3, 0, 0)), ball(0.2)], ids=["overlapping", "nested"])
def test_parts_that_overlap_count_once(second):
    with pytest.warns(UserWarning, match="intersects itself or has parts within parts"):
        distance = MeshDistance(as_mesh(trimesh.util.concatenate([ball(0.4), second])))
    assert (distance(torch.tensor([[0.15, 0, 0], [-0.3, 0, 0]])) < 0).all() and len(distance.notes) == 1


def test_a_hollow_is_outside():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance = MeshDistance(as_mesh(trimesh.util.concatenate([ball(0.5), ball(0.3, inward=True)])))
    assert (distance(torch.tensor([[0.0, 0, 0], [0.4, 0, 0], [0.6, 0, 0]])) < 0).tolist() == [False, True, False]


def test_the_teapot_is_known_to_be_open():
    distance = quiet(normalize(load_mesh("builtin:teapot")))
    assert any("not watertight" in note for note in distance.notes)
    assert distance(torch.zeros(1, 3)) < -0.1


# ---------------------------------------------------------------------------------------------------------- samples of a surface


def test_samples_of_a_surface_are_spread_by_area():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 3]])
    mesh = TriangleMesh(vertices, torch.tensor([[0, 1, 2], [0, 1, 1], [0, 2, 3]]))  # areas 0.5, 0, 1.5
    points, faces, weights = sample_surface(mesh, 40_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(faces, minlength=3) / len(faces)
    torch.testing.assert_close(shares, torch.tensor([0.25, 0, 0.75]), rtol=0, atol=0.01)
    torch.testing.assert_close(points, (vertices[mesh.faces[faces]] * weights[:, :, None]).sum(1))
    torch.testing.assert_close(weights.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.005)
    torch.testing.assert_close(weights.var(0), torch.full((3,), 1 / 18), rtol=0, atol=0.002)  # of an even spread


# ---------------------------------------------------------------------------------------------------------- the config's spelling


def test_defaults_and_sizes_of_the_initial_shapes():
    origin = torch.zeros(1, 3)
    assert initial_distance("sphere")(origin).item() == -0.5
    assert initial_distance("sphere", 0.25)(origin).item() == -0.25
    radii = OmegaConf.create({"params": [0.4, 0.3, 0.6]}).params
    assert initial_distance("ellipsoid", radii)(origin).item() == pytest.approx(-0.3)
    for params, extent in ((None, 0.8), (0.5, 0.5)):
        mesh = initial_distance("mesh:builtin:bunny", params).mesh
        assert mesh.vertices.abs().max().item() == pytest.approx(extent)


def test_a_mesh_file_stands_upright_where_it_says_so(tmp_path):
    trimesh.creation.box([1, 4, 2]).export(tmp_path / "box.ply")
    assert initial_distance(f"mesh:{tmp_path / 'box.ply'}").mesh.vertices.abs().amax(0).tolist() == pytest.approx([0.2, 0.8, 0.4])
    upright = initial_distance(f"mesh:{tmp_path / 'box.ply'}", up="y")
    assert upright.mesh.vertices.abs().amax(0).tolist() == pytest.approx([0.4, 0.2, 0.8])


@pytest.mark.parametrize("shape", ["", "cube", "mesh:", "bunny", "Sphere", None])
def test_unknown_shapes_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"geometry\.shape_init: found .*, wanted sphere, ellipsoid, mesh:PATH or mesh:builtin:NAME"):
        initial_distance(shape)


@pytest.mark.parametrize("params", [0, -0.5, 0.96, float("nan"), True, "big", [0.5], [0.1, 0.2, 0.3]])
@pytest.mark.parametrize("shape", ["sphere", "mesh:builtin:bunny"])
def test_sizes_out_of_range_are_refused(shape, params):
    with pytest.raises(ValueError, match=r"geometry\.shape_init_params: found .*, wanted the .*, a number from 0\.1 to 0\.95"):
        initial_distance(shape, params)


@pytest.mark.parametrize("params", [None, 0.5, [0.5, 0.5], "abc", [0.5, 0.5, 0], [0.5, 0.5, None]])
def test_an_ellipsoid_wants_three_radii(params):
    with pytest.raises(ValueError, match=r"geometry\.shape_init_params: found .*, wanted .*(radii|radius) of the ellipsoid"):
        initial_distance("ellipsoid", params)


def test_missing_and_unknown_meshes_are_refused(tmp_path):
    with pytest.raises(MeshError, match=r"geometry\.shape_init: .*gone\.obj: no such file"):
        initial_distance(f"mesh:{tmp_path / 'gone.obj'}")
    with pytest.raises(MeshError, match=r"geometry\.shape_init: builtin:bunnny: no such bundled mesh; there are bunny"):
        initial_distance("mesh:builtin:bunnny")


@pytest.mark.parametrize(
    ("vertices", "faces", "message"),
    [
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\n", "", "want a triangle mesh"),
        ("v 0 0 0\nv 1 0 nan\nv 0 1 0\n", "f 1 2 3\n", "1 of 3 vertices have NaN or infinite coordinates"),
        ("v 1 2 3\nv 1 2 3\nv 1 2 3\n", "f 1 2 3\n", "want a mesh that has an extent"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\n", "f 1 2 3\n", "encloses nothing"),
    ],
    ids=["no faces", "NaN", "no extent", "one triangle"],
)
def test_bad_meshes_are_refused(tmp_path, vertices, faces, message):
    (tmp_path / "mesh.obj").write_text(vertices + faces)
    with pytest.raises(MeshError, match=rf"geometry\.shape_init: .*mesh\.obj: .*{message}"):
        initial_distance(f"mesh:{tmp_path / 'mesh.obj'}")


def test_five_million_faces_are_refused(tmp_path):
    count = 5_000_000
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    header += f"element face {count}\nproperty list uchar int vertex_indices\nend_header\n"
    corners = np.eye(3, dtype="<f4").tobytes()
    (tmp_path / "mesh.ply").write_bytes(header.encode() + corners + struct.pack("<Biii", 3, 0, 1, 2) * count)
    with pytest.raises(MeshError, match=r"geometry\.shape_init: .*5000000 faces, at most 1000000 are accepted; simplify the mesh"):
        initial_distance(f"mesh:{tmp_path / 'mesh.ply'}")
