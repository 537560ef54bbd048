import numpy as np
import pytest
import torch

from tests.export.conftest import pbr_maps, position_maps
from threestudio_pgc.export import bake as baking
from threestudio_pgc.export.atlas import UVAtlas
from threestudio_pgc.export.bake import bake, fill_nearest
from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.unwrap import atlas_for
from threestudio_pgc.scene.mesh import TriangleMesh, linear_to_srgb

SQUARE = TriangleMesh(torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]), torch.tensor([[0, 1, 2], [0, 2, 3]]))
WHOLE = UVAtlas(np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32), SQUARE.faces.numpy(), "user")


def place(points, normals):
    """Where the points of SQUARE lie in it, as a colour."""
    return {"base_color": points * 0.5 + 0.5}


def test_degenerate_input_is_refused():
    empty = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    no_uvs = UVAtlas(np.zeros((0, 2), np.float32), np.zeros((0, 3), np.int64), "user")
    with pytest.raises(ExportError, match="no faces"):
        bake(empty, no_uvs, place, 8)
    with pytest.raises(ExportError, match="no texel lies in any face"):
        bake(SQUARE, UVAtlas(WHOLE.uvs * 0, WHOLE.uv_faces, "user"), place, 8)
    with pytest.raises(ExportError, match="resolution: found 0"):
        bake(SQUARE, WHOLE, place, 0)
    for samples in (0, 2, -4):
        with pytest.raises(ExportError, match=f"samples: found {samples}"):
            bake(SQUARE, WHOLE, place, 8, samples=samples)


@pytest.mark.parametrize("name", ["base_color", "occlusion", "roughness", "metallic", "normal"])
def test_values_that_are_no_numbers_are_counted_by_map(name):
    def broken(points, normals):
        found = pbr_maps(points, normals)
        found[name][(points[:, 0] > 0) & (points[:, 1] > 0.5)] = float("nan")
        return found

    with pytest.raises(ExportError, match=f"maps_fn {name}: found NaN or infinity at 8 of 64 points"):
        bake(SQUARE, WHOLE, broken, 8, samples=1)


def test_maps_that_come_and_go_are_refused():
    def moody(points, normals):
        return place(points, normals) | ({} if len(points) == 50 else {"roughness": points[:, :1]})

    with pytest.raises(ExportError, match="found base_color, roughness after base_color, wanted the same maps"):
        bake(SQUARE, WHOLE, moody, 8, samples=1, chunk=50)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("samples", [1, 4])
def test_texel_centres_see_their_own_point_with_row_0_at_v_1(mirrored, samples):
    def height(points, normals):
        return {"base_color": torch.zeros_like(points), "roughness": points[:, :1], "metallic": points[:, 1:2]}

    uvs = WHOLE.uvs * [-1, 1] + [1, 0] if mirrored else WHOLE.uvs
    found = bake(SQUARE, UVAtlas(uvs.astype(np.float32), WHOLE.uv_faces, "user"), height, 8, samples=samples)
    centres = (np.arange(8) + 0.5) / 4 - 1
    x, y = np.meshgrid(centres * (-1 if mirrored else 1), -centres)
    np.testing.assert_allclose(found["roughness"][..., 0], x, atol=1e-6)
    np.testing.assert_allclose(found["metallic"][..., 0], y, atol=1e-6)


def test_normals_are_handed_over_at_unit_length(box):
    atlas, _ = atlas_for(box)
    lengths = []

    def listen(points, normals):
        lengths.append(normals.norm(dim=-1))
        return position_maps(points, normals)

    bake(box, atlas, listen, 32, samples=1)
    torch.testing.assert_close(torch.cat(lengths), torch.ones(len(torch.cat(lengths))))


def test_more_samples_approach_the_mean_over_the_texel():
    def stripes(points, normals):
        share = (points[:, :1] > 0.0625).float()
        return {"base_color": share.expand(-1, 3), "roughness": share}

    found = [bake(SQUARE, WHOLE, stripes, 8, samples=samples) for samples in (1, 4, 64)]
    for maps, share in zip(found, (1.0, 0.5, 0.75)):  # the centre of a texel that is three quarters in is all in
        np.testing.assert_allclose(maps["roughness"][:, 4, 0], share)
        np.testing.assert_allclose(maps["base_color"][:, 4, 0], linear_to_srgb(np.array(share)), atol=1e-6)  # light adds up


def test_a_constant_is_a_constant_everywhere_to_the_last_bit(bare_sphere):
    def constant(points, normals):
        one = torch.ones(len(points), 1)
        return {"base_color": one * torch.tensor([0.1, 0.5, 0.7]), "occlusion": 0.3 * one, "roughness": 0.7 * one, "normal": normals}

    atlas, _ = atlas_for(bare_sphere, resolution=128)
    found = bake(bare_sphere, atlas, constant, 128, samples=9)
    assert {name: values.shape[-1] for name, values in found.items()} == {"base_color": 3, "occlusion": 1, "roughness": 1, "normal": 3}
    for name, values in found.items():
        assert values.shape[:2] == (128, 128) and values.dtype == np.float32
        if name != "normal":
            assert (values == values[0, 0]).all()
    np.testing.assert_allclose(found["base_color"][0, 0], [0.1, 0.5, 0.7], atol=1e-6)
    np.testing.assert_allclose(found["normal"], np.broadcast_to([0, 0, 1.0], (128, 128, 3)), atol=1e-5)


def test_colours_out_of_range_are_cut_off():
    found = bake(SQUARE, WHOLE, lambda points, normals: {"base_color": points * 3}, 8)["base_color"]
    assert found.min() == 0 and found.max() == pytest.approx(1) and found.max() <= 1


def test_chunks_bands_and_progress_do_not_change_the_result(box, monkeypatch):
    atlas, _ = atlas_for(box)
    whole, shares = bake(box, atlas, pbr_maps, 64), []
    monkeypatch.setattr(baking, "BAND_ROWS", 24)
    monkeypatch.setattr(baking, "FILL_CHUNK", 100)
    parts = bake(box, atlas, pbr_maps, 64, chunk=500, progress=shares.append)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=2e-4)  # a band's rows are placed in float32
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 12


def test_fill_takes_the_nearest():
    texture = np.zeros((5, 7, 1), np.float32)
    covered = np.zeros((5, 7), bool)
    texture[2, 1], texture[2, 5] = 1, 2
    covered[2, 1] = covered[2, 5] = True
    fill_nearest([texture], covered)
    filled = texture[..., 0]
    assert (filled[:, :3] == 1).all() and (filled[:, 4:] == 2).all()
    assert np.isin(filled[:, 3], [1, 2]).all()


def test_fill_agrees_with_a_search_of_all_texels():
    generator = np.random.default_rng(0)
    texture = generator.random((20, 30, 3)).astype(np.float32)
    covered = generator.random((20, 30)) < 0.05
    filled, other = texture.copy(), texture[..., :1].copy()
    fill_nearest([filled, other], covered)
    assert np.array_equal(other, filled[..., :1])
    places = np.argwhere(covered)
    for row, column in np.ndindex(20, 30):
        distances = np.square(places - [row, column]).sum(axis=1)
        nearest = places[distances == distances.min()]
        assert any(np.array_equal(filled[row, column], texture[tuple(place)]) for place in nearest)


def test_a_chart_between_the_texels_centres_has_a_texel_of_its_own():
    """Else a small loose piece would be filled with its neighbour's colour."""
    small = np.array([[0.8, 0.8], [0.801, 0.8], [0.8, 0.801]], np.float32)  # an eighth of a texel, not around a centre
    large = np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]], np.float32)
    vertices = torch.cat([torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([[5.0, 5, 0], [5.1, 5, 0], [5, 5.1, 0]])])
    faces = torch.tensor([[0, 1, 2], [3, 4, 5]])
    atlas = UVAtlas(np.concatenate([large, small]), faces.numpy(), "user")

    def color(points, normals):
        return {"base_color": torch.where(points[:, :1] > 3, 0.9, 0.1).expand(-1, 3)}

    baked = bake(TriangleMesh(vertices, faces), atlas, color, 64)["base_color"]
    row, column = int((1 - 0.8003) * 64), int(0.8003 * 64)
    assert baked[row, column] == pytest.approx(0.9, abs=1e-5) and baked[40, 10] == pytest.approx(0.1, abs=1e-5)
