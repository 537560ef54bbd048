import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from threestudio_pgc.scene import tetrahedra
from threestudio_pgc.scene.tetrahedra import EDGE_CORNERS, FACE_CORNERS, GridError, cells_per_axis, grid_memory, make_grid


def signed_volumes(vertices, tets):
    corners = vertices.double()[..., tets.long(), :]
    return torch.linalg.det(corners[..., 1:, :] - corners[..., :1, :]) / 6


def same(a, b):
    return (
        all(torch.equal(tensor, b._tensors()[name]) for name, tensor in a._tensors().items()) and a.max_displacement == b.max_displacement
    )


@pytest.fixture
def cache_everything(monkeypatch):
    monkeypatch.setattr(tetrahedra, "CACHED_FROM", 0)


@pytest.fixture(scope="module")
def grid():
    return make_grid(16)


@pytest.mark.parametrize("resolution", [0, 1, 7, -64, 64.0, "64", True, None])
def test_a_resolution_that_is_none_is_refused(resolution):
    with pytest.raises(GridError, match=f"geometry.resolution: found {resolution!r}, wanted a whole number of at least 8"):
        make_grid(resolution)


@pytest.mark.parametrize("available", [2**33, None])
def test_a_resolution_that_no_machine_holds_is_refused(monkeypatch, available):
    monkeypatch.setattr(tetrahedra, "_available_memory", lambda: available)
    with pytest.raises(GridError, match="geometry.resolution: found 4096, which needs .* GiB; .* available; wanted at most"):
        make_grid(4096)


def test_the_resolution_that_is_offered_instead_is_the_largest_that_fits(monkeypatch):
    monkeypatch.setattr(tetrahedra, "_available_memory", lambda: 3 * 10**6)
    with pytest.raises(GridError, match="found 64, which needs 0.0 GiB") as error:
        make_grid(64)
    offered = int(str(error.value).split()[-1])
    assert grid_memory(offered).build_bytes <= 3 * 10**6 < grid_memory(offered + 1).build_bytes
    assert make_grid(offered).resolution == offered


def test_the_available_memory_is_known_here():
    assert tetrahedra._available_memory() > 2**20


def test_the_smallest_grid():
    grid = make_grid(8)
    assert grid.vertices.shape == (4**3 + 3**3, 3) and grid.tets.shape == (12 * 3**3, 4)


@pytest.mark.parametrize(("name", "tets"), [(64, 192_492), (128, 1_570_000), (256, 12_600_000)])
def test_resolutions_are_numbered_as_the_usual_grid_files_are(name, tets):
    ours, finer = (12 * (cells_per_axis(name) + more) ** 3 for more in (0, 1))
    coarser = 12 * (cells_per_axis(name) - 1) ** 3
    assert abs(ours - tets) < min(abs(finer - tets), abs(coarser - tets))
    assert grid_memory(name).tets == ours


@pytest.mark.parametrize("resolution", [8, 13, 20])
def test_counts_and_bytes_are_known_without_building(resolution):
    grid, size = make_grid(resolution), grid_memory(resolution)
    assert (len(grid.vertices), len(grid.tets), len(grid.edges), grid.face_count) == size[:4]
    assert sum(tensor.nbytes for tensor in grid._tensors().values()) == size.resident_bytes < size.build_bytes


def test_dtypes(grid):
    assert grid.vertices.dtype == torch.float32 and grid.boundary.dtype == torch.bool
    assert {grid.tets.dtype, grid.edges.dtype, grid.tet_edges.dtype, grid.tet_faces.dtype} == {torch.int32}


def test_tetrahedra_have_one_positive_volume_and_fill_the_cube(grid):
    volumes = signed_volumes(grid.vertices, grid.tets)
    torch.testing.assert_close(volumes, torch.full_like(volumes, 8 / len(volumes)), rtol=1e-5, atol=0)
    assert grid.vertices.min() == -1 and grid.vertices.max() == 1


def test_edges_are_those_of_the_tetrahedra_sorted(grid):
    pairs = grid.tets[:, torch.tensor(EDGE_CORNERS)].sort(dim=-1).values
    edges = torch.unique(pairs.view(-1, 2), dim=0)
    assert torch.equal(grid.edges, edges)
    assert torch.equal(grid.edges[grid.tet_edges], pairs)


def test_two_tetrahedra_have_a_face_number_exactly_where_they_share_the_triangle(grid):
    triangles = grid.tets[:, torch.tensor(FACE_CORNERS)].sort(dim=-1).values.view(-1, 3)
    _, expected = torch.unique(triangles, dim=0, return_inverse=True)
    pairs = torch.unique(torch.stack([grid.tet_faces.view(-1).long(), expected], dim=1), dim=0)
    assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique()) == grid.face_count
    assert pairs[:, 0].min() == 0 and pairs[:, 0].max() == grid.face_count - 1


def test_only_triangles_on_the_cubes_surface_belong_to_one_tetrahedron(grid):
    counts = torch.bincount(grid.tet_faces.view(-1))
    assert counts.max() == 2
    triangles = grid.tets[:, torch.tensor(FACE_CORNERS)][counts[grid.tet_faces] == 1].long()
    assert (grid.vertices[triangles].abs() == 1).all(dim=1).any(dim=1).all()
    outer = torch.zeros_like(grid.boundary)
    outer[triangles.view(-1)] = True
    assert torch.equal(grid.boundary, outer)


def test_slabs_do_not_change_the_grid(grid, monkeypatch):
    monkeypatch.setattr(tetrahedra, "SLAB", 1)
    assert same(make_grid(16), grid)


def test_no_tetrahedron_turns_over_when_every_vertex_moves_as_far_as_it_may(grid):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        signs = torch.randint(0, 2, grid.vertices.shape, generator=generator) * 2 - 1
        signs[grid.boundary] = 0
        assert signed_volumes(grid.vertices + grid.max_displacement * signs, grid.tets).min() > 0
        anywhere = torch.rand(grid.vertices.shape, generator=generator) * 2 - 1
        anywhere[grid.boundary] = 0
        assert signed_volumes(grid.vertices + grid.max_displacement * anywhere, grid.tets).min() > 0


def test_the_largest_displacement_is_the_bound_of_every_shape_of_tetrahedron():
    grid = make_grid(8)
    corners = grid.vertices.double()[grid.tets.long()]
    relative = (corners - corners[:, :1]) * cells_per_axis(8)
    free = (~grid.boundary[grid.tets.long()]).double()[..., None]  # (T, 4, 1)
    shapes, free = torch.unique(torch.cat([relative.round(), free], dim=-1), dim=0).split((3, 1), dim=-1)
    # a volume is affine in every coordinate, so over a box it is smallest at one of the box's corners
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)), dtype=torch.float64).view(-1, 4, 3)

    def smallest(factor):
        reach = factor * grid.max_displacement * cells_per_axis(8)
        every = torch.arange(4)
        return torch.stack([signed_volumes(shape + reach * signs * moves, every).min() for shape, moves in zip(shapes, free)])

    inner = free.all(dim=1)[:, 0]
    assert inner.sum() == 12 and len(shapes) > 24
    assert (smallest(1.0) > 0).all()
    assert (smallest(1.002)[inner] < 0).all()


def test_all_tensors_move_together(grid):
    assert all(tensor.device.type == "meta" for tensor in grid.to("meta")._tensors().values())


# -------------------------------------------------------------------------------------------------------------------- cache


def test_a_grid_that_is_quick_to_build_is_not_cached(tmp_path):
    make_grid(16, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_grid_is_read_and_not_built(cache_everything, grid, tmp_path, monkeypatch):
    assert same(make_grid(16, cache_dir=tmp_path / "new"), grid)
    monkeypatch.setattr(tetrahedra, "_build", None)
    assert same(make_grid(16, cache_dir=tmp_path / "new"), grid)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_the_default_cache_lies_with_the_others(cache_everything, tmp_path, monkeypatch):
    monkeypatch.setenv("PGC_CACHE", str(tmp_path))
    make_grid(8)
    assert len(list((tmp_path / "grids").iterdir())) == 1


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_content(path):
    path.write_bytes(b"")


def of_another_version(path):
    save_file(load_file(path), path, metadata={"format": "0"})


def rewritten(path, **tensors):
    save_file({**load_file(path), **tensors}, path, metadata={"format": tetrahedra.FORMAT})


def of_another_resolution(path):
    rewritten(path, **make_grid(8)._tensors())


def pointing_outside(path):
    edges = load_file(path)["tet_edges"].clone()
    edges[-1, -1] = 2**30
    rewritten(path, tet_edges=edges)


def of_other_names(path):
    rewritten(path, surprise=torch.zeros(1))


@pytest.mark.parametrize(
    "damage", [cut_short, without_content, of_another_version, of_another_resolution, pointing_outside, of_other_names]
)
def test_a_damaged_cache_file_is_replaced_with_a_warning(cache_everything, grid, tmp_path, damage, recwarn):
    make_grid(16, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tetrahedra, "CACHED_FROM", 10**9)  # for the damages that need a grid
        damage(path)
    assert len(recwarn) == 0 and path.read_bytes() != whole
    with pytest.warns(UserWarning, match="grid cache: .* cannot be used .*; the grid is built again"):
        assert same(make_grid(16, cache_dir=tmp_path), grid)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_only_costs_the_time(cache_everything, grid, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written"):
        assert same(make_grid(16, cache_dir=tmp_path / "file"), grid)
    (tmp_path / "folder" / "tetrahedra-16.safetensors").mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert same(make_grid(16, cache_dir=tmp_path / "folder"), grid)
    assert len(list((tmp_path / "folder").iterdir())) == 1  # no temporary file is left
