"""Trains the bundled "pocket" model from nothing: renders, VAE, U-Net, text encoders, ControlNets, and a U-Net for normal maps.

    python launch_scripts/train_pocket.py                     # everything, about two hours on two cores
    python launch_scripts/train_pocket.py --stage unet --minutes-unet 20 --resume
    python launch_scripts/train_pocket.py --stage normal --views 2560            # a normal ControlNet for the model that is in --assets
    python launch_scripts/train_pocket.py --stage normal-unet --workers 1        # a U-Net for normal maps, likewise
    python launch_scripts/train_pocket.py --smoke --output /tmp/pocket   # every stage in a minute, to see that it runs

Work files go to --output (default: pocket_training/, which git ignores); `export`, `normal` and `normal-unet` write the model folders to
--assets.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch_scripts.pocket import export, normal_unet, normals, renders, text, unet, vae  # noqa: E402
from launch_scripts.pocket.training import Schedule, checkpoint_path, load_modules, train  # noqa: E402

STAGES = ("data", "vae", "encode", "text", "unet", "controlnet", "export", "normal", "normal-unet")

# Sizes of the shipped model, and of a model that only shows that every stage runs.
FULL = {
    "views": 10240, "normal_maps": 16384, "per_chunk": 32, "vae_channels": (16, 32, 64, 64), "unet_channels": (96, 128, 160), "batch": 32,
    "crop": 64, "text_widths": (64, 128), "steps": 10**9,
}  # fmt: skip
SMOKE = {
    "views": 8, "normal_maps": 16, "per_chunk": 4, "vae_channels": (8, 8, 16, 16), "unet_channels": (32, 32, 64), "batch": 4, "crop": 32,
    "text_widths": (32, 32), "steps": 12,
}  # fmt: skip


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--output", type=Path, default=ROOT / "pocket_training", help="work folder")
    parser.add_argument("--assets", type=Path, default=None, help="where `export` writes; else the package's assets")
    parser.add_argument("--minutes-vae", type=float, default=14.0)
    parser.add_argument("--minutes-unet", type=float, default=30.0, help="U-Net and text encoders without control")
    parser.add_argument("--minutes-controlnet", type=float, default=20.0, help="ControlNet and U-Net together")
    parser.add_argument("--minutes-normal", type=float, default=12.0, help="normal ControlNet alone")
    parser.add_argument("--minutes-normal-unet", type=float, default=35.0, help="U-Net for normal maps alone")
    parser.add_argument("--views", type=int, default=None, help="rendered views, else 10240 of four pictures each and 16384 normal maps")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue each stage from its checkpoint; without it stages begin anew")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and set, a dozen steps a stage")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers: {args.workers}; want at least 1")
    if args.views is not None and args.views < 4:
        parser.error(f"--views: {args.views}; want at least 4")
    for name in ("vae", "unet", "controlnet", "normal", "normal-unet"):
        if getattr(args, f"minutes_{name.replace('-', '_')}") <= 0:
            parser.error(f"--minutes-{name}: want more than 0")
    if args.smoke:
        args.workers = 1
    if args.assets is None:
        args.assets = args.output / "assets" if args.smoke else ROOT / "custom" / "threestudio_pgc" / "assets"
    return args


def in_workers(function, workers: int, *arguments) -> None:
    """Runs function(*arguments, worker, workers) in `workers` processes; raises if one fails."""
    if workers == 1:
        function(*arguments, 0, 1)
        return
    processes = [mp.get_context("spawn").Process(target=function, args=(*arguments, k, workers)) for k in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{function.__name__}: a worker failed; see above")


def stage_data(args, sizes) -> None:
    in_workers(make_data, args.workers, args.output, sizes["views"], args.seed, sizes["per_chunk"])
    print(f"data: {renders.pack_data(args.output)} images", flush=True)
    images = np.load(args.output / "images.npy", mmap_mode="r")
    count = min(96, len(images) // 8 * 8)
    shown = np.asarray(images[np.linspace(0, len(images) - 1, count).astype(int)])
    renders.sheet(shown, 8 if count < 96 else 12).save(args.output / "data.png")


def make_data(output: Path, views: int, seed: int, per_chunk: int, worker: int, workers: int) -> None:
    renders.make_data(output, views, seed, worker, workers, per_chunk)


def stage_vae(args, sizes) -> None:
    torch.manual_seed(args.seed)
    stage = vae.VaeStage(vae.build_vae(sizes["vae_channels"]), args.output, batch=16 if not args.smoke else 4, crop=sizes["crop"])
    schedule = Schedule(args.minutes_vae, sizes["steps"], args.workers, 1.5e-3, decay_from=0.3, ema=0.997, seed=args.seed)
    trained = train(stage, schedule, args.output, args.resume)["vae"]
    images = np.load(args.output / "images.npy", mmap_mode="r")
    vae.whiten(trained, np.asarray(images[:: max(1, len(images) // 512)]))
    trained.save_pretrained(args.output / "vae")


def stage_encode(args, sizes) -> None:
    in_workers(encode, args.workers, args.output, args.output / "vae", True)
    join_latents(args.output, args.workers)


def join_latents(output: Path, workers: int) -> None:
    latents = np.concatenate([np.load(output / f"latents-{k}.npy") for k in range(workers)])
    np.save(output / "latents.npy", latents)
    deviation = latents[:1024].astype(np.float32).std((0, 1, 3, 4))
    print(f"encode: {latents.shape}, deviation by channel {np.round(deviation, 2).tolist()}", flush=True)


def encode(output: Path, model: Path, mirrored: bool, worker: int, workers: int) -> None:
    from diffusers import AutoencoderKL

    vae.encode_set(AutoencoderKL.from_pretrained(model), output, worker, workers, mirrored=mirrored)


def stage_text(args, sizes) -> None:
    write_tokens(args.output, text.build_tokenizer(args.output / "tokenizer"))


def write_tokens(output: Path, tokenizer) -> None:
    records = json.loads((output / "records.json").read_text())
    captions = [caption for record in records for caption in record["captions"]]
    ids = text.tokenize(tokenizer, captions).numpy().astype(np.int16).reshape(len(records), -1, text.MAX_LENGTH)
    np.save(output / "tokens.npy", ids)
    longest = (ids != tokenizer.pad_token_id).sum(-1).max() + 1
    print(f"text: {len(tokenizer)} tokens, {len(captions)} captions of at most {longest} of them", flush=True)


def build_modules(args, sizes, control: bool) -> dict:
    torch.manual_seed(args.seed + 1)
    return unet.build_modules(args.output, sizes["unet_channels"], sizes["text_widths"], control)


def stage_unet(args, sizes) -> None:
    stage = unet.DiffusionStage(build_modules(args, sizes, False), args.output, sizes["batch"])
    schedule = Schedule(args.minutes_unet, sizes["steps"], args.workers, 6e-4, decay_from=1.0, seed=args.seed, preview_seconds=420)
    train(stage, schedule, args.output, args.resume)


def stage_controlnet(args, sizes) -> None:
    modules = build_modules(args, sizes, True)
    resumed = args.resume and checkpoint_path(args.output, "controlnet").exists()
    if not resumed:
        load_modules(args.output, "unet", modules, averaged=False)
        unet.start_control(modules)
    stage = unet.DiffusionStage(modules, args.output, sizes["batch"])
    minutes, seed = args.minutes_controlnet, args.seed + 5
    schedule = Schedule(minutes, sizes["steps"], args.workers, 6e-4, decay_from=0.35, seed=seed, preview_seconds=420)
    train(stage, schedule, args.output, args.resume)


def stage_export(args, sizes) -> None:
    modules = build_modules(args, sizes, True)
    load_modules(args.output, "controlnet", modules)
    export.export(modules, args.output, args.assets)


def stage_normal(args, sizes) -> None:
    from transformers import CLIPTokenizer

    if not (args.output / "vae").exists():  # a folder that did not make the model
        shutil.copytree(args.assets / export.PIPELINE / "vae", args.output / "vae")
    if not (args.output / "latents.npy").exists():
        stage_data(args, sizes)
        stage_encode(args, sizes)
    # The finished model's own tokenizer: one that is built again numbers some words otherwise.
    write_tokens(args.output, CLIPTokenizer.from_pretrained(args.assets / export.PIPELINE / "tokenizer"))
    torch.manual_seed(args.seed + 2)
    stage = normals.NormalStage(args.assets, args.output, sizes["batch"])
    schedule = Schedule(args.minutes_normal, sizes["steps"], args.workers, 4e-4, decay_from=0.3, seed=args.seed + 7, preview_seconds=240)
    export.export_network(train(stage, schedule, args.output, args.resume)["controlnet"], args.assets / export.NORMAL_CONTROL)


def stage_normal_unet(args, sizes) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    finished, folder = args.assets / export.PIPELINE, args.output / "normal_maps"
    if not (folder / "latents.npy").exists():
        in_workers(renders.make_normal_data, args.workers, folder, sizes["normal_maps"], args.seed, sizes["per_chunk"])
        count = renders.pack_data(folder)
        images, model = np.load(folder / "images.npy", mmap_mode="r"), AutoencoderKL.from_pretrained(finished / "vae")
        quality = vae.psnr_of(model, images[:: max(1, count // 512)])
        print(f"normal-unet: {count} normal maps, which the VAE gives back at {quality:.2f} dB", flush=True)
        vae.comparison(model, images[:: max(1, count // 24)], 8).save(folder / "vae.png")
        in_workers(encode, args.workers, folder, finished / "vae", False)
        join_latents(folder, args.workers)
    write_tokens(folder, CLIPTokenizer.from_pretrained(finished / "tokenizer"))
    torch.manual_seed(args.seed + 3)
    stage = normal_unet.NormalUnetStage(args.assets, folder, sizes["batch"])
    minutes, seed = args.minutes_normal_unet, args.seed + 11
    schedule = Schedule(minutes, sizes["steps"], args.workers, 5e-4, decay_from=0.4, seed=seed, preview_seconds=600)
    export.export_network(train(stage, schedule, folder, args.resume)["unet"], args.assets / export.NORMAL_UNET)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(1)
    sizes = dict(SMOKE if args.smoke else FULL)
    if args.views:
        sizes["views"] = sizes["normal_maps"] = args.views
    args.output.mkdir(parents=True, exist_ok=True)
    for name in STAGES if args.stage == "all" else (args.stage,):
        started = time.time()
        globals()[f"stage_{name.replace('-', '_')}"](args, sizes)
        print(f"{name}: done in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
