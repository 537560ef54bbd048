"""Fits a DMTet to silhouettes and normals of a mesh, rendered from a few cameras: the renderer's gradients alone, no diffusion.

    python launch_scripts/fit_shape.py                                   # the bundled bunny, from a sphere, in seconds
    python launch_scripts/fit_shape.py --mesh chair.glb --resolution 128 --size 256 --representation field

Writes the fitted shape as a GLB and a picture beside the mesh's own views, and prints how near they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "custom")]

from threestudio_pgc.scene.cameras import Cameras, fovy_from_focal, look_at_cameras  # noqa: E402
from threestudio_pgc.scene.dmtet import REPRESENTATIONS, FieldShape, VertexShape, read_out  # noqa: E402
from threestudio_pgc.scene.fields import field_config  # noqa: E402
from threestudio_pgc.scene.gbuffer import GBuffer, render_gbuffer  # noqa: E402
from threestudio_pgc.scene.mesh import MeshError, TriangleMesh, load_mesh, normalize  # noqa: E402
from threestudio_pgc.scene.raster import RasterizerBackend, make_rasterizer  # noqa: E402
from threestudio_pgc.scene.reference import mask_loss, normal_loss  # noqa: E402
from threestudio_pgc.scene.regularizers import eikonal, normal_consistency, sign_entropy  # noqa: E402
from threestudio_pgc.scene.signed_distance import MeshDistance, SignedDistance, SphereDistance  # noqa: E402
from threestudio_pgc.scene.tetrahedra import make_grid  # noqa: E402

COARSEST = 32
LEARNING_RATES = {"deformation": 2e-2, "encoding": 2e-3, "mlp": 2e-3}  # falling to a tenth; a vertex's distance learns by 1 / resolution
# Loss: mean squared error of the mask, and so much of these. The sign entropy fades out: it removes what floats, and eats thin parts.
WEIGHTS = {"normal": 0.03, "normal_consistency": 0.03, "eikonal": 0.01, "sign_entropy": 0.05}


@dataclass
class Fit:
    """Figures of a fit. Chamfer distances are means of both directions, in units of the mesh's half extent."""

    mesh: TriangleMesh
    iou: float  # of the masks of the views that were fitted
    iou_unseen: float  # of as many views from between them
    chamfer: float
    normal_error: float  # mean of 1 - cos over the pixels that both cover, in the unseen views
    seconds: float


def around(views: int, offset: float = 0.0) -> Cameras:
    """`views` cameras around the object, looking alternately from above and from below."""
    azimuth = (torch.arange(views) + offset) * 360.0 / views
    elevation = torch.where(torch.arange(views) % 2 == 0, 35.0, -15.0)
    return look_at_cameras(elevation, azimuth, 2.25, fovy_from_focal(torch.tensor(1.1)))


def fit_views(
    target: TriangleMesh,
    *,
    resolution: int = 64,
    size: int = 128,
    views: int = 8,
    steps: int = 150,
    representation: str = "values",
    start_radius: float = 0.7,
    backend: RasterizerBackend | None = None,
    progress: bool = True,
) -> Fit:
    """Move a sphere of `start_radius` to look like `target` (normalised) from `views` cameras at `size` pixels, by Adam.

    From coarse to fine: on grids of half the resolution and so on down to COARSEST first, `steps` on each. A shape moves by about a cell a
    step at most, and what is loose or hollow on a coarse grid is found sooner there.

    backend: the rasteriser, by default the CPU's.
    """
    torch.manual_seed(0)
    started = time.perf_counter()
    backend, cameras = backend or make_rasterizer("cpu"), around(views)
    with torch.no_grad():
        wanted = _reference(render_gbuffer(target, cameras, size, size, backend))
    found, start = None, SphereDistance(start_radius)
    for level in ladder(resolution):
        if found is not None:
            start = MeshDistance(found)
        found = _fit_level(start, cameras, wanted, level, steps, representation, backend, progress)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        unseen = around(views, 0.5)
        ours, theirs = (render_gbuffer(mesh, unseen, size, size, backend, silhouette="none") for mesh in (found, target))
        angle = float(normal_loss(vars(ours), _reference(theirs)))
        seen = render_gbuffer(found, cameras, size, size, backend, silhouette="none").mask, wanted["mask"][..., 0] > 0.5
    return Fit(found, iou(*seen), iou(ours.mask, theirs.mask), chamfer(found, target), angle, seconds)


def ladder(resolution: int) -> list[int]:
    """Resolutions from coarse to fine, the last as given."""
    levels = [resolution]
    while levels[0] >= 2 * COARSEST:
        levels.insert(0, levels[0] // 2)
    return levels


def _fit_level(
    start: SignedDistance,
    cameras: Cameras,
    wanted: dict[str, torch.Tensor],
    resolution: int,
    steps: int,
    representation: str,
    backend: RasterizerBackend,
    progress: bool,
) -> TriangleMesh:
    from tqdm import tqdm

    grid, size = make_grid(resolution), wanted["mask"].shape[1]
    shape = VertexShape(grid) if representation == "values" else FieldShape(field_config("pocket", n_output=4, hidden_layers=2, gain=1.0))
    shape.fit(start, grid, seed=0, progress=progress)
    rates = LEARNING_RATES | {"sdf": 1 / resolution}
    groups = [{"params": [p], "lr": rates[n.split(".")[0]]} for n, p in shape.named_parameters()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (step / steps))
    for step in tqdm(range(steps), desc=f"fitting at {resolution}", disable=not progress):
        if step % 10 == 0:
            shape.refresh()
        mesh = read_out(shape, grid)
        seen = vars(render_gbuffer(mesh, cameras, size, size, backend, silhouette="antialias"))
        loss = mask_loss(seen, wanted) + WEIGHTS["normal"] * normal_loss(seen, wanted)
        loss = loss + WEIGHTS["normal_consistency"] * normal_consistency(mesh.vertices, mesh.faces, mesh.adjacency)
        loss = loss + WEIGHTS["eikonal"] * eikonal(mesh.grid_positions, mesh.sdf, mesh.crossed_tets())
        loss = loss + WEIGHTS["sign_entropy"] * (1 - step / steps) * sign_entropy(mesh.sdf, grid.edges)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    shape.refresh()
    with torch.no_grad():
        mesh = read_out(shape, grid)
    return TriangleMesh(mesh.vertices, mesh.faces, adjacency=mesh.adjacency)


def _reference(gbuffer: GBuffer) -> dict[str, torch.Tensor]:
    return {"mask": gbuffer.opacity, "normal": gbuffer.view_normal}


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    """Intersection over union of two bool masks."""
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def chamfer(a: TriangleMesh, b: TriangleMesh, samples: int = 30_000) -> float:
    """Mean distance from random points of either surface to the nearest of the other's, of both directions, in half extents of `b`."""
    import trimesh
    from scipy.spatial import cKDTree

    solids = [trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False) for mesh in (a, b)]
    points = [trimesh.sample.sample_surface(solid, samples, seed=0)[0] for solid in solids]
    half_extent = float(b.vertices.abs().max())
    return float(sum(cKDTree(points[1 - i]).query(points[i])[0].mean() for i in range(2)) / 2) / half_extent


def picture(found: TriangleMesh, target: TriangleMesh, size: int, views: int) -> np.ndarray:
    """Rows of normals seen from `views` cameras: the mesh's above, the fit's below."""
    from threestudio_pgc.export.pictures import contact_sheet

    backend, tiles = make_rasterizer("cpu"), []
    for mesh in (target, found):
        gbuffer = render_gbuffer(mesh, around(views, 0.25), size, size, backend)
        tiles += list(((gbuffer.view_normal * 0.5 + 0.5) * gbuffer.opacity + 1 - gbuffer.opacity).numpy())
    return contact_sheet(tiles, views)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 an argument is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="builtin:bunny", help="mesh file or builtin:NAME (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/fit-shape"), metavar="DIR", help="folder (default %(default)s)")
    parser.add_argument("--resolution", type=int, default=64, help="of the tetrahedral grid (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="pixels of a view's side (default %(default)s)")
    parser.add_argument("--views", type=int, default=8, help="cameras around (default %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of Adam on each grid from coarse to fine (default %(default)s)")
    parser.add_argument("--representation", choices=REPRESENTATIONS, default="values", help="of the shape (default %(default)s)")
    args = parser.parse_args(arguments)
    from threestudio_pgc.export.pictures import save_png
    from threestudio_pgc.export.textured_mesh import export_textured_mesh

    try:
        target = normalize(load_mesh(args.mesh))
        options = {"resolution": args.resolution, "size": args.size, "views": args.views, "steps": args.steps}
        fit = fit_views(target, **options, representation=args.representation)
    except (MeshError, ValueError) as error:
        print(f"fit_shape: {error}", file=sys.stderr)
        return 2
    print(f"{args.mesh}: mask IoU {fit.iou:.4f}, between the views {fit.iou_unseen:.4f}; Chamfer {fit.chamfer:.4f}; {fit.seconds:.1f} s")
    print(f"Picture: {save_png(args.out / 'views.png', picture(fit.mesh, target, args.size, args.views))}")

    def grey(points, normals):
        return {"base_color": torch.full_like(points, 0.6)}

    written = export_textured_mesh(fit.mesh, grey, args.out, "shape", formats=["glb"], resolution=64)
    print(f"GLB: {written['glb']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
