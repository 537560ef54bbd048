"""The gradient laboratory: how a diffusion prior's latent gradient should reach the image, on your own prior and mesh.

    python launch_scripts/gradient_lab.py image      --prompt "a zebra vase"       # Figure 2: routes side by side, a flat picture
    python launch_scripts/gradient_lab.py texture    --prompt "a zebra bunny"      # the same on a mesh; --pairs ten for the judged table
    python launch_scripts/gradient_lab.py thresholds --prompt "a zebra bunny"      # Figure 7: PGC-N by threshold
    python launch_scripts/gradient_lab.py objectives --prompt "a zebra bunny"      # SDS, CSD, ISM, VSD ... side by side
    python launch_scripts/gradient_lab.py tails      --prompt "a zebra bunny"      # how pixel gradients are distributed
    python launch_scripts/gradient_lab.py fit-linear                               # Figure 6: the VAE's linear stand-in

Each writes PNGs, table.json and one self-contained index.html. An interrupted command goes on where it was when it is given again.
`--prior` takes a local diffusers folder, `builtin:pocket` (default) or a hub id such as stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROUTE_HELP = (
    "all, figure2 (the paper's six), or names: latent, vae, linear, pngd, pgc-v, pgc-n, pgc-n-max, pgc-n-adaptive, global-clip, view-rms; "
    "default: all; in objectives pgc-n-adaptive and vae, since no fixed threshold suits gradients of such different sizes"
)
OBJECTIVE_HELP = "sds, csd, nfsd, ssd, ism, sdi, bgt or vsd"


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, wanted a number greater than 0")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, wanted at least 1")
    return value


def quantile(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, wanted a number between 0 and 1, both excluded")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, wanted a number from 0 to 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    model = shared.add_argument_group("prior")
    model.add_argument("--prior", default="builtin:pocket", help="local folder in diffusers layout, builtin:pocket, or hub id")
    model.add_argument("--vae", help="another VAE, such as madebyollin/sdxl-vae-fp16-fix")
    model.add_argument("--dtype", default="auto", choices=("auto", "fp32", "fp16", "bf16"), help="auto: fp16 on CUDA, fp32 on a CPU")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run = shared.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--output", type=Path, help="folder; by default under outputs/gradient-lab")
    run.add_argument("--workers", type=count, help="processes; by default one per core, at most 4, on a CPU and one on a GPU")

    distil = argparse.ArgumentParser(add_help=False)
    objective = distil.add_argument_group("score distillation")
    objective.add_argument("--negative-prompt", help="default: none; nfsd needs one, and on the bundled model has one")
    objective.add_argument(
        "--guidance-scale", type=float, help="default: the objective's own; for sds and bgt 100 as in the paper, 30 for the bundled model"
    )
    objective.add_argument(
        "--cfg", choices=("authors", "diffusers"), help="authors: effective scale s + 1; default: the objective's own, authors for sds"
    )
    objective.add_argument("--t-range", type=share, nargs=2, metavar=("LOW", "HIGH"), help="shares of the training timesteps")
    objective.add_argument("--threshold", type=positive, default=0.1, help="c, in units of d(loss)/d(pixel in [0, 1])")
    objective.add_argument("--quantile", type=quantile, default=0.99, help="of the adaptive threshold")
    objective.add_argument("--window", type=count, default=100, help="steps that the adaptive threshold remembers")

    single = argparse.ArgumentParser(add_help=False)
    single.add_argument("--objective", default="sds", help=OBJECTIVE_HELP)

    routes = argparse.ArgumentParser(add_help=False)
    group = routes.add_argument_group("routes")
    group.add_argument("--routes", nargs="+", help=ROUTE_HELP)
    group.add_argument(
        "--linear-map", default="fit", help="of route linear: fit (on generated renders), paper (SDXL's VAE), or a file of fit-linear"
    )

    textured = argparse.ArgumentParser(add_help=False)
    group = textured.add_argument_group("textures")
    group.add_argument("--prompt", help="what to make; needs --mesh or takes the last word's bundled mesh")
    group.add_argument("--mesh", help="mesh file or builtin:NAME; default builtin:bunny")
    group.add_argument("--pairs", choices=("ten",), help="ten prompt-mesh pairs of the bundled model's vocabulary, in place of --prompt")
    group.add_argument(
        "--controlnet", help="depth ControlNet; default: the bundled one for the bundled model, none for others; 'none' for none"
    )
    group.add_argument(
        "--runs", type=Path, metavar="FOLDER", help="where runs lie; texture, thresholds and objectives can share it; default: --output"
    )
    group.add_argument("--seeds", type=count, default=1, help="runs of each kind, with seeds from --seed on")
    group.add_argument("--steps", type=count, help="default 250 for the bundled model (150 in objectives), 1200 for others")
    group.add_argument("--views", type=count, default=4, help="cameras per step")
    group.add_argument("--lr", type=positive, default=0.01, help="of the hash grid; the MLP has a tenth")
    group.add_argument("--preset", help="size of the texture field; default: pocket for the bundled model, reference for others")
    group.add_argument(
        "--inject", nargs="+", default=["none"], choices=("none", "latent", "image"), help="put outliers into 0.1 %% of the pixels, where"
    )

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    image = commands.add_parser("image", parents=[shared, distil, single, routes], help="distil a flat picture along each route")
    image.add_argument("--prompt", required=True)
    image.add_argument("--start", "--from", type=Path, metavar="PICTURE", help="picture to start from; default: grey with a little noise")
    image.add_argument("--steps", type=count, default=500)
    image.add_argument("--lr", type=positive, default=0.01)
    image.add_argument(
        "--inject", default="none", choices=("none", "latent", "image"), help="put outliers into 0.1 %% of the pixels, where"
    )
    commands.add_parser("texture", parents=[shared, distil, single, routes, textured], help="distil the texture of a mesh along each route")
    objectives = commands.add_parser(
        "objectives", parents=[shared, distil, routes, textured], help="distil the texture of a mesh by each objective"
    )
    objectives.add_argument("--objectives", nargs="+", default=["all"], help=f"all, or names: {OBJECTIVE_HELP}")
    thresholds = commands.add_parser("thresholds", parents=[shared, distil, single, textured], help="PGC-N at several thresholds")
    thresholds.add_argument("--thresholds", type=positive, nargs="+", default=[0.01, 0.05, 0.1, 0.5, 1.0])
    thresholds.add_argument("--route", default="pgc-n", choices=("pgc-n", "pgc-n-max", "pgc-v", "pngd", "global-clip", "view-rms"))
    tails = commands.add_parser("tails", parents=[shared, distil, single], help="distribution of pixel gradient norms")
    tails.add_argument("--prompt", default="a zebra bunny")
    tails.add_argument("--mesh", default="builtin:bunny")
    tails.add_argument("--priors", nargs="+", help="several priors, in place of --prior")
    tails.add_argument("--timesteps", type=int, nargs="+", default=[20, 60, 120, 200, 300, 400, 500, 700, 900])
    tails.add_argument("--views", type=count, default=32, help="views per timestep")
    linear = commands.add_parser("fit-linear", parents=[shared], help="ridge regression between rgb and latent")
    linear.add_argument("--images", type=Path, help="folder of pictures; default: generated renders")
    linear.add_argument("--count", type=count, help="use so many pictures; default: all of the folder, or 160 renders")
    linear.add_argument("--ridge", type=positive, default=1e-3)
    return parser


def run(args: argparse.Namespace) -> Path:
    """Check what can be checked before a model is loaded, then do the command; returns its page."""
    from launch_scripts.lab import commands, study
    from launch_scripts.lab.image import read_picture
    from launch_scripts.lab.report import check_guidance
    from launch_scripts.lab.routes import parse_objectives, parse_routes
    from launch_scripts.lab.teacher import POCKET, POCKET_CONTROLNET, ArgumentError, Model
    from launch_scripts.lab.texture import TEN, Pair

    routes = []
    if hasattr(args, "routes"):
        routes = parse_routes(args.routes or (["pgc-n-adaptive", "vae"] if args.command == "objectives" else ["all"]))
    objectives = parse_objectives(args.objectives) if args.command == "objectives" else []
    if hasattr(args, "objective"):
        check_guidance(args)
    pocket = args.prior == POCKET
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.workers is None:
        args.workers = 1 if args.device != "cpu" else min(os.cpu_count() or 1, 4)
    if args.workers > 1 and args.device != "cpu":
        raise ArgumentError(f"--workers: found {args.workers} with device {args.device}, wanted 1: they would share one GPU's memory")
    if hasattr(args, "t_range"):
        if args.t_range is None:
            args.t_range = (0.02, 0.98) if args.command == "image" and args.start is None else (0.02, 0.5)
        if args.t_range[0] > args.t_range[1]:
            raise ArgumentError(f"--t-range: found {args.t_range[0]:g} {args.t_range[1]:g}, wanted LOW at most HIGH")
    controlnet = getattr(args, "controlnet", "none")
    if controlnet is None and pocket:
        controlnet = POCKET_CONTROLNET
    model = Model(args.prior, None if controlnet == "none" else controlnet, args.vae, args.dtype, args.device)

    if args.command == "image":
        if args.start is not None:
            try:
                read_picture(args.start)
            except ValueError as error:
                raise ArgumentError(f"--start: {error}") from error
        return commands.image_command(args, routes, model)
    if args.command in ("texture", "objectives", "thresholds"):
        if (args.prompt is None) == (args.pairs is None):
            raise ArgumentError("--prompt: wanted it, or --pairs ten, and not both")
        if args.pairs is not None and args.mesh is not None:
            raise ArgumentError(f"--mesh: found {args.mesh} with --pairs, which has its own meshes")
        pairs = TEN if args.pairs else (Pair(args.prompt, args.mesh or "builtin:bunny"),)
        for mesh in dict.fromkeys(pair.mesh for pair in pairs):
            check_mesh(mesh)
        args.steps = args.steps or ((150 if args.command == "objectives" else 250) if pocket else 1200)
        check_preset(args.preset)
        if args.command == "texture":
            return study.texture_command(args, routes, model, pairs)
        if args.command == "objectives":
            return study.objectives_command(args, objectives, routes, model, pairs)
        return study.thresholds_command(args, model, pairs)
    if args.command == "tails":
        check_mesh(args.mesh)
        wrong = [t for t in args.timesteps if not 0 <= t < 1000]
        if wrong:
            raise ArgumentError(f"--timesteps: found {wrong[0]}, wanted numbers from 0 to 999")
        return commands.tails_command(
            args, [Model(prior, None, args.vae, args.dtype, args.device) for prior in args.priors or [args.prior]]
        )
    return commands.fit_linear_command(args, model)


def check_mesh(mesh: str) -> None:
    from launch_scripts.lab.teacher import ArgumentError
    from threestudio_pgc.scene.mesh import load_mesh, normalize

    try:
        normalize(load_mesh(mesh))
    except ValueError as error:
        raise ArgumentError(f"--mesh: {error}") from error


def check_preset(preset: str | None) -> None:
    from launch_scripts.lab.teacher import ArgumentError
    from threestudio_pgc.scene.fields import field_config

    if preset is not None:
        try:
            field_config(preset)
        except ValueError as error:
            raise ArgumentError(f"--preset: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a run failed, 2 an argument is wrong, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    from launch_scripts.lab.runs import Interrupted, UnitFailed
    from threestudio_pgc.export.files import ExportError

    try:
        page = run(args)
    except Interrupted:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (UnitFailed, ExportError) as error:
        print(f"gradient_lab {args.command}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"gradient_lab {args.command}: {error}", file=sys.stderr)
        return 2
    print(f"Page: {page}")
    print(f"Table: {page.parent / 'table.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
