"""What all of the laboratory's subcommands share: what they check and prepare first, and how they write down what was found."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threestudio_pgc.diffusion.methods import METHODS, make_method
from threestudio_pgc.export.files import write_bytes
from threestudio_pgc.pixelgrad import isolated_outliers
from threestudio_pgc.pixelgrad.linear_map import find_linear_map

from .drawing import GridRow
from .image import read_picture
from .intervals import Interval, spelled
from .linear import fit_linear_maps, save_linear_maps
from .page import Section, write_page
from .renders import textured_renders
from .routes import Objective, Route, check_objective
from .teacher import POCKET, POCKET_NEGATIVE, ArgumentError, Model, load_prior

FIT_PICTURES = 160  # for a linear map where no pictures are given


def check_guidance(args: argparse.Namespace) -> None:
    """Refuse an unknown `--objective`, and guidance that it does not have."""
    check_objective(args.objective)
    own = METHODS[args.objective]
    if args.guidance_scale is not None and own.guidance_scale is None:
        raise ArgumentError(f"--guidance-scale: found {args.guidance_scale:g}, wanted none: {args.objective} has no guidance scale")
    if args.cfg is not None and not own.perpendicular:
        raise ArgumentError(f"--cfg: found {args.cfg}, wanted none: {args.objective} has its own form of guidance")


def objective_of(args: argparse.Namespace, model: Model, method: str) -> Objective:
    """What the arguments say of a method; of several, each takes what means something to it."""
    own = METHODS[method]
    given = own.guidance_scale is not None and args.guidance_scale is not None
    return Objective(
        method=method,
        guidance_scale=args.guidance_scale if given else model.guidance_scale(method),
        cfg=args.cfg if own.perpendicular and args.cfg is not None else own.cfg,
        t_range=tuple(args.t_range),
        threshold=args.threshold,
        quantile=args.quantile,
        window=args.window,
    )


def negative_of(args: argparse.Namespace, model: Model, method: str) -> str:
    """The negative prompt. A method that cannot do without one has a default on the bundled model only.

    Raises:
        ArgumentError: such a method on another prior without one.
    """
    if not make_method(method).separate_negative:
        return args.negative_prompt or ""
    if args.negative_prompt is None and model.prior == POCKET:
        return POCKET_NEGATIVE
    if not (args.negative_prompt or "").strip():
        raise ArgumentError(f"--negative-prompt: found nothing, wanted what bad pictures look like: {method} needs it")
    return args.negative_prompt


def default_folder(args: argparse.Namespace, command: str, name: str) -> Path:
    """Where a command's page lies unless `--output` says; another objective than sds has its own."""
    objective = f"-{args.objective}" if getattr(args, "objective", "sds") != "sds" else ""
    return args.output or Path("outputs/gradient-lab") / f"{command}{objective}-{name}"


def unit_prefix(objective: Objective) -> str:
    """Begins the name of a run: nothing for sds, whose runs were named before there were others."""
    return "" if objective.method == "sds" else f"{objective.method}-"


def slug(text: str) -> str:
    """`text` as part of a file's name. A long one is cut and ends in its hash, so that two that begin alike stay apart."""
    name = re.sub(r"\W+", "-", text.lower()).strip("-")
    return name if len(name) <= 60 else f"{name[:50]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_linear(args: argparse.Namespace, routes: Sequence[Route], channels: int) -> None:
    """Refuse a linear map that does not fit the prior before anything is loaded."""
    if not any(route.pullback == "linear" for route in routes) or args.linear_map == "fit":
        return
    try:
        found = find_linear_map(args.linear_map)
    except ValueError as error:
        raise ArgumentError(str(error).replace("pgc.linear_map", "--linear-map")) from error
    if len(found.bias) != channels:
        raise ArgumentError(f"--linear-map: found a map to {len(found.bias)} latent channels, wanted {channels} for {args.prior}")


def linear_map_for(args: argparse.Namespace, model: Model, routes: Sequence[Route], folder: Path) -> str | None:
    """Name or file of the map that route "linear" pulls back through, fitted now where none is given."""
    if not any(route.pullback == "linear" for route in routes):
        return None
    if args.linear_map != "fit":
        return args.linear_map
    path = folder / f"linear-map-{slug(model.prior)}.safetensors"
    if not path.is_file():
        print("fitting the linear map ...", flush=True)
        prior = load_prior(model)
        save_linear_maps(path, fit_linear_maps(textured_renders(FIT_PICTURES, prior.image_size, args.seed), prior), model.prior)
    return str(path)


def write_table(path: Path, rows: Sequence[dict[str, Any]], **more: Any) -> Path:
    """The table as JSON, with what it ran with."""

    def plain(value: Any) -> Any:
        return value._asdict() if isinstance(value, Interval) else str(value) if isinstance(value, Path) else value

    rows = [{key: plain(value) for key, value in row.items()} for row in rows]
    return write_bytes(path, json.dumps({**more, "rows": rows}, indent=1).encode())


def for_reading(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Intervals as text, for the page."""
    return [{key: spelled(value) if isinstance(value, Interval) else value for key, value in row.items()} for row in rows]


def load_picture(path: Path) -> np.ndarray:
    return read_picture(path)[0].numpy()


def gradient_rows(folders: Sequence[Path]) -> list[GridRow]:
    """The gradient of each run before and after its rule, and their norms with isolated outliers ringed."""
    raw, regulated, before, after, rings = [], [], [], [], []
    for folder in folders:
        with np.load(folder / "gradient.npz") as saved:
            pair = saved["raw"], saved["regulated"]
        for gradient, pictures, norms in ((pair[0], raw, before), (pair[1], regulated, after)):
            pictures.append(gradient[..., :3])
            finite = np.isfinite(gradient).all(-1)
            norms.append(np.where(finite, np.linalg.norm(gradient, axis=-1), np.nan))
        rings.append(isolated_outliers(torch.from_numpy(np.nan_to_num(before[-1]))[None])[0].numpy())
    return [
        GridRow("gradient before the rule", "signed", raw),
        GridRow("its norm, isolated outliers ringed", "norm", before, rings=rings),
        GridRow("gradient after the rule", "signed", regulated),
        GridRow("its norm", "norm", after),
    ]


GRADIENT_NOTE = (
    "Gradients are of the last step, per view and undivided; grey is zero. All columns of a row share one scale, given at its right end. "
    "A ringed pixel is above ten times the median of the 5 x 5 pixels around it. Where the latent itself is optimised, its gradient's "
    "first three channels and the norm over all channels are shown."
)


def column_label(route: Route) -> str:
    return f"({route.number}) {route.label}" if route.number else route.label


def finish(folder: Path, title: str, settings: dict[str, Any], sections: list[Section]) -> Path:
    command = "python launch_scripts/gradient_lab.py " + " ".join(
        f'"{word}"' if re.search(r"[^\w./:=,+-]", word) else word for word in sys.argv[1:]
    )
    return write_page(folder / "index.html", title, command, settings, sections)
