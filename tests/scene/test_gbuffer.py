"""G-buffers against planes and spheres known in closed form, and the right way round."""

import numpy as np
import pytest
import torch
import trimesh

from threestudio_pgc.scene.cameras import fovy_from_focal, look_at_cameras, orbit_cameras
from threestudio_pgc.scene.gbuffer import antialiased, composite, render_gbuffer
from threestudio_pgc.scene.mesh import TriangleMesh, load_mesh, normalize
from threestudio_pgc.scene.raster.cpu import CpuRasterizer
from threestudio_pgc.scene.raster.reference import ReferenceRasterizer

CPU = CpuRasterizer()


def sphere(radius: float, subdivisions: int = 5) -> TriangleMesh:
    ball = trimesh.creation.icosphere(subdivisions)
    return TriangleMesh(torch.from_numpy(ball.vertices).float() * radius, torch.from_numpy(ball.faces))


def plane(x: float, half: float) -> TriangleMesh:
    """A square at a given x that faces +x."""
    vertices = torch.tensor([[x, -half, -half], [x, half, -half], [x, half, half], [x, -half, half]])
    return TriangleMesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]))


@pytest.mark.parametrize("silhouette", ["coverage", "antialias", "none"])
@pytest.mark.parametrize(
    "mesh",
    [TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)), plane(50.0, 1.0)],
    ids=["no vertices", "behind the camera"],
)
def test_nothing_to_see(mesh, silhouette):
    gbuffer = render_gbuffer(mesh, orbit_cameras(1, elevation_deg=0), 8, 12, CPU, silhouette=silhouette)
    assert gbuffer.mask.shape == (1, 8, 12) and gbuffer.indices.shape == (0,)
    for name, channels in {"opacity": 1, "depth": 1, "position": 3, "normal": 3, "view_normal": 3, "rast": 4}.items():
        buffer = getattr(gbuffer, name)
        assert buffer.shape == (1, 8, 12, channels) and not buffer.any(), name
    assert gbuffer.select(gbuffer.position).shape == (0, 3)
    background = torch.rand(1, 8, 12, 3)
    assert torch.equal(composite(torch.zeros(0, 3), gbuffer, background), background)
    assert torch.equal(composite(torch.zeros(0, 3), gbuffer, background, mesh, CPU), background)


def test_plane_depth_is_along_the_axis_and_not_along_the_ray():
    camera = look_at_cameras(0, 0, 2.0, fovy_from_focal(1.0))
    gbuffer = render_gbuffer(plane(0.25, 3.0), camera, 16, 24, CPU)
    assert gbuffer.mask.all() and (gbuffer.opacity == 1).all()
    torch.testing.assert_close(gbuffer.depth, torch.full((1, 16, 24, 1), 1.75))
    torch.testing.assert_close(gbuffer.normal, torch.tensor([1.0, 0, 0]).expand(1, 16, 24, 3))
    torch.testing.assert_close(gbuffer.view_normal, torch.tensor([0.0, 0, 1]).expand(1, 16, 24, 3))
    # focal 1, so a pixel at height h (in picture heights) above the middle sees z = 1.75 h; columns go to +y
    height = 0.5 - (torch.arange(16) + 0.5) / 16
    torch.testing.assert_close(gbuffer.position[0, :, 0, 2], 1.75 * height)
    along = ((torch.arange(24) + 0.5) / 24 - 0.5) * 1.75  # aspect 1: the picture is as wide as high, pixels are not square
    torch.testing.assert_close(gbuffer.position[0, 0, :, 1], along)


def test_sphere_against_the_closed_form():
    """Each pixel's ray meets the ball at a known point, whose direction is the normal."""
    radius, size = 0.8, 64
    cameras = look_at_cameras([0.0, 40.0, -10.0], [0.0, 77.0, 300.0], [2.0, 2.2, 2.5], fovy_from_focal(1.1))
    gbuffer = render_gbuffer(sphere(radius), cameras, size, size, CPU)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    rows, columns = torch.meshgrid(centre, centre, indexing="ij")
    ray = torch.stack([columns, -rows, torch.full_like(rows, -1.1)], dim=-1)  # camera space, focal 1.1
    for i in range(3):
        direction = torch.nn.functional.normalize(ray @ cameras.c2w[i, :3, :3].double().T, dim=-1)
        origin = cameras.positions[i].double()
        b = direction @ origin
        discriminant = b * b - (origin @ origin - radius**2)
        well_inside = discriminant > 0.02
        assert gbuffer.mask[i][well_inside].all() and not gbuffer.mask[i][discriminant < 0].any()
        assert well_inside.float().mean() > 0.2
        point = origin + (-b - discriminant.clamp(min=0).sqrt())[..., None] * direction
        depth = -((point - origin) @ cameras.c2w[i, :3, 2].double())
        torch.testing.assert_close(gbuffer.position[i][well_inside].double(), point[well_inside], rtol=0, atol=2e-3)
        torch.testing.assert_close(gbuffer.depth[i, ..., 0][well_inside].double(), depth[well_inside], rtol=0, atol=2e-3)
        torch.testing.assert_close(gbuffer.normal[i][well_inside].double(), point[well_inside] / radius, rtol=0, atol=5e-3)
        view = gbuffer.normal[i] @ cameras.c2w[i, :3, :3]
        torch.testing.assert_close(gbuffer.view_normal[i], view, rtol=0, atol=1e-6)
        assert (gbuffer.view_normal[i][well_inside][:, 2] > 0).all()
    ball = gbuffer.view_normal[0]
    assert ball[size // 2, 50, 0] > 0.4 and ball[12, size // 2, 1] > 0.4  # x to the right, y to the top of the picture
    unit = gbuffer.select(gbuffer.normal).norm(dim=-1)
    torch.testing.assert_close(unit, torch.ones_like(unit))


def test_everything_is_zero_outside_of_the_mask():
    gbuffer = render_gbuffer(normalize(load_mesh("builtin:teapot")), orbit_cameras(2), 48, 48, CPU)
    assert 0.05 < gbuffer.mask.float().mean() < 0.9
    for name in ("opacity", "depth", "position", "normal", "view_normal", "rast"):
        assert not getattr(gbuffer, name)[~gbuffer.mask].any(), name
    assert (gbuffer.select(gbuffer.depth) > 0).all()
    opacity = gbuffer.select(gbuffer.opacity)
    assert opacity.min() < 1 and opacity.max() == 1 and (opacity > 0.1).all()


def test_opacity_measures_the_covered_area():
    """Of a plane whose outline is known: the share of the picture, to within the samples of its border."""
    camera = look_at_cameras(0, 0, 2.0, fovy_from_focal(1.0))
    mesh = plane(0.0, 0.613)
    clip = camera.clip(mesh.vertices)
    coverage = CPU.smooth_mask(clip, CPU.rasterize(clip, mesh.faces, 64, 64), mesh.faces)
    assert float(coverage.mean()) == pytest.approx(0.613**2, abs=2 * 4 * 0.613 / 64 / 8)
    hard = render_gbuffer(mesh, camera, 64, 64, CPU, silhouette="none")
    assert torch.equal(hard.opacity[..., 0], hard.mask.float())


def test_letters_read_from_left_to_right_from_the_front():
    """On the plaque the P's upright is at the far left, the cone stands at the right, and the C's mouth opens to the right."""
    mesh = normalize(load_mesh("builtin:lettered"))
    camera = look_at_cameras(0, 0, 2.25, fovy_from_focal(1.0))
    size = 192
    gbuffer = render_gbuffer(mesh, camera, size, size, CPU)
    rows, columns = gbuffer.mask[0].nonzero(as_tuple=True)
    top = columns[rows < rows.min() + 5]
    assert top.float().mean() > size * 0.6  # the cone's tip
    raised = (gbuffer.position[0, ..., 0] > mesh.vertices[:, 0].max() - 1e-3) & gbuffer.mask[0]
    rows, columns = raised.nonzero(as_tuple=True)
    left, right = int(columns.min()), int(columns.max())
    assert abs((left + right) / 2 - size / 2) < 2
    # sample the middles of the font's cells: 17 across (3 letters of 5 and 2 gaps), 7 down
    across = (left + (right + 1 - left) * (torch.arange(17) + 0.5) / 17).long()
    down = (rows.min() + (rows.max() + 1 - rows.min()) * (torch.arange(7) + 0.5) / 7).long()
    picture = ["".join(".X"[int(raised[r, c])] for c in across) for r in down]
    assert picture == [
        "XXXXX.XXXXX.XXXXX",
        "X...X.X.....X....",
        "X...X.X.....X....",
        "XXXXX.X.XXX.X....",
        "X.....X...X.X....",
        "X.....X...X.X....",
        "X.....XXXXX.XXXXX",
    ]
    # the texture reads the same way: u grows to the right, v to the top
    uv = CPU.interpolate(mesh.uvs, gbuffer.rast, mesh.uv_faces)[0]
    front = raised.nonzero()
    assert torch.corrcoef(torch.stack([front[:, 1].float(), uv[raised][:, 0]]))[0, 1] > 0.999
    assert torch.corrcoef(torch.stack([front[:, 0].float(), uv[raised][:, 1]]))[0, 1] < -0.999


def test_bunny_and_teapot_face_the_way_their_card_says():
    """The bunny's head is at its top and towards +x; the teapot's spout is to the right of the front view."""
    bunny, teapot = (normalize(load_mesh(f"builtin:{name}")) for name in ("bunny", "teapot"))
    assert bunny.vertices[bunny.vertices[:, 2] > 0.3].mean(0)[0] > 0.2
    camera = look_at_cameras(0, 0, 2.25, fovy_from_focal(1.0))
    rows, columns = render_gbuffer(teapot, camera, 96, 96, CPU).mask[0].nonzero(as_tuple=True)
    right, left = rows[columns == columns.max()], rows[columns == columns.min()]
    assert right.float().mean() < left.float().mean()  # the spout's tip is higher than the bow of the handle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_agree(dtype):
    mesh = normalize(load_mesh("builtin:lettered"))
    mesh.vertices = mesh.vertices.to(dtype)
    ours, twin = (render_gbuffer(mesh, orbit_cameras(2), 40, 40, backend) for backend in (CPU, ReferenceRasterizer()))
    assert torch.equal(ours.mask, twin.mask) and torch.equal(ours.opacity, twin.opacity)
    for name in ("depth", "position", "normal", "view_normal"):
        assert getattr(ours, name).dtype == dtype
        torch.testing.assert_close(getattr(ours, name), getattr(twin, name), rtol=0, atol=1e-6)


def test_autocast_does_not_move_vertices():
    mesh, cameras = normalize(load_mesh("builtin:lettered")), orbit_cameras(2)
    expected = render_gbuffer(mesh, cameras, 32, 32, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        found = render_gbuffer(mesh, cameras, 32, 32, CPU)
    for name in ("rast", "depth", "view_normal"):
        assert torch.equal(getattr(expected, name), getattr(found, name)), name


def test_composite_blends_by_opacity_and_is_differentiable():
    gbuffer = render_gbuffer(sphere(0.8, 2), orbit_cameras(2), 10, 10, CPU)
    assert 0 < gbuffer.opacity[gbuffer.mask].min() < 1
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(len(gbuffer.indices), 3, generator=generator, dtype=torch.float64)
    background = torch.rand(2, 10, 10, 3, generator=generator, dtype=torch.float64)
    gbuffer.opacity = gbuffer.opacity.double()
    image = composite(values, gbuffer, background)
    full = torch.zeros_like(background)
    full[gbuffer.mask] = values
    torch.testing.assert_close(image, gbuffer.opacity * full + (1 - gbuffer.opacity) * background)
    values.requires_grad_()
    background.requires_grad_()
    weights = torch.rand(2, 10, 10, 3, generator=generator, dtype=torch.float64)
    (composite(values, gbuffer, background) * weights).sum().backward()
    torch.testing.assert_close(values.grad, gbuffer.select(gbuffer.opacity) * gbuffer.select(weights))
    torch.testing.assert_close(background.grad, (1 - gbuffer.opacity) * weights)


def test_an_unknown_silhouette_is_refused():
    with pytest.raises(ValueError, match="silhouette: found 'soft', wanted one of coverage, antialias, none"):
        render_gbuffer(sphere(0.6, 1), orbit_cameras(1), 8, 8, CPU, silhouette="soft")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_silhouette_changes_nothing_but_the_opacity(dtype):
    mesh, cameras = normalize(load_mesh("builtin:teapot")), orbit_cameras(2)
    mesh.vertices = mesh.vertices.to(dtype)
    hard, blended, covered = (
        render_gbuffer(mesh, cameras, 40, 48, CPU, silhouette=silhouette) for silhouette in ("none", "antialias", "coverage")
    )
    for other in (blended, covered):
        for name in ("mask", "depth", "position", "normal", "view_normal", "rast", "clip", "indices"):
            assert torch.equal(getattr(hard, name), getattr(other, name)), name
    assert hard.clip.shape == (2, len(mesh.vertices), 4) and blended.opacity.dtype == dtype
    assert blended.opacity.min() == 0 and blended.opacity.max() == 1
    assert torch.equal(blended.opacity, antialiased(hard.opacity, hard, mesh, CPU).clamp(0, 1))
    assert blended.opacity[~hard.mask].any() and (blended.opacity[hard.mask] >= 0.5).float().mean() > 0.98
    # on the outline the blended mask is nearer to the share that is covered
    fine = render_gbuffer(mesh, cameras, 8 * 40, 8 * 48, CPU, silhouette="none").opacity
    share = torch.nn.functional.avg_pool2d(fine.permute(0, 3, 1, 2), 8).permute(0, 2, 3, 1)
    outline = (share > 0) & (share < 1)
    errors = [(buffers.opacity - share)[outline].square().mean().sqrt() for buffers in (blended, hard)]
    assert outline.sum() > 100 and errors[0] < 0.5 * errors[1]


def growing_square(scale: torch.Tensor) -> TriangleMesh:
    """Seen from the front at focal 1 and distance 2, half as wide as the picture at scale 1."""
    mesh = plane(0.0, 0.5)
    mesh.vertices = mesh.vertices.double() * scale
    return mesh


def test_the_opacity_and_a_picture_grow_with_the_object():
    """A red square before blue: d(red)/d(scale) is that of the square's area, and blue falls as red rises."""
    scale = torch.tensor(1.013, dtype=torch.float64, requires_grad=True)
    mesh, camera = growing_square(scale), look_at_cameras(0, 0, 2.0, fovy_from_focal(1.0))
    gbuffer = render_gbuffer(mesh, camera, 64, 64, CPU, silhouette="antialias")
    side = 0.5 * float(scale.detach())  # in picture widths
    by_area = 2 * side * 0.5
    (grown,) = torch.autograd.grad(gbuffer.opacity.mean(), scale, retain_graph=True)
    assert float(grown) == pytest.approx(by_area, rel=0.04)
    assert float(gbuffer.opacity.detach().mean()) == pytest.approx(side**2, rel=1e-3)
    red, blue = torch.tensor([1.0, 0, 0], dtype=torch.float64), torch.tensor([0, 0, 1.0], dtype=torch.float64)
    image = composite(red.expand(len(gbuffer.indices), 3), gbuffer, blue.expand(1, 64, 64, 3), mesh, CPU)
    torch.testing.assert_close(image[..., :1], gbuffer.opacity)
    torch.testing.assert_close(image.sum(-1), torch.ones(1, 64, 64, dtype=torch.float64))
    for channel, sign in ((0, 1), (2, -1)):
        (grown,) = torch.autograd.grad(image[..., channel].mean(), scale, retain_graph=True)
        assert float(grown) == pytest.approx(sign * by_area, rel=0.04)


def test_the_silhouette_of_one_part_before_another_moves_in_the_picture_alone():
    """A small square before a wall that fills the view: opacity is 1 throughout, the picture's gradient still sees the square grow."""
    scale = torch.tensor(1.013, dtype=torch.float64, requires_grad=True)
    square, wall = growing_square(scale), plane(-1.0, 9.0)
    mesh = TriangleMesh(torch.cat([square.vertices, wall.vertices.double()]), torch.cat([square.faces, wall.faces + 4]))
    gbuffer = render_gbuffer(mesh, look_at_cameras(0, 0, 2.0, fovy_from_focal(1.0)), 64, 64, CPU, silhouette="antialias")
    assert (gbuffer.opacity == 1).all()
    near = (gbuffer.select(gbuffer.position)[:, :1] > -0.5).double()
    image = composite(near, gbuffer, torch.zeros(1, 64, 64, 1, dtype=torch.float64), mesh, CPU)
    image.mean().backward()
    assert float(scale.grad) == pytest.approx(0.5 * float(scale.detach()), rel=0.04)


def test_an_antialiased_picture_carries_gradients_to_values_and_background():
    mesh = sphere(0.8, 2)
    gbuffer = render_gbuffer(mesh, orbit_cameras(2), 10, 10, CPU, silhouette="none")
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(len(gbuffer.indices), 3, generator=generator, dtype=torch.float32, requires_grad=True)
    background = torch.rand(2, 10, 10, 3, generator=generator, dtype=torch.float32, requires_grad=True)
    image = composite(values, gbuffer, background, mesh, CPU)
    hard = background.detach().clone()
    hard[gbuffer.mask] = values.detach()
    torch.testing.assert_close(image, antialiased(hard, gbuffer, mesh, CPU))
    assert not torch.equal(image, hard)
    image.sum().backward()
    # every pixel's colour is a mean of colours, so what is shared out adds up to one per pixel
    assert float(values.grad.sum() + background.grad.sum()) == pytest.approx(600, rel=1e-5)
    assert torch.equal(antialiased(hard.half(), gbuffer, mesh, CPU), antialiased(hard.half().float(), gbuffer, mesh, CPU))


def test_select_and_indices_are_the_masked_pixels_in_order():
    gbuffer = render_gbuffer(sphere(0.6, 2), orbit_cameras(3), 12, 14, CPU)
    assert torch.equal(gbuffer.select(gbuffer.position), gbuffer.position[gbuffer.mask])
    view, row, column = np.unravel_index(gbuffer.indices.numpy(), (3, 12, 14))
    assert gbuffer.mask[view, row, column].all() and len(gbuffer.indices) == gbuffer.mask.sum()


def test_gradient_reaches_the_vertices():
    """d(mean depth)/d(x) of a plane that moves away from the camera is -1 per unit, through position and weights alike."""
    mesh = plane(0.2, 3.0)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    mesh.vertices = mesh.vertices.double() + shift * torch.tensor([1.0, 0, 0], dtype=torch.float64)
    gbuffer = render_gbuffer(mesh, look_at_cameras(20.0, 0, 2.0, 0.9), 16, 16, CPU)
    assert gbuffer.mask.all()
    gbuffer.depth.mean().backward()
    # a ray at angle (a, b) meets x = c at depth (distance to the plane) / (direction's x per unit of depth)
    centre = ((torch.arange(16, dtype=torch.float64) + 0.5) / 8 - 1) * np.tan(0.45)
    lean = np.deg2rad(20.0)
    per_depth = np.cos(lean) - centre * np.sin(lean)  # -x component of the ray of depth 1, by row (downwards positive)
    assert float(shift.grad) == pytest.approx(float((-1 / per_depth).mean()), rel=1e-6)
