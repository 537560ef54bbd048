"""Does light bake into the base colour? One mesh of a known base colour, seen under one light, and what two materials make of it.

    python launch_scripts/show_light.py                                    # the bunny, minutes on a CPU
    python launch_scripts/show_light.py --mesh chair.glb --out outputs/chair-light --steps 400

Pictures of the mesh under one light are fitted, without diffusion, by a lit material that knows the light, and by a colour alone, the
paper's setting. Each is then asked for its base colour, and shown under another light; views were not fitted. A colour alone has the
highlights and the shading of the first light in it for ever.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "custom")]

VIEWS = 12
LIGHTS = ("builtin:studio", "builtin:sky")


def base_color(points):
    """(N, 3) points -> (N, 3) display RGB: large checks of changing hue."""
    import torch

    hue = torch.stack([torch.sin(3 * points[:, k] + 2.1 * k) for k in range(3)], dim=-1)
    checks = torch.sin(9 * points).prod(dim=-1, keepdim=True).sign()
    return 0.5 + 0.22 * hue + 0.1 * checks


def build_parser() -> argparse.ArgumentParser:
    from launch_scripts.gradient_lab import count

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="builtin:bunny", help="mesh file or builtin:NAME (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/show-light"), metavar="DIR", help="folder (default %(default)s)")
    parser.add_argument("--steps", type=count, default=300, help="of fitting, each over one view (default %(default)s)")
    parser.add_argument("--size", type=count, default=256, help="pixels of a picture's side (default %(default)s)")
    return parser


def run(args: argparse.Namespace) -> tuple[Path, dict[str, dict[str, float]]]:
    """Fit and write the sheet; returns its path and the PSNR in dB of each material's pictures. Raises MeshError, ExportError."""
    import torch
    from tqdm import tqdm

    from threestudio_pgc.export.pictures import contact_sheet, save_png
    from threestudio_pgc.scene.cameras import orbit_cameras
    from threestudio_pgc.scene.environment import EnvironmentLight
    from threestudio_pgc.scene.fields import HashGridField
    from threestudio_pgc.scene.gbuffer import composite, render_gbuffer
    from threestudio_pgc.scene.hdr import read_hdr
    from threestudio_pgc.scene.materials import PBRMaterial, PBRRanges
    from threestudio_pgc.scene.mesh import load_mesh, normalize
    from threestudio_pgc.scene.raster import make_rasterizer

    mesh, rasterizer = normalize(load_mesh(args.mesh)), make_rasterizer("cpu")
    first, second = (EnvironmentLight(read_hdr(name)) for name in LIGHTS)
    # What the material does not have to find: only the base colour and its roughness are free.
    material = PBRMaterial(PBRRanges(base_color=(0.0, 1.0), roughness=(0.1, 0.9), normal=0.0))

    def seen(cameras):
        gbuffer = render_gbuffer(mesh, cameras, args.size, args.size, rasterizer)
        points, normals = gbuffer.select(gbuffer.position), gbuffer.select(gbuffer.normal)
        view = torch.nn.functional.normalize(cameras.positions[gbuffer.indices // args.size**2] - points, dim=-1)
        return gbuffer, points, normals, view

    def truth(points):
        """Features of the material that the mesh really has; smooth enough to shine."""
        rest = torch.zeros(len(points), 6)
        rest[:, 1] = -0.8
        return torch.cat([torch.logit(base_color(points)), rest], dim=-1)

    orbit = orbit_cameras(VIEWS, elevation_deg=20.0)
    views = [(points, normals, view) for _, points, normals, view in map(seen, orbit)]
    targets = [material(truth(points), first, normals, view) for points, normals, view in views]

    torch.manual_seed(0)
    fields = {"material": HashGridField.from_preset("pocket", n_output=9), "colour alone": HashGridField.from_preset("pocket")}
    looks = {
        "material": lambda features, light, normals, view: material(features, light, normals, view),
        "colour alone": lambda features, light, normals, view: features.sigmoid(),
    }
    for name, field in fields.items():
        rates = {"encoding": 1e-2, "mlp": 1e-3}
        optimizer = torch.optim.Adam([{"params": part, "lr": rates[key]} for key, part in field.parameter_groups().items()], eps=1e-15)
        for step in tqdm(range(args.steps), desc=f"Fitting the {name}", leave=False):
            points, normals, view = views[step * 5 % VIEWS]
            optimizer.zero_grad()
            (looks[name](field(points), first, normals, view) - targets[step * 5 % VIEWS]).square().mean().backward()
            optimizer.step()

    held_out = orbit_cameras(2 * VIEWS, elevation_deg=10.0)[5]
    gbuffer, points, normals, view = seen(held_out)
    with torch.no_grad():
        expected = {
            "fitted light": material(truth(points), first, normals, view),
            "base colour": base_color(points),
            "another light": material(truth(points), second, normals, view),
        }
        found = {"truth": expected}
        for name, field in fields.items():
            features = field(points)
            base = material.maps(features)["base_color"] if name == "material" else features.sigmoid()
            shown = (looks[name](features, first, normals, view), base, looks[name](features, second, normals, view))
            found[name] = dict(zip(expected, shown))
    psnr = {
        name: {column: float(-10 * (found[name][column] - expected[column]).square().mean().log10()) for column in expected}
        for name in fields
    }
    white = torch.ones(1, args.size, args.size, 3)
    pictures = [composite(values, gbuffer, white)[0] for row in found.values() for values in row.values()]
    labels = [
        f"{name}: {column}" + (f", {psnr[name][column]:.1f} dB" if name in psnr else "") for name, row in found.items() for column in row
    ]
    return save_png(args.out / "light.png", contact_sheet(pictures, columns=len(expected), labels=labels)), psnr


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the pictures cannot be written, 2 an argument is wrong."""
    args = build_parser().parse_args(arguments)
    from threestudio_pgc.export.files import ExportError
    from threestudio_pgc.scene.mesh import MeshError

    try:
        sheet, psnr = run(args)
    except MeshError as error:
        print(f"show_light: --mesh: {error}", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"show_light: --out: {error}", file=sys.stderr)
        return 1
    for name, columns in psnr.items():
        print(f"{name}: " + ", ".join(f"{column} {value:.1f} dB" for column, value in columns.items()))
    print(f"Sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
