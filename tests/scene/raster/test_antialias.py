"""Antialiased silhouettes: known coverage, the plain twin, and gradients against areas and finite differences of finer pictures."""

import math

import numpy as np
import pytest
import torch
import trimesh

from tests.scene.raster.scenes import OFF_SCREEN, TRIANGLE, clip_of, grid, soup, tent, torus
from threestudio_pgc.scene.adjacency import face_adjacency
from threestudio_pgc.scene.cameras import look_at_cameras
from threestudio_pgc.scene.raster import RasterError
from threestudio_pgc.scene.raster.cpu import CpuRasterizer
from threestudio_pgc.scene.raster.reference import ReferenceRasterizer

WALK, NO_WALK, TWIN = CpuRasterizer(), CpuRasterizer(walk_steps=0), ReferenceRasterizer()
SQUARE = torch.tensor([[0, 1, 2], [0, 2, 3]])


def antialiased_mask(backend, clip, faces, height, width, adjacency=None):
    """(B, H, W)."""
    rast = backend.rasterize(clip, faces, height, width)
    mask = (rast[..., 3:] > 0).to(clip.dtype)
    return backend.antialias(mask, rast, clip, faces, face_adjacency(faces) if adjacency is None else adjacency)[..., 0]


def rectangle(x0, x1, y0, y1, size):
    """Clip-space corners of a rectangle given in pixels."""
    return clip_of([[2 * x / size - 1, 2 * y / size - 1, 0, 1] for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))])


# ---------------------------------------------------------------------------------------------------------------- nothing to blend


@pytest.mark.parametrize("backend", [WALK, TWIN], ids=["cpu", "reference"])
@pytest.mark.parametrize("views, vertices, height, width", [(2, 0, 4, 6), (2, 3, 4, 6), (0, 3, 4, 6), (1, 3, 1, 1)])
def test_no_faces_leaves_the_picture_alone(backend, views, vertices, height, width):
    clip = torch.rand(views, vertices, 4, requires_grad=True)
    color = torch.rand(views, height, width, 3, requires_grad=True)
    faces = torch.zeros(0, 3, dtype=torch.int64)
    image = backend.antialias(color, torch.zeros(views, height, width, 4), clip, faces, face_adjacency(faces))
    assert torch.equal(image, color)
    image.sum().backward()
    assert torch.equal(color.grad, torch.ones_like(color)) and not clip.grad.any()


@pytest.mark.parametrize("case", OFF_SCREEN)
def test_what_is_off_screen_leaves_the_picture_alone(case):
    clip, color = clip_of(OFF_SCREEN[case]).requires_grad_(), torch.rand(1, 8, 8, 2, dtype=torch.float64)
    image = WALK.antialias(color, WALK.rasterize(clip, TRIANGLE, 8, 8), clip, TRIANGLE, face_adjacency(TRIANGLE))
    assert torch.equal(image, color)
    image.sum().backward()
    assert not clip.grad.any()


def test_a_surface_that_fills_the_picture_has_no_silhouette():
    clip = clip_of([[-5, -5, 0, 1], [5, -5, 0, 1], [5, 5, 0, 1], [-5, 5, 0, 1]])
    color = torch.rand(1, 8, 8, 3, dtype=torch.float64)
    rast = WALK.rasterize(clip, SQUARE, 8, 8)
    assert torch.equal(WALK.antialias(color, rast, clip, SQUARE, face_adjacency(SQUARE)), color)


def test_surfaces_that_cut_through_each_other_are_not_blended_where_they_meet():
    slopes = clip_of([[-5, -5, -0.9, 1], [5, -5, 0.9, 1], [5, 5, 0.9, 1], [-5, 5, -0.9, 1]])
    clip, faces = torch.cat([slopes, slopes * torch.tensor([1, 1, -1, 1])], dim=1), torch.cat([SQUARE, SQUARE + 4])
    rast, color = WALK.rasterize(clip, faces, 8, 8), torch.rand(1, 8, 8, 3, dtype=torch.float64)
    assert (rast[..., 3] > 2).any() and (rast[..., 3] <= 2).any()
    assert torch.equal(WALK.antialias(color, rast, clip, faces, face_adjacency(faces)), color)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"color": torch.zeros(1, 4, 4)}, r"got \(1, 4, 4\), \(1, 4, 4, 4\) and \(1, 3, 4\)"),
        ({"color": torch.zeros(1, 4, 5, 2)}, r"got \(1, 4, 5, 2\)"),
        ({"color": torch.zeros(1, 4, 4, 2, dtype=torch.float16)}, "color: want float32 or float64, got torch.float16"),
        ({"clip": torch.zeros(2, 3, 4)}, r"and \(2, 3, 4\)"),
        ({"faces": TRIANGLE + 1}, r"indices 1\.\.3 do not fit 3 vertices"),
        ({"rast": torch.full((1, 4, 4, 4), 2.0)}, "rast: names triangle 1, but there are 1 faces"),
        ({"adjacency": torch.zeros(2, 3, dtype=torch.int32)}, r"adjacency: want integers of shape \(1, 3\)"),
        ({"adjacency": torch.ones(1, 3, dtype=torch.int32)}, r"adjacency: triangles 1\.\.1 do not fit 1 faces"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    arguments = {
        "color": torch.zeros(1, 4, 4, 2),
        "rast": torch.zeros(1, 4, 4, 4),
        "clip": torch.zeros(1, 3, 4),
        "faces": TRIANGLE,
        "adjacency": face_adjacency(TRIANGLE),
    }
    with pytest.raises(RasterError, match=message):
        WALK.antialias(**(arguments | change))


# ---------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("backend", [WALK, TWIN], ids=["cpu", "reference"])
def test_the_outline_of_a_rectangle_takes_the_covered_share(backend):
    """Pixel 2 loses its left quarter and row 1 gains a quarter; column 5 gains 0.4; the lower edge lies between two rows."""
    mask = antialiased_mask(backend, rectangle(2.25, 5.4, 1.75, 6.0, 8), SQUARE, 8, 8)[0]
    across = torch.tensor([0, 0, 0.75, 1, 1, 0.4, 0, 0], dtype=torch.float64)
    above = torch.tensor([0, 0, 0.25, 0.25, 0.25, 0, 0, 0], dtype=torch.float64)
    empty = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(mask, torch.stack([empty, above, across, across, across, across, empty, empty]))


def test_colours_are_mixed_from_the_two_sides_of_the_edge():
    clip = rectangle(2.25, 4.4, -9, 20, 8)
    rast = WALK.rasterize(clip, SQUARE, 8, 8)
    color = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = WALK.antialias(color, rast, clip, SQUARE, face_adjacency(SQUARE))
    expected = color.clone()
    expected[:, :, 2] = 0.75 * color[:, :, 2] + 0.25 * color[:, :, 1]
    expected[:, :, 4] = 0.6 * color[:, :, 4] + 0.4 * color[:, :, 3]
    torch.testing.assert_close(image, expected)


def test_the_nearer_surface_has_the_edge():
    """A near strip before a far wall that itself ends elsewhere: only the strip's outline is blended."""
    near, far = rectangle(2.25, 4.4, -9, 20, 8), rectangle(-20, 30, -20, 30, 8) + torch.tensor([0, 0, 0.5, 0])
    for order in ((near, far), (far, near)):
        clip, faces = torch.cat(order, dim=1), torch.cat([SQUARE, SQUARE + 4])
        shade = torch.where(WALK.rasterize(clip, faces, 8, 8)[..., 2:3] < 0.25, 1.0, 0.0).double()
        rast = WALK.rasterize(clip, faces, 8, 8)
        image = WALK.antialias(shade, rast, clip, faces, face_adjacency(faces))[0, 3, :, 0]
        torch.testing.assert_close(image, torch.tensor([0, 0, 0.75, 1, 0.4, 0, 0, 0], dtype=torch.float64))


def test_an_edge_beyond_many_small_triangles_is_found_by_the_walk_alone():
    """A sheet in columns of 1/20 pixel, whose last one ends at 4.4 of 8 pixels: some 18 triangles from the centre of pixel 3."""
    x = torch.linspace(-1, 4.4, 109, dtype=torch.float64) / 4 - 1
    y = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    points = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 2)
    clip = torch.cat([points, torch.zeros_like(points[:, :1]), torch.ones_like(points[:, :1])], dim=-1)[None]
    faces = grid(2, 109, closed=False)
    covered = torch.tensor([1, 1, 1, 1, 0.4, 0, 0, 0], dtype=torch.float64).expand(8, 8)
    for backend in (WALK, TWIN):
        torch.testing.assert_close(antialiased_mask(backend, clip, faces, 8, 8)[0], covered)
    for steps in (0, 10):
        assert torch.equal(antialiased_mask(CpuRasterizer(steps), clip, faces, 8, 8)[0], covered.floor())


def test_a_speck_takes_no_more_than_all_of_its_surroundings():
    """A square of 0.2 pixels around a pixel's centre: its four edges give weights of 0.4 each, 1.6 in all."""
    mask = antialiased_mask(WALK, rectangle(3.4, 3.6, 3.4, 3.6, 8), SQUARE, 8, 8)
    assert mask.min() >= 0 and mask.max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed, triangles, spread", [(0, 40, 2.0), (1, 300, 0.4), (2, 3000, 0.03)])
def test_no_colour_leaves_the_range_of_the_picture(seed, triangles, spread, dtype):
    clip, faces = soup(seed, triangles, spread, dtype)
    rast = WALK.rasterize(clip, faces, 37, 53)
    color = torch.rand(2, 37, 53, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    image = WALK.antialias(color, rast, clip, faces, face_adjacency(faces))
    assert image.dtype == dtype and (image != color).any()
    rounding = 4 * torch.finfo(dtype).eps
    assert image.min() >= color.min() - rounding and image.max() <= color.max() + rounding


# ---------------------------------------------------------------------------------------------------------------- twins


def torus_in_view(triangles, distance):
    vertices, faces = torus(triangles)
    return look_at_cameras([40.0, 10.0], [30.0, 80.0], distance, 0.93).clip(vertices), faces


SCENES = {
    "large soup": lambda: soup(0, 40, 2.0),
    "soup": lambda: soup(1, 300, 0.4),
    "soup below a pixel": lambda: soup(2, 3000, 0.03),
    "tent across w = 0": tent,
    "coarse torus": lambda: torus_in_view(200, 2.25),
    "fine torus": lambda: torus_in_view(20_000, 2.25),
    "torus around the eye": lambda: torus_in_view(2000, 0.6),
}


@pytest.mark.parametrize("steps", [64, 3, 0])
@pytest.mark.parametrize("scene", SCENES)
def test_equals_the_plain_twin_in_values_and_gradients(scene, steps):
    clip, faces = SCENES[scene]()
    adjacency, rast = face_adjacency(faces), WALK.rasterize(clip, faces, 37, 53)
    generator = torch.Generator().manual_seed(3)
    color, weights = (torch.rand(2, 37, 53, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    found = []
    for backend in (CpuRasterizer(steps), ReferenceRasterizer(steps)):
        positions, picture = clip.clone().requires_grad_(), color.clone().requires_grad_()
        image = backend.antialias(picture, rast, positions, faces, adjacency)
        (image * weights).sum().backward()
        found.append((image.detach(), positions.grad, picture.grad))
    assert (found[0][0] != color).any()
    for ours, twin in zip(*found):
        assert twin.abs().max() > 0.1
        torch.testing.assert_close(ours, twin, rtol=1e-9, atol=1e-12 * float(twin.abs().max()))


def test_int32_faces_strided_input_and_views_together_change_nothing():
    clip, faces = torus_in_view(2000, 2.25)
    adjacency, rast = face_adjacency(faces), WALK.rasterize(clip, faces, 20, 24)
    color = torch.rand(2, 3, 20, 24, dtype=torch.float64)
    expected = WALK.antialias(color.permute(0, 2, 3, 1).contiguous(), rast, clip, faces, adjacency)
    assert torch.equal(expected, WALK.antialias(color.permute(0, 2, 3, 1), rast, clip, faces.int(), adjacency.long()))
    for i in range(2):
        alone = WALK.antialias(color.permute(0, 2, 3, 1)[i : i + 1], rast[i : i + 1], clip[i : i + 1], faces, adjacency)
        assert torch.equal(expected[i : i + 1], alone)


# ---------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("scene", ["tent", "specks", "torus"])
def test_gradcheck(scene):
    """With the visible triangles held, among them one that crosses w = 0, and pixels whose weights are scaled down."""
    if scene == "tent":
        clip, faces = tent()
    elif scene == "specks":
        clip, faces = rectangle(3.38, 3.61, 3.39, 3.64, 8), SQUARE
    else:
        clip, faces = torus_in_view(60, 2.25)
    adjacency, rast = face_adjacency(faces), WALK.rasterize(clip, faces, 8, 8)
    color = torch.rand(len(clip), 8, 8, 2, generator=torch.Generator().manual_seed(14), dtype=torch.float64)

    def picture(color, clip):
        return WALK.antialias(color, rast, clip, faces, adjacency)

    assert (picture(color, clip) != color).any()
    assert torch.autograd.gradcheck(picture, (color.requires_grad_(), clip.requires_grad_()), atol=1e-7)


def test_z_carries_no_gradient():
    clip, faces = torus_in_view(200, 2.25)
    clip.requires_grad_()
    antialiased_mask(WALK, clip, faces, 16, 16).sum().backward()
    assert clip.grad[..., [0, 1, 3]].abs().max() > 0.1 and not clip.grad[..., 2].any()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", range(4))
def test_a_triangle_grows_as_its_area_does(seed):
    """d(sum of the mask)/d(corners) against the derivative of the projected area, in pixels; here no walk is needed."""
    corners = torch.tensor([[-0.7, -0.6], [0.65, -0.35], [-0.1, 0.75]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    corners = corners + 0.1 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
    w = 0.5 + 2 * torch.rand(3, 1, generator=generator, dtype=torch.float64)
    clip = torch.cat([corners * w, 0 * w, w], dim=-1)[None].requires_grad_()
    size = 256
    screen = (clip[0, :, :2] / clip[0, :, 3:]) * size / 2
    (a, b), (c, d) = screen[1] - screen[0], screen[2] - screen[0]
    (area,) = torch.autograd.grad((a * d - b * c) / 2, clip)
    for backend in (WALK, NO_WALK):
        (found,) = torch.autograd.grad(antialiased_mask(backend, clip, TRIANGLE, size, size).sum(), clip)
        assert error(found, area) < 0.02


def hull_moments(clip: torch.Tensor, size: int) -> np.ndarray:
    """Area and integral of x over the outline of a convex body, in pixels: exact."""
    from scipy.spatial import ConvexHull

    points = ((clip[0, :, :2] / clip[0, :, 3:] * 0.5 + 0.5) * size).numpy()
    here = points[ConvexHull(points).vertices]
    after = np.roll(here, -1, axis=0)
    doubled = here[:, 0] * after[:, 1] - after[:, 0] * here[:, 1]
    return np.array([doubled.sum() / 2, ((here[:, 0] + after[:, 0]) * doubled).sum() / 6])


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("subdivisions", [3, 5, 6])
@pytest.mark.parametrize("perspective", [False, True], ids=["orthographic", "perspective"])
def test_a_sphere_grows_and_moves_as_its_outline_does(subdivisions, perspective, size):
    """1280, 20480 and 81920 triangles."""
    ball = trimesh.creation.icosphere(subdivisions)
    vertices, faces = torch.from_numpy(np.array(ball.vertices)), torch.from_numpy(ball.faces)
    camera = look_at_cameras(25.0, 40.0, 2.5, 0.85)

    def view(radius, shift):
        points = radius * vertices + shift * torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)
        if perspective:
            return camera.clip(points)
        points = points @ camera.c2w[0, :3, :3].double()
        return torch.stack([points[:, 0], -points[:, 1], -0.5 * points[:, 2], torch.ones_like(points[:, 0])], dim=-1)[None]

    at, step = torch.tensor([0.6, 0.01], dtype=torch.float64), 1e-4
    growth = (hull_moments(view(0.6 + step, 0.01), size) - hull_moments(view(0.6 - step, 0.01), size))[0] / (2 * step)
    motion = (hull_moments(view(0.6, 0.01 + step), size) - hull_moments(view(0.6, 0.01 - step), size))[1] / (2 * step)
    column = torch.arange(size, dtype=torch.float64) + 0.5
    errors = []
    for backend in (WALK, NO_WALK):
        parameters = at.clone().requires_grad_()
        mask = antialiased_mask(backend, view(*parameters), faces, size, size, face_adjacency(faces))[0]
        by_radius = torch.autograd.grad(mask.sum(), parameters, retain_graph=True)[0][0]
        by_shift = torch.autograd.grad((mask * column).sum(), parameters)[0][1]
        errors.append((abs(float(by_radius / growth) - 1), abs(float(by_shift / motion) - 1)))
    (radius, shift), (radius_lost, shift_lost) = errors
    assert radius < 0.015 and shift < 0.04
    assert min(radius_lost, shift_lost) > (0.9 if subdivisions > 3 else 0.5)


@pytest.mark.parametrize("degrees", [3.0, 20.0, 37.0])
def test_sides_seen_exactly_edge_on_do_not_hide_the_silhouette(degrees):
    """A finely divided cube seen along its axis: between front and back lie triangles whose area is zero but for rounding."""
    cube = trimesh.creation.box((0.8, 0.8, 0.8))
    for _ in range(4):
        cube = cube.subdivide()
    vertices, faces = torch.from_numpy(np.array(cube.vertices)), torch.from_numpy(cube.faces)
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]], dtype=torch.float64)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    points = vertices @ turn.T * scale
    clip = torch.cat([points, torch.ones_like(points[:, :1])], dim=-1)[None]
    size = 512  # the corners cost about a row of pixels per side
    antialiased_mask(WALK, clip, faces, size, size).sum().backward()
    assert float(scale.grad) == pytest.approx(2 * (0.8 * size / 2) ** 2, rel=0.01)


def turned(axis: int, angle: torch.Tensor) -> torch.Tensor:
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    c, s = angle.cos(), angle.sin()
    rows = [[one, zero, zero], [zero, c, -s], [zero, s, c]] if axis == 0 else [[c, zero, s], [zero, one, zero], [-s, zero, c]]
    return torch.stack([torch.stack(row) for row in rows])


def torus_picture(triangles: int):
    """(backend or none, parameters (5,), size) -> weighted sum over the picture of a coloured torus that hides parts of itself.

    The parameters: two turns, two shifts, a scale. Without a backend the picture is not antialiased.
    """
    vertices, faces = torus(triangles)
    adjacency, camera = face_adjacency(faces), look_at_cameras(30.0, 25.0, 2.4, 0.85)
    waves = torch.tensor([[3.0, 1, 5], [2, 7, 1], [4, 2, 3]], dtype=torch.float64)
    colors = 0.5 + 0.5 * (vertices @ waves).sin()
    amplitudes = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def total(backend, q, size):
        points = vertices @ (turned(0, 0.3 + q[0]) @ turned(1, 0.7 + q[1])).T * (1 + q[4])
        clip = camera.clip(points + torch.stack([torch.zeros_like(q[0]), q[2], q[3]]))
        rast = WALK.rasterize(clip, faces, size, size)
        image = WALK.interpolate(colors, rast, faces)
        if backend is not None:
            image = backend.antialias(image, rast, clip, faces, adjacency)
        waves = ((torch.arange(size) + 0.5) / size * math.pi * torch.arange(3.0).double()[:, None]).cos()
        weights = torch.einsum("cij,iy,jx->yxc", amplitudes, waves, waves)
        return (image * weights).sum() / size**2

    return total


@pytest.mark.parametrize("triangles", [2000, 20_000, 100_000])
def test_a_coloured_torus_that_hides_itself_against_differences_of_a_finer_picture(triangles):
    total, fine, step = torus_picture(triangles), 1024, 0.01
    shifts = step * torch.eye(5, dtype=torch.float64)
    expected = torch.stack([(total(None, shift, fine) - total(None, -shift, fine)) / (2 * step) for shift in shifts])
    for size in (128, 256):
        errors = []
        for backend in (WALK, NO_WALK, None):
            parameters = torch.zeros(5, dtype=torch.float64, requires_grad=True)
            errors.append(error(torch.autograd.grad(total(backend, parameters, size), parameters)[0], expected))
        walk, no_walk, hard = errors
        assert walk < 0.06
        assert no_walk > 0.15 if triangles == 2000 else no_walk > 0.6
        assert hard > 0.6


# ---------------------------------------------------------------------------------------------------------------- bad meshes


def test_an_open_sheet_ends_at_its_border():
    """A wavy open sheet seen from above; without folds its area is that of its border's polygon."""
    x, y = torch.meshgrid(*(torch.linspace(-0.8, 0.8, 81, dtype=torch.float64) for _ in range(2)), indexing="ij")
    x, y = x + 0.05 * (9 * y).sin(), y + 0.03 * (7 * x).cos()
    faces, scale = grid(81, 81, closed=False), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    clip = torch.stack([x, y, 0.1 * x * y, torch.ones_like(x)], dim=-1).reshape(1, -1, 4)
    grown = torch.cat([clip[..., :2] * scale, clip[..., 2:]], dim=-1)
    mask = antialiased_mask(WALK, grown, faces, 96, 96)
    mask.sum().backward()
    assert float(scale.grad) == pytest.approx(2 * float(mask.detach().sum()), rel=0.01)
    assert 0.5 < float(mask.detach().mean()) < 0.7


@pytest.mark.parametrize("share", [0.002, 0.2])
def test_vertices_that_are_not_finite_cost_their_surroundings_only(share):
    clip, faces = torus_in_view(20_000, 2.25)
    expected = antialiased_mask(WALK, clip, faces, 64, 64)
    broken = torch.rand(clip.shape[1], generator=torch.Generator().manual_seed(0)) < share
    values = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float64)
    clip[:, broken] = values[torch.arange(int(broken.sum())) % 3][:, None]
    clip.requires_grad_()
    mask = antialiased_mask(WALK, clip, faces, 64, 64)
    mask.sum().backward()
    assert mask.min() >= 0 and mask.max() <= 1 and clip.grad.isfinite().all() and clip.grad[:, ~broken].any()
    if share < 0.1:
        assert (mask - expected).abs().mean() < 0.05


def test_an_adjacency_of_another_mesh_does_not_crash():
    clip, faces = torus_in_view(2000, 2.25)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randint(-1, len(faces), faces.shape, generator=generator).int()
    clip.requires_grad_()
    mask = antialiased_mask(WALK, clip, faces, 48, 48, wrong)
    mask.sum().backward()
    assert mask.isfinite().all() and clip.grad.isfinite().all()
