"""The CPU rasteriser against exact expectations, its plain torch twin, embree's rays and finite differences."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scene.raster.scenes import OFF_SCREEN, TRIANGLE, clip_of, soup, tent
from threestudio_pgc.scene.cameras import look_at_cameras, orbit_cameras
from threestudio_pgc.scene.mesh import load_mesh, normalize
from threestudio_pgc.scene.raster import RasterError, make_rasterizer
from threestudio_pgc.scene.raster.cpu import SUBPIXEL, CpuRasterizer
from threestudio_pgc.scene.raster.reference import ReferenceRasterizer

CPU, TWIN = CpuRasterizer(), ReferenceRasterizer()


# ---------------------------------------------------------------------------------------------------------------- nothing to see


@pytest.mark.parametrize("backend", [CPU, TWIN], ids=["cpu", "reference"])
@pytest.mark.parametrize("vertices", [0, 3])
def test_no_faces_gives_an_empty_picture_and_zero_gradient(backend, vertices):
    clip = torch.rand(2, vertices, 4, requires_grad=True)
    attributes = torch.rand(vertices, 5, requires_grad=True)
    faces = torch.zeros(0, 3, dtype=torch.int64)
    rast = backend.rasterize(clip, faces, 4, 6)
    image = backend.interpolate(attributes, rast, faces)
    assert rast.shape == (2, 4, 6, 4) and image.shape == (2, 4, 6, 5)
    assert not rast.any() and not image.any() and not backend.smooth_mask(clip, rast, faces).any()
    (rast.sum() + image.sum()).backward()
    assert clip.grad.shape == clip.shape and not clip.grad.any() and not attributes.grad.any()


def test_no_views():
    rast = CPU.rasterize(torch.zeros(0, 3, 4), TRIANGLE, 4, 6)
    assert rast.shape == (0, 4, 6, 4)
    assert CPU.interpolate(torch.zeros(3, 2), rast, TRIANGLE).shape == (0, 4, 6, 2)
    assert CPU.smooth_mask(torch.zeros(0, 3, 4), rast, TRIANGLE).shape == (0, 4, 6, 1)


@pytest.mark.parametrize("case", OFF_SCREEN)
def test_what_is_off_screen_or_no_triangle_is_not_drawn(case):
    clip = clip_of(OFF_SCREEN[case])
    for backend in (CPU, TWIN):
        rast = backend.rasterize(clip, TRIANGLE, 8, 8)
        assert not rast.any()
        assert not backend.smooth_mask(clip, rast, TRIANGLE).any()


@pytest.mark.parametrize(
    "clip, faces, size, message",
    [
        (torch.zeros(3, 4), TRIANGLE, (4, 4), r"clip: want shape \(B, V, 4\), got \(3, 4\)"),
        (torch.zeros(1, 3, 4, dtype=torch.float16), TRIANGLE, (4, 4), "clip: want float32 or float64, got torch.float16"),
        (torch.zeros(1, 3, 4), TRIANGLE + 1, (4, 4), r"indices 1\.\.3 do not fit 3 vertices"),
        (torch.zeros(1, 3, 4), TRIANGLE - 1, (4, 4), r"indices -1\.\.1 do not fit 3 vertices"),
        (torch.zeros(1, 3, 4), TRIANGLE.float(), (4, 4), "faces: want int32 or int64"),
        (torch.zeros(1, 3, 4), TRIANGLE[0], (4, 4), r"faces: want shape \(F, 3\)"),
        (torch.zeros(1, 3, 4), TRIANGLE, (0, 4), "height, width: want 1..16384 pixels, got 0 x 4"),
    ],
)
def test_bad_arguments_are_refused_by_name(clip, faces, size, message):
    with pytest.raises(RasterError, match=message):
        CPU.rasterize(clip, faces, *size)


def test_interpolate_refuses_what_would_be_read_out_of_bounds():
    rast = CPU.rasterize(clip_of([[-1, -1, 0, 1], [1, -1, 0, 1], [0, 1, 0, 1]]), TRIANGLE, 4, 4)
    with pytest.raises(RasterError, match="do not fit 2 vertices"):
        CPU.interpolate(torch.zeros(2, 1), rast, TRIANGLE)
    with pytest.raises(RasterError, match="rast: names triangle 0, but there are 0 faces"):
        CPU.interpolate(torch.zeros(3, 1), rast, TRIANGLE[:0])
    with pytest.raises(RasterError, match="for 1 views"):
        CPU.interpolate(torch.zeros(2, 3, 1), rast, TRIANGLE)


def test_backends_by_name():
    assert make_rasterizer("auto", "cpu").name == "cpu"
    assert make_rasterizer("cpu", "cpu").name == "cpu"
    with pytest.raises(RasterError, match="'embree'; want one of auto, cpu, nvdiffrast"):
        make_rasterizer("embree")
    with pytest.raises(RasterError, match="wants a CUDA device, got cpu"):
        make_rasterizer("nvdiffrast", "cpu")
    assert make_rasterizer("cpu", antialias="walk").walk_steps == make_rasterizer("auto").walk_steps == 64
    with pytest.raises(RasterError, match="antialias: found 'blur', wanted one of auto, walk, nvdiffrast"):
        make_rasterizer("cpu", antialias="blur")
    with pytest.raises(RasterError, match="antialias: found 'nvdiffrast' with the cpu backend"):
        make_rasterizer("cpu", antialias="nvdiffrast")


# ---------------------------------------------------------------------------------------------------------------- coverage


def test_layout_of_one_triangle():
    # vertex 0 bottom left in y/w (row 0), the right angle of a triangle that covers half of a 4 x 4 picture
    clip = clip_of([[-1, -1, 0.5, 1], [1, -1, 0.5, 1], [-1, 1, 0.5, 1]])
    rast = CPU.rasterize(clip, TRIANGLE, 4, 4)[0]
    # the diagonal runs through pixel centres: the fill rule decides all of them alike
    covered = rast[..., 3] == 1
    assert torch.equal(covered[:3, :3], torch.tensor([[True, True, True], [True, True, False], [True, False, False]]))
    assert len({bool(covered[i, 3 - i]) for i in range(4)}) == 1
    assert rast[0, 0].tolist() == pytest.approx([0.75, 0.125, 0.5, 1])  # u, v: weights of vertices 0 and 1
    assert rast[0, 2, 1] == pytest.approx(0.625) and rast[2, 0, 1] == pytest.approx(0.125)


def adversarial_delaunay(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 2) in NDC, most of them exactly on pixel centres or corners, whose triangles tile more than the picture."""
    from scipy.spatial import Delaunay

    generator = np.random.default_rng(seed)
    on_centres = generator.integers(0, [width, height], (150, 2)) + 0.5
    on_corners = generator.integers(0, [width + 1, height + 1], (50, 2))
    anywhere = generator.uniform(0, [width, height], (50, 2))
    frame = np.array([[-2, -2], [width + 2, -2], [-2, height + 2], [width + 2, height + 2]])
    pixels = np.unique(np.concatenate([on_centres, on_corners, anywhere, frame]), axis=0)
    return pixels / [width, height] * 2 - 1, Delaunay(pixels).simplices


@pytest.mark.parametrize("seed", range(3))
def test_watertight_every_pixel_is_covered_exactly_once(seed):
    height, width = 32, 48
    points, faces = adversarial_delaunay(height, width, seed)
    generator = np.random.default_rng(seed)
    faces = np.where(generator.random((len(faces), 1)) < 0.5, faces, faces[:, ::-1])  # orientation must not matter
    w = generator.uniform(0.5, 4, (len(points), 1))
    clip = torch.from_numpy(np.concatenate([points * w, 0 * w, w], axis=1))
    times = torch.zeros(height, width)
    for start in range(0, len(faces), 64):  # each triangle as a view of its own
        group = torch.from_numpy(np.ascontiguousarray(faces[start : start + 64]))
        views = clip[group]
        times += (CPU.rasterize(views, TRIANGLE, height, width)[..., 3] > 0).sum(0)
    assert torch.equal(times, torch.ones(height, width))


@pytest.mark.parametrize("turns", range(4))
def test_an_edge_one_grid_unit_beside_a_pixel_centre(turns):
    """The shared edge passes the centre of the first pixel at an edge function of 1, the smallest there is."""
    size, half = 4, SUBPIXEL // 2
    # the edge, and an apex on each side of it
    fixed = np.array([[half - 1, half - 1], [half + 300, half + 299], [4 * half, 0], [0, 4 * half]])
    for _ in range(turns):
        fixed = np.stack([size * SUBPIXEL - fixed[:, 1], fixed[:, 0]], axis=1)
    clip = torch.from_numpy(np.column_stack([fixed / (half * size) - 1, np.zeros(4), np.ones(4)]))[None]
    first, second = ((CPU.rasterize(clip, torch.tensor([face]), size, size)[0, ..., 3] > 0) for face in ([0, 1, 2], [0, 3, 1]))
    column, row = [(0, 0), (3, 0), (3, 3), (0, 3)][turns]
    assert second[row, column] and not first[row, column]
    assert not (first & second).any()


@pytest.mark.parametrize("seed", range(3))
def test_no_hole_where_a_triangle_crosses_w_zero(seed):
    """A plane through random points that surround the eye, tiled: below the horizon everything is covered."""
    from scipy.spatial import Delaunay

    generator = np.random.default_rng(seed)
    ground = np.concatenate([generator.uniform(-3, 3, (60, 2)), [[-400, -400], [400, -400], [400, 400], [-400, 400]]])
    faces = torch.from_numpy(Delaunay(ground).simplices.astype(np.int64))
    vertices = torch.from_numpy(np.column_stack([ground, np.full(len(ground), -0.5)]))
    cameras = look_at_cameras(0.0, [10.0, 130.0, 250.0], 0.2, 1.2)
    clip = cameras.clip(vertices)
    assert (clip[..., 3] < 0).any() and (clip[..., 3] > 0).any()
    rast = CPU.rasterize(clip, faces, 64, 64)
    assert (rast[:, 33:, :, 3] > 0).all() and not rast[:, :31].any()
    twin = TWIN.rasterize(clip, faces, 64, 64)
    assert torch.equal(rast[..., 3], twin[..., 3])
    # the weights are right too: the interpolated point projects to the pixel's centre
    position = CPU.interpolate(vertices, rast, faces)[:, 33:]
    projected = torch.cat([position, torch.ones_like(position[..., :1])], dim=-1) @ cameras.mvp.double().transpose(1, 2)[:, None]
    centre = (torch.arange(64) + 0.5) / 32 - 1
    away = torch.maximum(
        (projected[..., 0] / projected[..., 3] - centre).abs(), (projected[..., 1] / projected[..., 3] - centre[33:, None]).abs()
    )
    # clamping the weights moves a point that lies just outside of a sliver along that sliver, never by a pixel
    assert away.quantile(0.99) < 1e-12 and away.max() < 2 / 64


def test_a_triangle_too_large_for_integers_is_drawn():
    big = 1e9
    clip = clip_of([[-big, -big, 0, 1], [big, -big, 0, 1], [0, big, 0, 1]])
    rast = CPU.rasterize(clip, TRIANGLE, 16, 16)
    assert (rast[..., 3] == 1).all()
    assert torch.equal(rast[..., 3], TWIN.rasterize(clip, TRIANGLE, 16, 16)[..., 3])


def test_nearest_wins_in_any_order_and_ties_go_to_the_first():
    square = [[-1, -1], [1, -1], [1, 1], [-1, 1]]
    near, far = ([[x, y, z, 1.0] for x, y in square] for z in (-0.5, 0.5))
    quad = torch.tensor([[0, 1, 2], [0, 2, 3]])
    for order in ((near, far), (far, near)):
        rast = CPU.rasterize(clip_of([*order[0], *order[1]]), torch.cat([quad, quad + 4]), 8, 8)
        assert (rast[..., 2] == -0.5).all()
    rast = CPU.rasterize(clip_of(near), torch.cat([quad, quad]), 8, 8)
    assert (rast[..., 3] <= 2).all() and (rast[..., 3] >= 1).all()


def test_both_sides_are_seen():
    clip = clip_of([[-1, -1, 0, 1], [1, -1, 0, 1], [0, 1, 0, 1]])
    front = CPU.rasterize(clip, TRIANGLE, 8, 8)[..., 3]
    assert front.any() and torch.equal(front, CPU.rasterize(clip, TRIANGLE.flip(1), 8, 8)[..., 3])


def test_near_and_far_cut_a_slope():
    # z/w runs from -2 at the left edge to 2 at the right
    clip = clip_of([[-1, -1, -2, 1], [1, -1, 2, 1], [1, 1, 2, 1], [-1, 1, -2, 1]])
    rast = CPU.rasterize(clip, torch.tensor([[0, 1, 2], [0, 2, 3]]), 8, 8)
    expected = torch.tensor([False, False, True, True, True, True, False, False]).expand(8, 8)
    assert torch.equal(rast[0, ..., 3] > 0, expected)


# ---------------------------------------------------------------------------------------------------------------- twins


SOUPS = {"large": (0, 40, 2.0), "medium": (1, 300, 0.4), "below a pixel": (2, 3000, 0.03)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SOUPS)
def test_equals_the_plain_twin(case, dtype):
    clip, faces = soup(*SOUPS[case], dtype=dtype)
    attributes = torch.rand(2, clip.shape[1], 3, generator=torch.Generator().manual_seed(3), dtype=dtype)
    ours, twin = CPU.rasterize(clip, faces, 37, 53), TWIN.rasterize(clip, faces, 37, 53)
    assert (ours[..., 3] > 0).float().mean() > 0.02
    assert torch.equal(ours[..., 3], twin[..., 3])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours, twin, rtol=0, atol=tolerance)
    torch.testing.assert_close(CPU.interpolate(attributes, ours, faces), TWIN.interpolate(attributes, ours, faces), rtol=0, atol=tolerance)
    assert torch.equal(CPU.smooth_mask(clip, ours, faces), TWIN.smooth_mask(clip, ours, faces))


def test_equals_the_plain_twin_around_the_eye():
    """Random triangles on all sides of the eye: many cross w = 0, some project far off screen."""
    generator = torch.Generator().manual_seed(5)
    clip = torch.randn(2, 240, 4, generator=generator, dtype=torch.float64)
    clip[0, :30] *= 1e7
    faces = torch.arange(240).reshape(-1, 3)
    ours, twin = CPU.rasterize(clip, faces, 24, 32), TWIN.rasterize(clip, faces, 24, 32)
    assert (ours[..., 3] > 0).float().mean() > 0.3
    assert torch.equal(ours[..., 3], twin[..., 3])
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-9)


def test_views_do_not_influence_each_other():
    clip, faces = soup(7, 50)
    together = CPU.rasterize(clip, faces, 20, 20)
    assert torch.equal(together, torch.cat([CPU.rasterize(view[None], faces, 20, 20) for view in clip]))
    shared = torch.rand(150, 4, dtype=torch.float64)
    assert torch.equal(CPU.interpolate(shared, together, faces), CPU.interpolate(shared.expand(2, -1, -1), together, faces))


def test_int32_faces_and_strided_input_change_nothing():
    clip, faces = soup(8, 50)
    expected = CPU.rasterize(clip, faces, 20, 20)
    strided = torch.stack([clip, clip], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(expected, CPU.rasterize(strided, faces.int(), 20, 20))


# ---------------------------------------------------------------------------------------------------------------- smooth mask


def test_smooth_mask_is_the_covered_share():
    # a rectangle from x = 2.25 to 5.5 and y = 1.75 to 6 of an 8 x 8 picture
    x0, x1, y0, y1 = (value / 4 - 1 for value in (2.25, 5.5, 1.75, 6.0))
    clip = clip_of([[x0, y0, 0, 1], [x1, y0, 0, 1], [x1, y1, 0, 1], [x0, y1, 0, 1]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    mask = CPU.smooth_mask(clip, CPU.rasterize(clip, faces, 8, 8), faces)[0, ..., 0]
    across = torch.tensor([0, 0, 0.75, 1, 1, 0.5, 0, 0], dtype=torch.float64)
    down = torch.tensor([0, 0.25, 1, 1, 1, 1, 0, 0], dtype=torch.float64)
    assert torch.equal(mask, down[:, None] * across)


# ---------------------------------------------------------------------------------------------------------------- embree


def test_triangles_agree_with_embree_rays():
    """At least 99.9 % of the pixels name the triangle that a ray through their centre hits, and the same point on it."""
    pytest.importorskip("embreex", reason="the ray oracle is a test-only requirement")
    import trimesh
    from trimesh.ray.ray_pyembree import RayMeshIntersector

    mesh = normalize(load_mesh("builtin:bunny"))
    cameras, size = orbit_cameras(4, elevation_deg=20), 192
    rast = CPU.rasterize(cameras.clip(mesh.vertices), mesh.faces, size, size)
    position = CPU.interpolate(mesh.vertices, rast, mesh.faces)
    rays = RayMeshIntersector(trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False))

    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    rows, columns = torch.meshgrid(centre, centre, indexing="ij")
    far_end = torch.stack([columns, rows, torch.ones_like(rows), torch.ones_like(rows)], dim=-1).reshape(-1, 4)
    for i in range(len(cameras)):
        origin = cameras.positions[i].double()
        world = far_end @ torch.linalg.inv(cameras.mvp[i].double()).T
        direction = world[:, :3] / world[:, 3:] - origin
        hit = torch.from_numpy(rays.intersects_first(origin.expand_as(direction).numpy(), direction.numpy()))
        ours = rast[i, ..., 3].reshape(-1).long() - 1
        same = ours == hit
        assert same.float().mean() >= 0.999
        assert (ours >= 0).float().mean() > 0.1
        # the interpolated point lies on its pixel's ray
        on_ray = torch.nn.functional.normalize(direction, dim=-1)
        offset = position[i].reshape(-1, 3).double() - origin
        away = (offset - (offset * on_ray).sum(-1, keepdim=True) * on_ray).norm(dim=-1)
        assert away[ours >= 0].quantile(0.99) < 1e-6 and away[ours >= 0].max() < 2.25 / size


# ---------------------------------------------------------------------------------------------------------------- gradients


def central_differences(function, point: torch.Tensor, step: float) -> torch.Tensor:
    """Gradient of a scalar function of a float64 tensor by central differences."""
    flat = torch.zeros(point.numel(), dtype=torch.float64)
    for i in range(point.numel()):
        shift = torch.zeros_like(flat)
        shift[i] = step
        shift = shift.reshape(point.shape)
        flat[i] = (function(point + shift) - function(point - shift)) / (2 * step)
    return flat.reshape(point.shape)


def interior(rast: torch.Tensor) -> torch.Tensor:
    """Pixels that no small step of a vertex uncovers or hands to another triangle."""
    ids = torch.nn.functional.pad(rast[..., 3], (1, 1, 1, 1))
    height, width = rast.shape[1:3]
    same = torch.stack([ids[:, i : i + height, j : j + width] for i in range(3) for j in range(3)])
    return ((same == same[4]).all(0) & (same[4] > 0))[..., None].double()


def test_gradients_against_central_differences():
    """Interpolated attributes by attributes and by clip positions, a triangle that crosses w = 0 among them, to 1e-6."""
    clip, faces = tent()
    generator = torch.Generator().manual_seed(12)
    attributes = torch.rand(2, clip.shape[1], 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 24, 24, 3, generator=generator, dtype=torch.float64)
    inside = interior(CPU.rasterize(clip, faces, 24, 24))
    assert inside.sum() > 100

    def loss(positions, values):
        rast = CPU.rasterize(positions, faces, 24, 24)
        return (weights * inside * CPU.interpolate(values, rast, faces).square()).sum()

    positions, values = clip.clone().requires_grad_(), attributes.clone().requires_grad_()
    loss(positions, values).backward()
    expected = central_differences(lambda p: loss(p, attributes), clip, 1e-6)
    assert expected[:, 5:].abs().max() > 1e-3  # the crossing triangle takes part
    scale = expected.abs().max()
    assert (positions.grad - expected).abs().max() <= 1e-6 * scale
    expected = central_differences(lambda v: loss(clip, v), attributes, 1e-4)
    assert (values.grad - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_gradcheck():
    clip, faces = tent()
    inside = interior(CPU.rasterize(clip, faces, 12, 12))
    attributes = torch.rand(8, 2, generator=torch.Generator().manual_seed(14), dtype=torch.float64)

    def picture(positions, values):
        return inside * CPU.interpolate(values, CPU.rasterize(positions, faces, 12, 12), faces)

    assert inside.any()
    assert torch.autograd.gradcheck(picture, (clip.requires_grad_(), attributes.requires_grad_()), atol=1e-7)


def test_gradients_equal_the_plain_twin():
    """Everywhere, edge pixels and clamped weights included, and for a gradient that arrives at all four channels."""
    clip, faces = soup(15, 400, spread=0.3)
    generator = torch.Generator().manual_seed(16)
    attributes = torch.rand(clip.shape[1], 3, generator=generator, dtype=torch.float64)
    weights, direct = (torch.randn(2, 40, 40, c, generator=generator, dtype=torch.float64) for c in (3, 4))
    gradients = []
    for backend in (CPU, TWIN):
        positions, values = clip.clone().requires_grad_(), attributes.clone().requires_grad_()
        rast = backend.rasterize(positions, faces, 40, 40)
        ((backend.interpolate(values, rast, faces) * weights).sum() + (rast * direct).sum()).backward()
        gradients.append((positions.grad, values.grad))
    for ours, twin in zip(*gradients):
        assert twin.abs().max() > 0.1
        torch.testing.assert_close(ours, twin, rtol=1e-8, atol=1e-10 * float(twin.abs().max()))


def test_z_and_smooth_mask_carry_no_gradient():
    clip, faces = soup(17, 20)
    clip.requires_grad_()
    rast = CPU.rasterize(clip, faces, 16, 16)
    assert not CPU.smooth_mask(clip, rast, faces).requires_grad
    (rast[..., 2:].sum()).backward()
    assert not clip.grad.any()


# ---------------------------------------------------------------------------------------------------------------- compiled cache


def test_kernels_compile_where_neither_package_nor_home_can_be_written(tmp_path):
    """A file named __pycache__ and a home that is no folder stop numba's own choices, even for root."""
    import threestudio_pgc.scene.raster.jit as jit_module

    package, scratch = tmp_path / "package", tmp_path / "scratch"
    package.mkdir()
    scratch.mkdir()
    (package / "jit.py").write_text(Path(jit_module.__file__).read_text())
    (package / "kernel.py").write_text("from jit import jit\n\n@jit\ndef double(x):\n    return 2 * x\n\nprint(double(21))\n")
    (package / "__pycache__").write_text("")
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    environment |= {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull, "TMPDIR": str(scratch), "PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, "-B", "-c", "import kernel"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "42", done.stderr
    assert list(scratch.rglob("*.nbi")), "nothing was cached"
