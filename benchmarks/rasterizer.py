"""The CPU rasteriser against its plain torch twin and against embree's rays, on a closed torus: processor time, one view, one thread.

Embree needs a new acceleration structure whenever the mesh moves, as it does while a shape is optimised ("embree, changed mesh"), and
only the rays where it stands still ("embree, same mesh"). Ratios are the other's time over ours.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from report import arguments, report

from threestudio_pgc.scene.cameras import look_at_cameras
from threestudio_pgc.scene.gbuffer import render_gbuffer
from threestudio_pgc.scene.mesh import TriangleMesh
from threestudio_pgc.scene.raster.cpu import CpuRasterizer
from threestudio_pgc.scene.raster.reference import ReferenceRasterizer


def torus(triangles: int) -> TriangleMesh:
    """A bumpy torus of about so many triangles, which hides parts of itself."""
    rows = round((triangles / 2) ** 0.5)
    row, column = np.meshgrid(np.arange(rows), np.arange(rows), indexing="ij")
    u, v = row * (2 * np.pi / rows), column * (2 * np.pi / rows)
    tube = 0.25 + 0.03 * np.sin(7 * u) * np.sin(5 * v)
    ring = 0.55 + tube * np.cos(v)
    vertices = np.stack([ring * np.cos(u), ring * np.sin(u), tube * np.sin(v)], axis=-1).reshape(-1, 3)
    a, b = row * rows + column, (row + 1) % rows * rows + column
    c, d = (row + 1) % rows * rows + (column + 1) % rows, row * rows + (column + 1) % rows
    faces = np.concatenate([np.stack([a, b, c], axis=-1).reshape(-1, 3), np.stack([a, c, d], axis=-1).reshape(-1, 3)])
    return TriangleMesh(torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(faces))


def median_milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median processor time of `run`: everything here is serial, and other work on the machine should not count."""
    run()
    times = []
    for _ in range(max(1, repeats)):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return 1e3 * sorted(times)[len(times) // 2]


def compare(mesh: TriangleMesh, size: int, repeats: int) -> dict[str, float | None]:
    camera, ours, twin = look_at_cameras(40.0, 30.0, 2.25, 0.93), CpuRasterizer(), ReferenceRasterizer()
    clip = camera.clip(mesh.vertices)
    rast = ours.rasterize(clip, mesh.faces, size, size)
    color, moving = torch.rand(1, size, size, 3), clip.clone().requires_grad_()
    adjacency = mesh.face_adjacency()

    def antialias(positions):
        return ours.antialias(color, rast, positions, mesh.faces, adjacency)

    base = median_milliseconds(lambda: ours.rasterize(clip, mesh.faces, size, size), repeats)
    row = {
        "faces": len(mesh.faces),
        "size": size,
        "covered": float((rast[..., 3] > 0).float().mean()),
        "ours ms": base,
        "smooth mask ms": median_milliseconds(lambda: ours.smooth_mask(clip, rast, mesh.faces), repeats),
        "antialias ms": median_milliseconds(lambda: antialias(clip), repeats),
        "antialias forward + backward / ours": median_milliseconds(lambda: antialias(moving).backward(color), repeats) / base,
        "whole G-buffer ms": median_milliseconds(lambda: render_gbuffer(mesh, camera, size, size, ours), repeats),
        "torch twin / ours": median_milliseconds(lambda: twin.rasterize(clip, mesh.faces, size, size), repeats) / base,
        "embree, changed mesh / ours": None,
        "embree, same mesh / ours": None,
        "same triangle": None,
    }
    try:
        import trimesh
        from trimesh.ray.ray_pyembree import RayMeshIntersector
    except ImportError:
        return row
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    far = torch.stack([x, y, torch.ones_like(x), torch.ones_like(x)], dim=-1).reshape(-1, 4)
    world = far @ torch.linalg.inv(camera.mvp[0].double()).T
    origin = camera.positions.double().expand(len(world), 3).numpy()
    direction = (world[:, :3] / world[:, 3:] - camera.positions.double()).numpy()
    solid = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    standing = RayMeshIntersector(solid)
    changed = median_milliseconds(lambda: RayMeshIntersector(solid).intersects_first(origin, direction), repeats)
    row["embree, changed mesh / ours"] = changed / base
    row["embree, same mesh / ours"] = median_milliseconds(lambda: standing.intersects_first(origin, direction), repeats) / base
    row["same triangle"] = float((rast[0, ..., 3].reshape(-1).numpy() - 1 == standing.intersects_first(origin, direction)).mean())
    return row


def main() -> None:
    args = arguments("rasterizer", __doc__).parse_args()
    torch.set_num_threads(1)
    rows = [compare(torus(triangles), size, args.repeats) for triangles in (5_000, 50_000, 200_000) for size in (128, 256, 512)]
    if rows[0]["same triangle"] is None:
        print("embreex is not installed (pip install -r requirements-test.txt): the columns for embree stay empty")
    report(rows, args.output)


if __name__ == "__main__":
    main()
