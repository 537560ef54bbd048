"""What a ControlNet is shown of a mesh: depth and normals in every convention, rendered on the CPU, as PNGs to look at.

    python launch_scripts/show_control.py                                  # the bundled plaque with letters, which shows any mirroring
    python launch_scripts/show_control.py --mesh chair.glb --views 8 --out outputs/chair-control

Look for: letters that read from left to right, near parts bright, and in a normal image one colour per side that a surface faces.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ELEVATION = 15.0  # degrees, of every view


def build_parser() -> argparse.ArgumentParser:
    from launch_scripts.gradient_lab import count

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="builtin:lettered", help="mesh file or builtin:NAME (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/show-control"), metavar="DIR", help="folder (default %(default)s)")
    parser.add_argument("--views", type=count, default=4, help="cameras evenly around, the first in front (default %(default)s)")
    parser.add_argument("--size", type=count, default=256, help="pixels of a picture's side (default %(default)s)")
    return parser


def run(args: argparse.Namespace) -> Path:
    """Render and write everything; returns the sheet's path. Raises MeshError, or ExportError where the folder cannot be written."""
    from launch_scripts.lab.drawing import GridRow, image_grid
    from threestudio_pgc.diffusion.control import NORMAL_CONVENTIONS, make_control
    from threestudio_pgc.export.pictures import save_png
    from threestudio_pgc.scene.cameras import orbit_cameras
    from threestudio_pgc.scene.gbuffer import render_gbuffer
    from threestudio_pgc.scene.mesh import load_mesh, normalize
    from threestudio_pgc.scene.raster import make_rasterizer

    mesh = normalize(load_mesh(args.mesh))
    cameras, rasterizer = orbit_cameras(args.views, ELEVATION), make_rasterizer("cpu")
    rows = []
    for view, camera in enumerate(cameras):
        gbuffer = render_gbuffer(mesh, camera, args.size, args.size, rasterizer)
        lit = gbuffer.view_normal[..., 2:].clamp(min=0)  # as by a lamp at the camera
        pictures = {"shading": gbuffer.opacity * lit + 1 - gbuffer.opacity, "depth": make_control("depth", vars(gbuffer))}
        for name in NORMAL_CONVENTIONS:
            pictures[f"normal, {name}"] = make_control("normal", vars(gbuffer), normal_convention=name)
        pictures = {name: picture[0].expand(-1, -1, 3).numpy() for name, picture in pictures.items()}
        for name, picture in pictures.items():
            save_png(args.out / f"view{view}-{name.replace(', ', '-')}.png", picture)
        rows.append(GridRow(f"azimuth {float(camera.azimuth_deg):g}\N{DEGREE SIGN}", "rgb", list(pictures.values())))
    title = f"Control images of {args.mesh}, elevation {ELEVATION:g}\N{DEGREE SIGN}"
    return save_png(args.out / "sheet.png", image_grid(rows, list(pictures), title=title, row_height=args.size))


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the pictures cannot be written, 2 an argument is wrong."""
    args = build_parser().parse_args(arguments)
    import launch_scripts.lab  # noqa: F401  makes the package importable
    from threestudio_pgc.export.files import ExportError
    from threestudio_pgc.scene.mesh import MeshError

    try:
        sheet = run(args)
    except MeshError as error:
        print(f"show_control: --mesh: {error}", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"show_control: --out: {error}", file=sys.stderr)
        return 1
    print(f"Pictures: {sheet.parent}")
    print(f"Sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
