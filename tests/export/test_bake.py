import numpy as np
import pytest
import torch

from threestudio_pgc.export.bake import bake, fill_nearest
from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.unwrap import UVAtlas, atlas_for
from threestudio_pgc.scene.mesh import TriangleMesh

SQUARE = TriangleMesh(torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]), torch.tensor([[0, 1, 2], [0, 2, 3]]))
WHOLE = UVAtlas(np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32), SQUARE.faces.numpy(), "user")


def test_degenerate_input_is_refused():
    empty = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    no_uvs = UVAtlas(np.zeros((0, 2), np.float32), np.zeros((0, 3), np.int64), "user")
    with pytest.raises(ExportError, match="no faces"):
        bake(empty, no_uvs, torch.abs, 8)
    with pytest.raises(ExportError, match="no texel lies in any face"):
        bake(SQUARE, UVAtlas(WHOLE.uvs * 0, WHOLE.uv_faces, "user"), torch.abs, 8)
    with pytest.raises(ExportError, match="resolution: found 0"):
        bake(SQUARE, WHOLE, torch.abs, 0)
    for samples in (0, 2, -4):
        with pytest.raises(ExportError, match=f"samples: found {samples}"):
            bake(SQUARE, WHOLE, torch.abs, 8, samples=samples)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("samples", [1, 4])
def test_texel_centres_see_their_own_point_with_row_0_at_v_1(mirrored, samples):
    uvs = WHOLE.uvs * [-1, 1] + [1, 0] if mirrored else WHOLE.uvs
    texture = bake(SQUARE, UVAtlas(uvs.astype(np.float32), WHOLE.uv_faces, "user"), lambda points: points, 8, samples=samples)
    centres = (np.arange(8) + 0.5) / 4 - 1
    expected = np.stack([*np.meshgrid(centres * (-1 if mirrored else 1), -centres), np.zeros((8, 8))], -1)
    np.testing.assert_allclose(texture, expected, atol=1e-6)


def test_more_samples_approach_the_mean_over_the_texel():
    def stripes(points):
        return (points[:, :1] > 0.0625).float()

    means = [bake(SQUARE, WHOLE, stripes, 8, samples=samples)[:, 4, 0] for samples in (1, 4, 64)]
    np.testing.assert_allclose(means[0], 1.0)  # the centre of a texel that is three quarters in
    np.testing.assert_allclose(means[1], 0.5)
    np.testing.assert_allclose(means[2], 0.75)


def test_no_texel_stays_empty(bare_sphere):
    atlas, _ = atlas_for(bare_sphere, resolution=128)
    marked = bake(bare_sphere, atlas, lambda points: torch.ones(len(points), 2), 128)
    assert marked.shape == (128, 128, 2)
    assert (marked == 1).all()


def test_chunks_and_progress_do_not_change_the_result(box, color_fn):
    atlas, _ = atlas_for(box)
    shares = []
    parts = bake(box, atlas, color_fn, 64, chunk=500, samples=4, progress=shares.append)
    np.testing.assert_allclose(parts, bake(box, atlas, color_fn, 64, samples=4), atol=1e-6)
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 8


def test_fill_takes_the_nearest():
    texture = np.zeros((5, 7, 1), np.float32)
    covered = np.zeros((5, 7), bool)
    texture[2, 1], texture[2, 5] = 1, 2
    covered[2, 1] = covered[2, 5] = True
    filled = fill_nearest(texture, covered)[..., 0]
    assert (filled[:, :3] == 1).all() and (filled[:, 4:] == 2).all()
    assert np.isin(filled[:, 3], [1, 2]).all()


def test_fill_agrees_with_a_search_of_all_texels():
    generator = np.random.default_rng(0)
    texture = generator.random((20, 30, 3)).astype(np.float32)
    covered = generator.random((20, 30)) < 0.05
    filled = fill_nearest(texture, covered)
    places = np.argwhere(covered)
    for row, column in np.ndindex(20, 30):
        distances = np.square(places - [row, column]).sum(axis=1)
        nearest = places[distances == distances.min()]
        assert any(np.array_equal(filled[row, column], texture[tuple(place)]) for place in nearest)
