"""Captions, textures, shapes and renders of the pocket model's training set."""

import numpy as np
import pytest

from launch_scripts.pocket import captions, renders, shapes, textures
from launch_scripts.pocket.captions import Look


@pytest.fixture(scope="module")
def cube():
    mesh = shapes.box((0, 0, 0), (1, 1, 1))
    return shapes.Shape("cube", *mesh, False, 1.0)


def wall(shape, side=160):
    """Surface points of the cube's wall at x = +0.8: rows from bottom to top, columns along y."""
    z, y = np.meshgrid(np.linspace(-0.799, 0.799, side), np.linspace(-0.799, 0.799, side), indexing="ij")
    position = np.stack([np.full_like(y, 0.8), y, z], -1).reshape(-1, 3)
    return textures.Surface(position, np.tile([1.0, 0.0, 0.0], (len(position), 1)), shape.samples)


def components(mask):
    from scipy.ndimage import find_objects, label

    labels, _ = label(mask)
    return [(labels[part] == k + 1, part) for k, part in enumerate(find_objects(labels))]


def test_no_points_no_colors(cube):
    empty = textures.Surface(np.zeros((0, 3)), np.zeros((0, 3)), cube.samples)
    assert textures.paint(Look("zebra"), empty, 0).shape == (0, 3)


def test_captions_use_only_vocabulary_and_fit():
    rng, words = np.random.default_rng(0), set(captions.vocabulary())
    for _ in range(5000):
        shape, view = list(captions.SHAPES)[rng.integers(len(captions.SHAPES))], captions.VIEWS[rng.integers(4)]
        caption = captions.sample_caption(captions.sample_look(rng), shape, view, rng.random() < 0.1, rng)
        assert set(captions.words_of(caption)) <= words, caption
        assert len(captions.words_of(caption)) + caption.count(",") <= 22, caption


@pytest.mark.parametrize(
    "elevation, azimuth, view",
    [
        (0, 0, "front"),
        (0, 44, "front"),
        (0, 46, "side"),
        (0, 134, "side"),
        (0, 136, "back"),
        (0, 226, "side"),
        (0, 359, "front"),
        (61, 0, "overhead"),
    ],
)
def test_view_words(elevation, azimuth, view):
    assert captions.view_name(elevation, azimuth) == view


@pytest.mark.parametrize("pattern", list(textures.PAINTERS))
def test_every_pattern_is_seeded_and_in_range(cube, pattern):
    look = Look(pattern, ("red", "white"))
    surface = wall(cube, 24)
    first = textures.paint(look, surface, 3)
    assert first.dtype == np.float32 and first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, textures.paint(look, wall(cube, 24), 3))


def test_patterns_that_vary_do_so_with_the_seed(cube):
    for pattern in ("zebra", "leopard", "lava", "marble", "wood"):
        assert np.abs(textures.paint(Look(pattern), wall(cube, 40), 0) - textures.paint(Look(pattern), wall(cube, 40), 1)).mean() > 0.02


def test_farthest_points_keep_their_distance(cube):
    points = textures.farthest_points(cube.samples.pool, 0.4, 0)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.eye(len(points))
    assert gaps.min() >= 0.4
    nearest = np.linalg.norm(cube.samples.pool[:, None] - points[None], axis=-1).min(1)
    assert nearest.max() <= 0.4  # no bare place


def test_dots_are_round_and_equal(cube):
    image = textures.paint(Look("polka", ("green", "white")), wall(cube), 0).reshape(160, 160, 3)
    dots = [
        (dot, part) for dot, part in components(image[..., 0] > 0.5)
        if part[0].start > 0 and part[1].start > 0 and part[0].stop < 160 and part[1].stop < 160
    ]  # fmt: skip
    # A dot whose centre is on another wall shows only its edge here; those on this wall are whole.
    whole = [(dot, part) for dot, part in dots if dot.shape[0] > 20]
    assert len(whole) >= 3
    for dot, _ in whole:
        assert abs(dot.shape[0] - dot.shape[1]) <= 2
        assert dot.mean() == pytest.approx(np.pi / 4, abs=0.05)  # share of a disc in its square
    assert max(dot.shape[0] for dot, _ in whole) - min(dot.shape[0] for dot, _ in whole) <= 2


def test_checks_alternate_both_ways(cube):
    cell = 0.30
    centres = (np.arange(5) + 0.5) * cell + textures.BOTTOM
    z, y = np.meshgrid(centres, (np.arange(-2, 3) + 0.5) * cell, indexing="ij")
    position = np.stack([np.full_like(y, 0.8), y, z], -1).reshape(-1, 3)
    surface = textures.Surface(position, np.tile([1.0, 0.0, 0.0], (25, 1)), cube.samples)
    black = textures.paint(Look("checkered", ("black", "white")), surface, 0).reshape(5, 5, 3)[..., 0] < 0.5
    assert (black[1:] != black[:-1]).all() and (black[:, 1:] != black[:, :-1]).all()


def test_checks_close_around_a_lathe():
    angle = np.linspace(-np.pi, np.pi, 721)[:-1] + 1e-6
    position = np.stack([0.5 * np.cos(angle), 0.5 * np.sin(angle), 0 * angle + 0.05], -1)
    normal = position * [2, 2, 0]
    surface = textures.Surface(position, normal, None, radius=0.5)
    black = textures.paint(Look("checkered", ("black", "white")), surface, 0)[:, 0] < 0.5
    runs = np.flatnonzero(black != np.roll(black, 1))
    lengths = np.diff(np.r_[runs, runs[0] + len(angle)])
    assert len(runs) % 2 == 0 and lengths.max() - lengths.min() <= 1


def test_bricks_have_level_courses_and_offset_joints(cube):
    side = 320
    image = textures.paint(Look("brick", ("red",)), wall(cube, side), 0).reshape(side, side, 3)
    mortar = image[..., 1] > 0.6
    beds = mortar.mean(1) > 0.95
    assert 5 <= (np.diff(beds.astype(int)) == 1).sum() <= 7  # mortar beds run the whole width
    pixels = side / 1.6
    courses = [int(((k + 0.5) * 0.26) * pixels) for k in range(5)]
    joints = [set(np.flatnonzero(mortar[row])) for row in courses]
    assert all(joints) and all(not (a & b) for a, b in zip(joints, joints[1:]))  # never above one another
    assert joints[0] & joints[2]


def test_view_of_nothing_has_no_control():
    mesh = renders.TriangleMesh(*(renders.torch.as_tensor(part) for part in (np.full((3, 3), 50.0, np.float32), np.array([[0, 1, 2]]))))
    view = renders.render_views(mesh, [(0, 0, 2.2, 1.0)], renders.make_rasterizer("cpu"))[0]
    assert not view.mask.any() and not view.control.any() and view.position.shape == (0, 3)
    np.testing.assert_allclose(view.normal_control, np.broadcast_to([0.5, 0.5, 1.0], (128, 128, 3)))


def test_chunk_depends_on_seed_and_number_only(cube):
    backend = renders.make_rasterizer("cpu")
    first = renders.make_chunk(3, 0, [cube], backend, views=2)
    again = renders.make_chunk(3, 0, [cube], backend, views=2)
    other = renders.make_chunk(4, 0, [cube], backend, views=2)
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert (first[0] != other[0]).any()
    images, control, normals, records = first
    assert images.shape == (8, 128, 128, 3) and control.shape == (2, 128, 128) and normals.shape == (2, 128, 128, 3) and len(records) == 8


def test_control_agrees_with_the_guidance(cube):
    """The ControlNets are trained on what `make_control` feeds them later, but for pixels on the silhouette."""
    torch = renders.torch
    from threestudio_pgc.diffusion.control import make_control

    backend = renders.make_rasterizer("cpu")
    mesh = renders.TriangleMesh(torch.as_tensor(cube.vertices, dtype=torch.float32), torch.as_tensor(cube.faces))
    camera = (20.0, 30.0, 2.4, 0.9)
    view = renders.render_views(mesh, [camera], backend)[0]
    ours = view.control
    e, a, d, f = (torch.tensor([value]) for value in camera)
    g = renders.render_gbuffer(mesh, renders.look_at_cameras(e, a, d, renders.fovy_from_focal(f)), 128, 128, backend, silhouette="none")
    theirs = make_control("depth", vars(g))[0, ..., 0].numpy()
    assert np.percentile(np.abs(ours - theirs), 97) < 0.03
    assert np.percentile(np.abs(view.normal_control - make_control("normal", vars(g))[0].numpy()), 97) < 0.03
    assert ours.max() == pytest.approx(1.0, abs=0.02) and (ours == 0).any()


def test_shapes_face_outwards_and_fill_the_box():
    for shape in shapes.shapes():
        assert np.abs(shape.vertices).max() == pytest.approx(0.8)
        assert shape.name in captions.SHAPES
        a, b, c = (shape.vertices[shape.faces[:, k]] for k in range(3))
        assert (np.cross(a, b) * c).sum() > 0, shape.name  # six times the signed volume
