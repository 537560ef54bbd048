"""Unwrap, bake and GLB of a bumpy torus with all maps, against xatlas with its defaults and trimesh's export of the same asset: wall time.

xatlas by itself runs in the same kind of process and packs at the same resolution; it differs in the charts. It is ended at a limit, since
200k faces take it minutes; the ratio is then a lower bound. trimesh gets vertices, texture coordinates and decoded pictures, encodes and
writes them. The maps are closed forms: the time of a field comes on top of the bake. Ratios are the other's time over ours.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from rasterizer import torus
from report import arguments, median_seconds, report

from threestudio_pgc.export import unwrap as unwrapping
from threestudio_pgc.export.box_projection import box_projection
from threestudio_pgc.export.textured_mesh import export_textured_mesh
from threestudio_pgc.scene.mesh import TriangleMesh

T = TypeVar("T")


def maps(points: torch.Tensor, normals: torch.Tensor) -> dict[str, torch.Tensor]:
    wave = 0.5 + 0.5 * torch.sin(20 * points)
    bumped = torch.nn.functional.normalize(normals + 0.2 * torch.cos(20 * points), dim=1)
    return {"base_color": wave, "occlusion": wave[:, :1], "roughness": wave[:, 1:2], "metallic": wave[:, 2:], "normal": bumped}


def timed(run: Callable[[], T]) -> tuple[float, T]:
    begun = time.perf_counter()
    result = run()
    return time.perf_counter() - begun, result


def seconds_by_stage(mesh: TriangleMesh, folder: Path, resolution: int) -> dict[str, float]:
    """Seconds of the stages of one export, by name."""
    entered: dict[str, float] = {}
    export_textured_mesh(
        mesh,
        maps,
        folder,
        "asset",
        formats=("glb",),
        resolution=resolution,
        progress=lambda stage, share: entered.setdefault(stage, time.perf_counter()),
    )
    begun = list(entered.values())
    return {stage: end - start for stage, start, end in zip(entered, begun, begun[1:])}


def by_its_defaults(mesh: TriangleMesh, resolution: int, limit: float) -> None:
    """xatlas without a limit to its charts; ended at the limit in seconds."""
    try:
        packing = min(resolution, unwrapping.PACKING_RESOLUTION)
        unwrapping._run_xatlas(mesh.vertices.numpy(), mesh.faces.numpy(), 0.0, packing, 2, limit, None)
    except unwrapping._NoAtlas as failure:
        print(f"{failure}; its ratio is a lower bound")


def compare(faces: int, resolution: int, limit: float, repeats: int) -> dict[str, float | str]:
    import trimesh

    mesh = torus(faces)
    own, atlas = timed(lambda: unwrapping.unwrap(mesh, resolution=resolution))
    defaults, _ = timed(lambda: by_its_defaults(mesh, resolution, limit))
    mesh = dataclasses.replace(mesh, uvs=torch.from_numpy(atlas.uvs), uv_faces=torch.from_numpy(atlas.uv_faces))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = [seconds_by_stage(mesh, folder, resolution) for _ in range(repeats + 1)][1:]
        write = sorted(stage["encoding"] + stage["writing"] for stage in stages)[repeats // 2]
        scene = trimesh.load(folder / "asset.glb", process=False)
        theirs = median_seconds(lambda: scene.export(str(folder / "trimesh.glb"), include_normals=True), repeats)
        megabytes = [(folder / f"{stem}.glb").stat().st_size / 1e6 for stem in ("asset", "trimesh")]
    return {
        "faces": len(mesh.faces),
        "unwrap s": own,
        "source": atlas.source,
        "xatlas s": defaults,
        "xatlas / unwrap": defaults / own,
        "box s": median_seconds(lambda: box_projection(mesh), repeats),
        "usable s": median_seconds(lambda: unwrapping.usable_uvs(mesh), repeats),
        "bake s": sorted(stage["baking"] for stage in stages)[repeats // 2],
        "write s": write,
        "trimesh s": theirs,
        "trimesh / write": theirs / write,
        "MB": megabytes[0],
        "trimesh MB": megabytes[1],
    }


def main() -> None:
    parser = arguments("export", __doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--faces", type=int, nargs="+", default=[5_000, 50_000, 200_000])
    parser.add_argument("--resolution", type=int, default=2048, help="of the textures")
    parser.add_argument("--xatlas-seconds", type=float, default=60.0, help="limit of xatlas with its defaults")
    args = parser.parse_args()
    rows = [compare(faces, args.resolution, args.xatlas_seconds, args.repeats) for faces in args.faces]
    report(rows, args.output)


if __name__ == "__main__":
    main()
