"""The subcommands `image`, `tails` and `fit-linear`: lay out the runs, do them, draw what was found. Each returns the page it wrote."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threestudio_pgc.export.pictures import save_png
from threestudio_pgc.pixelgrad.linear_map import PAPER_ENCODER, PAPER_MATRICES, shrink

from . import drawing
from .drawing import GridRow
from .image import image_work, read_picture
from .linear import LinearFit, fit_linear_maps, picture_files, require_pictures, save_linear_maps
from .page import Section
from .renders import textured_renders
from .report import (
    FIT_PICTURES,
    GRADIENT_NOTE,
    check_linear,
    column_label,
    default_folder,
    finish,
    gradient_rows,
    linear_map_for,
    load_picture,
    negative_of,
    objective_of,
    slug,
    unit_prefix,
    write_table,
)
from .routes import ROUTES, Route
from .runs import Unit, run_units
from .tails import AFTER, LATENT, NOISE, RAW, tails_work
from .teacher import Model, encode_prompts, latent_channels, load_prior

# --------------------------------------------------------------------------------------------------------------------- image


def image_command(args: argparse.Namespace, routes: Sequence[Route], model: Model) -> Path:
    """Distil one picture along each route."""
    channels = latent_channels(model)
    check_linear(args, routes, channels)
    folder = default_folder(args, "image", slug(args.prompt))
    objective = replace(objective_of(args, model, args.objective), inject=args.inject)
    negative = negative_of(args, model, args.objective)
    encode_prompts(model, [args.prompt], [negative])
    linear = linear_map_for(args, model, routes, folder)
    common = {
        "model": model.as_settings(),
        "prompt": args.prompt,
        "negative": negative,
        "steps": args.steps,
        "lr": args.lr,
        "seed": args.seed,
        "start": None if args.start is None else str(args.start),
        "objective": objective.as_settings(),
    }
    units = [
        Unit(
            f"runs/{unit_prefix(objective)}{route.name}",
            common | {"route": route.name, "linear_map": linear if route.pullback == "linear" else None},
            args.steps,
        )
        for route in routes
    ]
    found = run_units(units, image_work, folder, workers=args.workers, label="image")
    folders = [folder / unit.name for unit in units]
    rows = [GridRow("result", "rgb", [load_picture(place / "result.png") for place in folders]), *gradient_rows(folders)]
    grid = save_png(folder / "routes.png", drawing.image_grid(rows, [column_label(route) for route in routes], title=args.prompt))
    table = [{"route": route.name, **record["mean"], "seconds": record["seconds"]} for route, record in zip(routes, found)]
    write_table(folder / "table.json", table, settings=common)
    return finish(
        folder,
        f"Gradient routes, image: {args.prompt}",
        common,
        [
            Section("Routes", GRADIENT_NOTE, [(grid, f"{args.prompt}, {args.steps} steps.")]),
            Section("Gradients before the rule, means over the run", table=table),
        ],
    )


# --------------------------------------------------------------------------------------------------------------------- tails


def tails_command(args: argparse.Namespace, models: Sequence[Model]) -> Path:
    """Distribution of pixel gradient norms by timestep and prior, before and after each rule."""
    for model in models:
        latent_channels(model)
    folder = default_folder(args, "tails", slug(args.prompt))
    sections, table = [], []
    units, objectives = {}, {}
    for model in models:
        objectives[model] = objective_of(args, model, args.objective)
        negative = negative_of(args, model, args.objective)
        encode_prompts(model, [args.prompt], [negative])
        for timestep in args.timesteps:
            settings = {
                "model": model.as_settings(),
                "prompt": args.prompt,
                "mesh": args.mesh,
                "negative": negative,
                "timestep": timestep,
                "views": args.views,
                "seed": args.seed,
                "objective": objectives[model].as_settings(),
            }
            place = f"runs/{unit_prefix(objectives[model])}{slug(model.prior)}/t{timestep}"
            units[model, timestep] = Unit(place, settings, args.views)
    found = dict(zip(units, run_units(list(units.values()), tails_work, folder, workers=args.workers, label="tails")))
    shapes = {}
    for model in models:
        norms = {t: read_norms(folder / units[model, t].name) for t in args.timesteps}
        shapes[model.prior] = relative(norms, RAW)
        figures = tail_figures(norms, model.prior, objectives[model].threshold)
        images = [(save_png(folder / f"{slug(model.prior)}-{name}.png", figure), caption) for name, figure, caption in figures]
        sections.append(Section(f"Norms: {model.prior}", "", images))
        for timestep in args.timesteps:
            for kind, numbers in found[model, timestep].items():
                if isinstance(numbers, dict):
                    table.append({"prior": model.prior, "t": timestep, "gradient": kind, **numbers})
    if len(models) > 1:
        figure = drawing.histogram_figure(shapes, title="Shape of the tail by prior", xlabel="norm / median of its timestep")
        sections.append(Section("Priors side by side", "", [(save_png(folder / "priors.png", figure), "Raw gradients at the image.")]))
    sections.append(
        Section(
            "Numbers",
            "raw: at the image, before any rule; latent: norm over the latent's channels; noise: white noise of the latent gradient's size "
            'pulled back through the encoder; then each rule\'s. "object" counts pixels on the object only. isolated: share of all pixels '
            "above ten times the median of the 5 x 5 around them. Kurtosis is 3.1 and p99.9/p50 2.6 for the norm of a Gaussian 3-vector.",
            table=table,
        )
    )
    settings = {
        "priors": ", ".join(model.prior for model in models),
        "prompt": args.prompt,
        "mesh": args.mesh,
        "views per timestep": args.views,
        "timesteps": list(args.timesteps),
        "seed": args.seed,
        **{
            key: value
            for key, value in objectives[models[0]].as_settings().items()
            if key in ("method", "guidance_scale", "cfg", "weighting", "threshold")
        },
    }
    write_table(folder / "table.json", table, settings=settings)
    return finish(folder, f"Tails of the pixel gradient: {args.prompt}", settings, sections)


def read_norms(folder: Path) -> dict[str, np.ndarray]:
    """Norms of each kind as a unit of `tails` left them, (views, H, W) or (views, h, w)."""
    with np.load(folder / "norms.npz") as saved:
        return dict(saved)


def relative(norms: dict[int, dict[str, np.ndarray]], kind: str) -> np.ndarray:
    """All norms of a kind, each in units of its timestep's median: what is left is the shape of the tail."""
    return np.concatenate([values[kind].ravel() / max(np.median(values[kind]), 1e-30) for values in norms.values()])


def tail_figures(norms: dict[int, dict[str, np.ndarray]], label: str, c: float) -> list[tuple[str, np.ndarray, str]]:
    """(name, figure, caption) of one prior's norms by timestep, in absolute units, in units of the median, by origin and by rule."""
    absolute, in_medians, mark = "norm of a pixel's gradient", "norm / median of its timestep", {f"c = {c:g}": c}
    by_timestep = {f"t = {t}": values[RAW].ravel() for t, values in norms.items()}
    shape = {f"t = {t}": relative({t: values}, RAW) for t, values in norms.items()}
    origin = {"latent gradient": LATENT, "at the image": RAW, "white noise through the encoder": NOISE}
    rules = {"before": RAW} | {ROUTES[name].label: name for name in AFTER}
    pooled = {title: np.concatenate([values[kind].ravel() for values in norms.values()]) for title, kind in rules.items()}

    def draw(series, title, xlabel, **options):
        return drawing.histogram_figure(series, title=f"{title} ({label})", xlabel=xlabel, **options)

    return [
        (
            "by-timestep",
            draw(by_timestep, "Pixel norms before any rule, by timestep", absolute, marks=mark, ordered=True),
            "At the image, before any rule.",
        ),
        (
            "shape",
            draw(shape, "Shape of the tail by timestep", in_medians, ordered=True),
            "The same in units of each timestep's median: timesteps differ in scale, little in shape, where these lie upon one another.",
        ),
        (
            "origin",
            draw({title: relative(norms, kind) for title, kind in origin.items()}, "Where the tail comes from", in_medians),
            "The latent gradient, what the encoder makes of it at the image, and what it makes of white noise: its own share.",
        ),
        ("by-rule", draw(pooled, "Pixel norms after each rule, all timesteps", absolute, marks=mark), "Before and after each rule."),
    ]


# ---------------------------------------------------------------------------------------------------------------- fit-linear


def fit_linear_command(args: argparse.Namespace, model: Model) -> Path:
    """Fit the linear stand-in of a prior's VAE and draw Figure 6."""
    from tqdm import tqdm

    files = None
    if args.images is not None:
        files = picture_files(args.images)[: args.count or None]
        require_pictures(len(files))
        for file in files[:1]:
            read_picture(file)
    channels = latent_channels(model)
    count = len(files) if files is not None else (args.count or FIT_PICTURES)
    require_pictures(count, channels)
    folder = default_folder(args, "fit-linear", slug(model.prior))
    prior = load_prior(model)
    if files is None:
        images = textured_renders(count, prior.image_size, args.seed)
    else:
        images = torch.cat([read_picture(file, prior.image_size) for file in tqdm(files, desc="reading", unit="picture")])
    with tqdm(total=count, desc="fit-linear: encoding", unit="picture") as bar:
        fit = fit_linear_maps(images, prior, ridge=args.ridge, tick=bar.update)
    path = save_linear_maps(folder / "linear-map.safetensors", fit, model.prior)
    print(f"linear map: {path}")
    grid = save_png(folder / "figure-6.png", figure_6(images, prior, fit))
    table = fit_rows(fit)
    settings = {
        **model.as_settings(),
        "pictures": str(args.images or "generated renders"),
        "count": count,
        "ridge": args.ridge,
        "seed": args.seed,
    }
    sections = [
        Section("Figure 6", "Pictures kept out of the fit. The decoder gives one pixel per latent pixel.", [(grid, "")]),
        Section("Fit", f"Fitted on {fit.fitted_on} pictures, measured on {fit.measured_on} others.", table=table),
        Section("Matrices", "As saved: rgb in [0, 1] to latent, and back.", table=matrix_rows(fit)),
        Section("The paper's matrices", paper_note(channels)),
    ]
    write_table(folder / "table.json", table, settings=settings, matrices=matrix_rows(fit), file=path.name)
    return finish(folder, f"Linear stand-in of the VAE: {model.prior}", settings, sections)


def fit_rows(fit: LinearFit) -> list[dict[str, Any]]:
    rows = [{"what": "encoder, mean over the latent channels", "R2": float(np.mean(fit.r2_encoder))}]
    rows += [{"what": f"encoder, latent channel {index}", "R2": value} for index, value in enumerate(fit.r2_encoder)]
    rows += [{"what": f"decoder, {name}", "R2": value} for name, value in zip(("red", "green", "blue"), fit.r2_decoder)]
    rows.append({"what": "decoder's thumbnails against the shrunk pictures", "PSNR dB": fit.psnr_decoder})
    rows.append({"what": "VAE round trip, full size", "PSNR dB": fit.psnr_vae})
    rows.append({"what": "linear encoder, then the VAE's decoder, full size", "PSNR dB": fit.psnr_encoder})
    return rows


def matrix_rows(fit: LinearFit) -> list[dict[str, Any]]:
    rows = []
    for name, one in (("encoder", fit.encoder), ("decoder", fit.decoder)):
        for output, (weights, bias) in enumerate(zip(one.weight.tolist(), one.bias.tolist())):
            rows.append({"map": name, "output": output, **{f"w{i}": value for i, value in enumerate(weights)}, "bias": bias})
    return rows


def paper_note(channels: int) -> str:
    printed = ", ".join(f"{name} is {tuple(one.weight.shape)} with a bias of {len(one.bias)}" for name, one in PAPER_MATRICES.items())
    encoder = next(name for name, one in PAPER_MATRICES.items() if one is PAPER_ENCODER)
    text = (
        f"The appendix prints x = A0 z + b0 and z = A1 x + b1, with x the image pixel. By shape it is the other way round: {printed}, so "
        f"{encoder} takes rgb to the latent. `pgc.linear_map: paper` uses it so."
    )
    return text if channels == 4 else f"{text} They are of the SDXL VAE (4 channels) and do not fit this prior's {channels}."


@torch.no_grad()
def figure_6(images: torch.Tensor, prior, fit: LinearFit, count: int = 8) -> np.ndarray:
    """Held-out pictures, what the linear maps make of them and what the VAE does."""
    held = images[4::5][:count]
    z = prior.encode(held.to(prior.device))
    thumbs = shrink(held, prior.latent_size).movedim(1, -1)
    rows = [
        GridRow("(a) picture, at the latent's size", "rgb", list(thumbs.numpy())),
        GridRow("linear decoder of the VAE's latent", "rgb", list(fit.decoder.decode(z.float().cpu()).clamp(0, 1).numpy())),
        GridRow("(b) VAE's decoding of its own latent", "rgb", list(prior.decode(z).float().cpu().numpy())),
        GridRow(
            "VAE's decoding of the linear encoder's latent",
            "rgb",
            list(prior.decode(fit.encoder(shrink(held, prior.latent_size)).to(prior.device)).float().cpu().numpy()),
        ),
    ]
    return drawing.image_grid(rows, [str(index + 1) for index in range(len(held))])
