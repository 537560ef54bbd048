"""A DMTet fitted to eight silhouettes and normal maps of a mesh, by the renderer alone: how near it comes, and what it costs.

Each fit runs twice: with silhouettes whose gradient comes from the walk across triangles, and by the rule without it, which sees an edge
only in the triangle at the pixel's centre and so loses those of fine meshes. Chamfer distances are in half extents of the mesh.
"""

import time
from functools import partial

import torch
from report import arguments, report

from launch_scripts import fit_shape
from threestudio_pgc.scene.mesh import load_mesh, normalize
from threestudio_pgc.scene.raster.cpu import CpuRasterizer


def fit(name: str, resolution: int, steps: int, walk_steps: int) -> tuple[fit_shape.Fit, float]:
    """The fit, and its processor seconds."""
    target, backend = normalize(load_mesh(f"builtin:{name}")), CpuRasterizer(walk_steps)
    begun = time.process_time()
    found = fit_shape.fit_views(target, resolution=resolution, steps=steps, backend=backend, progress=False)
    return found, time.process_time() - begun


def main() -> None:
    parser = arguments("shape_fit", __doc__)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--meshes", nargs="+", default=["bunny", "teapot", "knot"])
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for resolution in args.resolutions:
        for name in args.meshes:
            run = partial(fit, name, resolution, args.steps)
            (ours, seconds), (without, _) = run(64), run(0)
            rows.append(
                {
                    "mesh": name,
                    "resolution": resolution,
                    "faces": len(ours.mesh.faces),
                    "IoU": ours.iou,
                    "IoU unseen": ours.iou_unseen,
                    "Chamfer": ours.chamfer,
                    "1 - cos": ours.normal_error,
                    "CPU s": seconds,
                    "IoU without walk": without.iou,
                    "Chamfer without / with": without.chamfer / ours.chamfer,
                }
            )
    report(rows, args.output)


if __name__ == "__main__":
    main()
