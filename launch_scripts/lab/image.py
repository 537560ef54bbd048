"""Score distillation of a flat picture, or of its latent: the first two panels of the paper's Figure 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from threestudio_pgc.export.pictures import save_png
from threestudio_pgc.pixelgrad import gradient_statistics, isolated_outliers, pixel_norm
from threestudio_pgc.pixelgrad.linear_map import LinearMap, find_linear_map
from threestudio_pgc.standalone.seeding import step_generator

from .routes import ROUTES, Objective, adaptive_threshold, stateful_parts, take_step
from .runs import STATE, Monitor, optimise
from .teacher import Model, Prompts, load_prior

# Noise of the whole range stays in the picture for hundreds of steps: the encoder hardly sees what is finer than its strides.
START_NOISE = 0.1
LOG_EVERY = 5  # steps; counting outliers takes as long as a tenth of a step of the bundled model


def step_numbers(i: int, step, route) -> dict[str, float] | None:
    """What is logged of every fifth step, of the gradient before the rule acts."""
    if i % LOG_EVERY:
        return None
    found = gradient_statistics(step.raw, step.threshold, norm=route.norm)
    norms = pixel_norm(step.raw, norm=route.norm)
    found["isolated"] = float(isolated_outliers(norms).float().mean())
    found["threshold"] = step.threshold
    return found | step.numbers


def mean_numbers(log: list[dict[str, float]]) -> dict[str, float]:
    """Means over the logged steps of a run."""
    return {key: float(np.mean([entry[key] for entry in log])) for key in log[0] if key != "step"} if log else {}


def save_gradient(path: Path, step, view: int = 0) -> None:
    """One view's gradient before and after the rule, float32 (h, w, C); the largest picture of a run, so compressed."""
    np.savez_compressed(
        path,
        raw=step.raw[view].float().cpu().numpy(),
        regulated=step.regulated[view].float().cpu().numpy(),
    )


def distil_image(
    model: Model,
    prompts: Prompts,
    route_name: str,
    objective: Objective,
    *,
    steps: int,
    lr: float = 0.01,
    start: Tensor | None = None,
    linear: LinearMap | None = None,
    seed: int = 0,
    folder: Path,
    monitor: Monitor | None = None,
) -> tuple[Tensor, list[dict[str, float]], Any]:
    """Optimise one image by score distillation along one route.

    AdamW without decay, as in the authors' script; after each step the image is put back into [0, 1], which theirs does not do.

    Args:
        start: (1, H, H, 3) in [0, 1] to start from; None starts from grey with a little noise. H is the prior's own size or any other.
        linear: the map of route "linear".
        folder: for the state of an interrupted run.

    Returns:
        the image (1, H, H, 3), decoded where the latent was optimised; numbers of every fifth step; the last step's gradients.
    """
    prior, route = load_prior(model), ROUTES[route_name]
    size = prior.image_size
    if start is None:
        noise = torch.rand(1, size, size, 3, generator=step_generator(seed, 0, stream="start"))
        start = 0.5 + START_NOISE * (2 * noise - 1)
    start = start.to(model.device)
    is_latent = route.pullback == "latent"
    if is_latent:
        with torch.no_grad():
            start = prior.encode(start).movedim(1, -1)
    variable = start.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([variable], lr=lr, weight_decay=0.0)
    adaptive, method = adaptive_threshold(route, objective), objective.start(prior)
    conditioning = prompts.plain(1, model.device, separate_negative=method.separate_negative)
    last: list[Any] = [None]

    def step(i: int) -> dict[str, float]:
        if not is_latent and i:
            variable.data.clamp_(0, 1)
        last[0] = take_step(
            variable, prior, conditioning, route, objective, seed=seed, step=i, method=method, linear=linear, adaptive=adaptive
        )
        variable.grad = last[0].regulated.to(variable.dtype)
        return step_numbers(i, last[0], route)

    def picture() -> Tensor:
        with torch.no_grad():
            return prior.decode(variable.movedim(-1, 1)) if is_latent else variable.detach().clamp(0, 1)

    log = optimise(
        step,
        steps=steps,
        parameters=[variable],
        optimizer=optimizer,
        checkpoint=folder / STATE,
        monitor=monitor or Monitor(),
        stateful=stateful_parts(method, adaptive),
        snapshot=lambda: save_png(folder / "now.png", picture()[0]),
    )
    result = picture()
    method.close()
    return result, log, last[0]


def image_work(settings: dict[str, Any], folder: Path, monitor: Monitor) -> dict[str, Any]:
    """The unit of `gradient_lab.py image`: one route. Writes result.png and gradient.npz."""
    model = Model(**settings["model"])
    prompts = Prompts(model, settings["prompt"], settings["negative"])
    start = None if settings["start"] is None else read_picture(settings["start"], load_prior(model).image_size)
    route = ROUTES[settings["route"]]
    image, log, last = distil_image(
        model,
        prompts,
        route.name,
        Objective.from_settings(settings["objective"]),
        steps=settings["steps"],
        lr=settings["lr"],
        start=start,
        linear=find_linear_map(settings["linear_map"]) if route.pullback == "linear" else None,
        seed=settings["seed"],
        folder=folder,
        monitor=monitor,
    )
    save_png(folder / "result.png", image[0])
    if last is not None:
        save_gradient(folder / "gradient.npz", last)
    return {"mean": mean_numbers(log)}


def read_picture(path: str | Path, size: int | None = None) -> Tensor:
    """(1, H, W, 3) float32 in [0, 1]; with `size` the middle square, resized to (1, size, size, 3).

    Raises:
        ValueError: the file is missing or no picture; names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255
