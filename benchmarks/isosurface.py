"""Marching tetrahedra with the numbered grid against the `torch.unique` formulation, on a bumpy sphere: one thread.

Milliseconds are processor time of one call; "all" is the call and the gradients to the vertices and to the field. Seconds are wall time:
of building a grid, and of reading it from a file that the system still holds in memory. Ratios are the twin's time over ours.
"""

import math
import tempfile
import time
from pathlib import Path

import torch
from rasterizer import median_milliseconds
from report import arguments, report

from threestudio_pgc.scene import tetrahedra
from threestudio_pgc.scene.marching_tetrahedra import marching_tetrahedra, marching_tetrahedra_reference
from threestudio_pgc.scene.tetrahedra import EDGE_CORNERS, TetrahedralGrid, grid_memory, make_grid


def seconds(resolution: int, cached_from: float, folder: Path) -> tuple[float, TetrahedralGrid]:
    """Wall time of `make_grid` where grids of so many tetrahedra are cached in the folder."""
    tetrahedra.CACHED_FROM = cached_from
    begun = time.perf_counter()
    grid = make_grid(resolution, cache_dir=folder)
    return time.perf_counter() - begun, grid


def compare(resolution: int, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        build = min(seconds(resolution, math.inf, Path(folder))[0] for _ in range(3))
        written = seconds(resolution, 0, Path(folder))[0]
        read = min(seconds(resolution, 0, Path(folder))[0] for _ in range(3))
    grid = seconds(resolution, math.inf, Path())[1]

    vertices = grid.vertices.clone().requires_grad_()
    x, y, z = grid.vertices.unbind(1)
    sdf = (grid.vertices.norm(dim=1) - 0.6 - 0.04 * torch.sin(9 * x) * torch.sin(8 * y) * torch.sin(7 * z)).requires_grad_()
    paths = {
        "twin": lambda: marching_tetrahedra_reference(vertices, sdf, grid.tets)[0],
        "torch": lambda: marching_tetrahedra(vertices, sdf, grid, backend="torch").vertices,
        "numba": lambda: marching_tetrahedra(vertices, sdf, grid, backend="numba").vertices,
    }
    forward = {name: median_milliseconds(path, repeats) for name, path in paths.items()}
    both = {
        name: median_milliseconds(lambda path=path: torch.autograd.grad(path().square().sum(), (vertices, sdf)), repeats)
        for name, path in paths.items()
    }
    inside = (sdf < 0)[grid.tets]
    ends = grid.tets[inside.any(dim=1) & ~inside.all(dim=1)].long()[:, torch.tensor(EDGE_CORNERS)].sort(dim=-1).values.view(-1, 2)
    unique = median_milliseconds(lambda: torch.unique(ends, dim=0, return_inverse=True), repeats)

    size = grid_memory(resolution)
    return {
        "resolution": resolution,
        "tets": size.tets,
        "edges": size.edges,
        "resident MB": size.resident_bytes / 1e6,
        "build s": build,
        "build and write s": written,
        "read s": read,
        "triangles": len(marching_tetrahedra(vertices, sdf, grid).faces),
        "twin ms": forward["twin"],
        "unique share": unique / forward["twin"],
        "torch ms": forward["torch"],
        "numba ms": forward["numba"],
        "twin all ms": both["twin"],
        "torch all ms": both["torch"],
        "numba all ms": both["numba"],
        "twin / torch": forward["twin"] / forward["torch"],
        "twin / numba": forward["twin"] / forward["numba"],
        "all: twin / torch": both["twin"] / both["torch"],
        "all: twin / numba": both["twin"] / both["numba"],
    }


def main() -> None:
    parser = arguments("isosurface", __doc__)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[32, 64, 128], help="of the grids; 256 takes 2 GB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report([compare(resolution, args.repeats) for resolution in args.resolutions], args.output)


if __name__ == "__main__":
    main()
