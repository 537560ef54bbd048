"""Control images of meshes known in closed form, rendered by the real CPU rasteriser: the right way round, in every convention."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from threestudio_pgc.diffusion.control import CONTROL_KINDS, FAR_END, NORMAL_CONVENTIONS, make_control
from threestudio_pgc.scene.cameras import fovy_from_focal, look_at_cameras, orbit_cameras
from threestudio_pgc.scene.gbuffer import render_gbuffer
from threestudio_pgc.scene.mesh import TriangleMesh, load_mesh, normalize
from threestudio_pgc.scene.raster.cpu import CpuRasterizer

CPU = CpuRasterizer()
FOCAL_ONE = fovy_from_focal(1.0)
FRONT = look_at_cameras(0, 0, 2.0, FOCAL_ONE)  # stands on +x: +y is to its right, +z up
EVERY_CONVENTION = pytest.mark.parametrize("convention", NORMAL_CONVENTIONS)
EVERY_IMAGE = pytest.mark.parametrize("kind,convention", [("depth", "opengl"), *(("normal", name) for name in NORMAL_CONVENTIONS)])


def quads(corners):
    """Quads (Q, 4, 3), counter-clockwise seen from outside, that share no vertices, so that each is shaded flat."""
    vertices = torch.tensor(corners).reshape(-1, 3)
    first = 4 * torch.arange(len(corners))[:, None]
    return TriangleMesh(vertices, torch.cat([first + torch.tensor([0, 1, 2]), first + torch.tensor([0, 2, 3])]))


def facing_plate(x, left, right, bottom, top):
    """Corners of a rectangle at a given x that faces +x; `left` and `right` are y as the front camera sees it."""
    return [[x, left, bottom], [x, right, bottom], [x, right, top], [x, left, top]]


def stairs():
    """An L of three plates, one behind the other: the near one bottom left, the middle one bottom right, the far one top left."""
    near, middle = facing_plate(0.4, -0.5, 0.0, -0.5, 0.0), facing_plate(0.1, 0.0, 0.5, -0.5, 0.0)
    return quads([near, middle, facing_plate(-0.2, -0.5, 0.0, 0.0, 0.5)])


def tilted(right_deg, up_deg):
    """A square larger than the picture that faces +x turned by `right_deg` to the front camera's right, or by `up_deg` upwards."""
    right, up = math.radians(right_deg), math.radians(up_deg)
    across, along = (-math.sin(right), math.cos(right), 0.0), (-math.sin(up), 0.0, math.cos(up))
    return quads([[[3 * (s * a + t * b) for a, b in zip(across, along)] for s, t in ((-1, -1), (1, -1), (1, 1), (-1, 1))]])


def wedge():
    """A roof's two slopes and its gable: faces to the upper left, to the upper right and to the front, seen from +x and above."""
    ridge, left, right = ([-0.6, 0.1, 0.4], [0.5, 0.1, 0.4]), ([-0.6, -0.6, -0.3], [0.5, -0.6, -0.3]), ([-0.6, 0.5, -0.2], [0.5, 0.5, -0.2])
    slopes = [[left[0], left[1], ridge[1], ridge[0]], [ridge[0], ridge[1], right[1], right[0]]]
    return quads([*slopes, [left[1], right[1], ridge[1], ridge[1]]])


def turned(mesh, degrees):
    """The mesh turned about the world's z axis, as the azimuth grows."""
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    return replace(mesh, vertices=mesh.vertices @ turn.T)


def rendered(mesh, cameras, size=48):
    return vars(render_gbuffer(mesh, cameras, size, size, CPU))


def control_of(mesh, cameras, kind, convention="opengl", size=48):
    return make_control(kind, rendered(mesh, cameras, size), normal_convention=convention)


def at(picture, across, down):
    """Colour at shares of the picture's width and height, from its top left."""
    height, width, _ = picture.shape
    return picture[int(down * height), int(across * width)]


def levels(picture):
    return sorted({round(value, 4) for value in picture.flatten().tolist()})


@EVERY_IMAGE
def test_nothing_to_see_is_all_background(kind, convention):
    nothing = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    background = torch.zeros(3) if kind == "depth" else torch.tensor(NORMAL_CONVENTIONS[convention].background)
    for mesh in (nothing, quads([facing_plate(50.0, -1, 1, -1, 1)])):
        assert torch.equal(control_of(mesh, FRONT, kind, convention, 8), background.expand(1, 8, 8, 3))


def test_depth_is_linear_between_the_nearest_and_the_farthest_and_the_right_way_round():
    picture = control_of(stairs(), FRONT, "depth")[0]
    assert_close(at(picture, 0.35, 0.65), torch.ones(3))  # 1.6 away
    assert_close(at(picture, 0.6, 0.6), torch.full((3,), 0.6))  # 1.9 away, half between
    assert_close(at(picture, 0.4, 0.4), torch.full((3,), FAR_END))  # 2.2 away
    assert not at(picture, 0.6, 0.4).any()
    assert picture.min() == 0 and picture.max() == 1
    assert levels(picture) == [0.0, FAR_END, 0.6, 1.0]


def test_depth_does_not_change_with_the_distance_of_the_camera():
    near, far = (control_of(stairs(), look_at_cameras(0, 0, distance, FOCAL_ONE), "depth", size=64)[0] for distance in (1.5, 6.0))
    assert levels(near) == levels(far) == [0.0, FAR_END, 0.6, 1.0]


@EVERY_CONVENTION
def test_a_plane_that_faces_plus_x_faces_the_viewer_at_azimuth_0(convention):
    picture = control_of(tilted(0, 0), FRONT, "normal", convention)
    assert torch.equal(picture, torch.tensor([0.5, 0.5, 1.0]).expand(1, 48, 48, 3))


@EVERY_CONVENTION
@pytest.mark.parametrize("degrees", [-40, -15, 10, 45])
def test_a_plane_turned_to_the_right_or_up_has_the_colour_of_its_angle(convention, degrees):
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    red = (1 + sine) / 2 if convention == "opengl" else (1 - sine) / 2
    to_the_right, upwards = (control_of(tilted(*angles), FRONT, "normal", convention) for angles in ((degrees, 0), (0, degrees)))
    assert_close(to_the_right, torch.tensor([red, 0.5, (1 + cosine) / 2]).expand(1, 48, 48, 3), rtol=0, atol=1e-6)
    assert_close(upwards, torch.tensor([0.5, (1 + sine) / 2, (1 + cosine) / 2]).expand(1, 48, 48, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("convention,sign", [("opengl", 1), ("normalbae", -1), ("midas", -1)])
def test_the_frame_of_the_colours_is_right_handed_where_red_is_right(convention, sign):
    colors = [control_of(tilted(*angles), FRONT, "normal", convention)[0, 24, 24] for angles in ((40, 0), (0, 40), (0, 0))]
    assert float(torch.linalg.det(2 * torch.stack(colors) - 1)) == pytest.approx(sign * math.sin(math.radians(40)) ** 2, abs=1e-5)


@EVERY_CONVENTION
def test_the_sides_of_a_wedge_have_the_colours_of_where_they_face(convention):
    """The left slope is left of the right one in the picture, whatever red means; both rise, and the gable faces the viewer."""
    picture = control_of(wedge(), look_at_cameras(35.0, 0.0, 2.5, FOCAL_ONE), "normal", convention, 64)[0]
    left, right = at(picture, 0.4, 0.4), at(picture, 0.6, 0.4)
    assert (left[0] < 0.3 and right[0] > 0.7) == (convention == "opengl")
    assert (left[0] > 0.7 and right[0] < 0.3) == (convention != "opengl")
    assert left[1] > 0.7 and right[1] > 0.7
    down = math.sin(math.radians(35))  # the camera looks down on the gable, which is upright
    assert_close(at(picture, 0.5, 0.6), torch.tensor([0.5, (1 - down) / 2, (1 + math.cos(math.radians(35))) / 2]), rtol=0, atol=1e-5)


@EVERY_IMAGE
@pytest.mark.parametrize("mesh", ["wedge", "lettered"])
def test_turning_camera_and_mesh_together_changes_nothing(kind, convention, mesh):
    mesh = wedge() if mesh == "wedge" else normalize(load_mesh("builtin:lettered"))
    still = control_of(mesh, look_at_cameras(20.0, 15.0, 2.25, FOCAL_ONE), kind, convention)
    camera = look_at_cameras(20.0, 15.0 + 77.0, 2.25, FOCAL_ONE)
    both = control_of(turned(mesh, 77.0), camera, kind, convention)
    differs = ((still - both).abs() > 1e-3).any(dim=-1)
    assert differs.float().mean() < 0.005  # pixels whose centre rounding moved across an edge
    only_the_camera = control_of(mesh, camera, kind, convention)
    assert ((still - only_the_camera).abs() > 0.05).any(dim=-1).float().mean() > 0.05


@EVERY_CONVENTION
def test_a_wall_seen_from_aside_has_the_analytic_red(convention):
    """The plaque's back faces -x; a camera 30 degrees further round than behind it has it facing to its left by 30 degrees."""
    mesh = normalize(load_mesh("builtin:lettered"))
    picture = control_of(mesh, look_at_cameras(0.0, 210.0, 2.25, FOCAL_ONE), "normal", convention, 96)[0]
    red = 0.25 if convention == "opengl" else 0.75
    wanted = torch.tensor([red, 0.5, (1 + math.cos(math.radians(30))) / 2])
    assert_close(picture[48, 40:60].median(dim=0).values, wanted, rtol=0, atol=1e-4)


def test_the_letters_of_the_depth_image_read_from_left_to_right():
    """From the front the raised letters are the nearest of all, hence white."""
    picture = control_of(normalize(load_mesh("builtin:lettered")), look_at_cameras(0, 0, 2.25, FOCAL_ONE), "depth", size=192)[0]
    white = picture[..., 0] > 0.999
    rows, columns = white.nonzero(as_tuple=True)
    across = (columns.min() + (columns.max() + 1 - columns.min()) * (torch.arange(17) + 0.5) / 17).long()
    down = (rows.min() + (rows.max() + 1 - rows.min()) * (torch.arange(7) + 0.5) / 7).long()
    assert ["".join(".X"[int(white[r, c])] for c in across) for r in down] == [
        "XXXXX.XXXXX.XXXXX",
        "X...X.X.....X....",
        "X...X.X.....X....",
        "XXXXX.X.XXX.X....",
        "X.....X...X.X....",
        "X.....X...X.X....",
        "X.....XXXXX.XXXXX",
    ]


@EVERY_CONVENTION
def test_the_edges_of_the_plaque_face_outwards(convention):
    """Smooth shading turns the normals at the plaque's left edge to the left and at its right edge to the right, seen from the front."""
    mesh = normalize(load_mesh("builtin:lettered"))
    buffers = rendered(mesh, look_at_cameras(0, 0, 2.25, FOCAL_ONE), 192)
    picture = make_control("normal", buffers, normal_convention=convention)[0]
    columns = (buffers["opacity"][0, 96, :, 0] > 0.5).nonzero().flatten()
    left, right = float(picture[96, columns[0], 0]), float(picture[96, columns[-1], 0])
    assert (left < 0.4 and right > 0.6) if convention == "opengl" else (left > 0.6 and right < 0.4)


@EVERY_CONVENTION
def test_every_pixel_is_the_colour_of_a_unit_vector(convention):
    """Silhouettes too, which the mesh covers in part: no mixture of object and background."""
    buffers = rendered(normalize(load_mesh("builtin:lettered")), orbit_cameras(3), 64)
    partly = (buffers["opacity"] > 0) & (buffers["opacity"] < 1)
    assert partly.any()
    length = (2 * make_control("normal", buffers, normal_convention=convention) - 1).norm(dim=-1)
    assert_close(length, torch.ones_like(length), rtol=0, atol=1e-5)


def test_depth_and_normals_agree_on_what_the_object_is():
    buffers = rendered(wedge(), orbit_cameras(4, elevation_deg=35.0), 64)
    inside = (buffers["opacity"] > 0.5)[..., 0]
    assert 0.02 < inside.float().mean() < 0.9
    depth, normal = (make_control(kind, buffers) for kind in CONTROL_KINDS)
    assert torch.equal(depth[..., 0] >= FAR_END, inside) and torch.equal(depth[..., 0] > 0, inside)
    background = torch.tensor(NORMAL_CONVENTIONS["opengl"].background)
    assert not ((normal != background).any(dim=-1) & ~inside).any()


@EVERY_IMAGE
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_view_does_not_depend_on_the_others_of_its_batch(kind, convention, batch):
    mesh, cameras = wedge(), look_at_cameras(25.0, torch.arange(batch) * 50.0, 1.8 + torch.arange(batch), FOCAL_ONE)
    together = control_of(mesh, cameras, kind, convention, 32)
    assert together.shape == (batch, 32, 32, 3) and together.min() >= 0 and together.max() <= 1
    for view in range(batch):
        assert torch.equal(together[view], control_of(mesh, cameras[view], kind, convention, 32)[0])


@EVERY_IMAGE
def test_no_graph_leads_back_to_the_vertices(kind, convention):
    mesh = wedge()
    mesh.vertices.requires_grad_()
    buffers = rendered(mesh, FRONT, 16)
    assert buffers["depth"].requires_grad and buffers["view_normal"].requires_grad
    assert not make_control(kind, buffers, normal_convention=convention).requires_grad
