"""The routes by which a latent gradient reaches what is optimised, and one step along a route."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from threestudio_pgc.diffusion.distillation import Distillation, find_residual
from threestudio_pgc.diffusion.prior import Conditioning, LatentPrior
from threestudio_pgc.diffusion.timesteps import sample_timesteps
from threestudio_pgc.pixelgrad import RULES, Norm, QuantileThreshold, pullback
from threestudio_pgc.pixelgrad.linear_map import LinearMap
from threestudio_pgc.standalone.seeding import step_generator


@dataclass(frozen=True)
class Route:
    """name: on the command line. label: in pictures. rule, norm: see `pixelgrad.rules`. pullback: "vae", "linear", or "latent", where
    the latent itself is optimised and decoded to be looked at. adaptive: the threshold is a running quantile. number: in the
    paper's Figure 2."""

    name: str
    label: str
    rule: str = "none"
    norm: Norm = "l2"
    pullback: str = "vae"
    adaptive: bool = False
    number: str = ""


ROUTES = {
    route.name: route
    for route in (
        Route("latent", "latent itself", pullback="latent", number="i"),
        Route("vae", "raw VAE gradient", number="ii"),
        Route("linear", "linear map", pullback="linear", number="iii"),
        Route("pngd", "PNGD", "normalize", number="iv"),
        Route("pgc-v", "PGC-V", "clip-value", number="v"),
        Route("pgc-n", "PGC-N", "clip-norm", number="vi"),
        Route("pgc-n-max", "PGC-N, max norm", "clip-norm", norm="linf"),
        Route("pgc-n-adaptive", "PGC-N, adaptive", "clip-norm", adaptive=True),
        Route("global-clip", "global norm clip", "clip-global"),
        Route("view-rms", "view RMS (control)", "view-rms"),
    )
}
FIGURE_2 = tuple(route.name for route in ROUTES.values() if route.number)


def parse_routes(names: Sequence[str]) -> list[Route]:
    """Routes by name, "all" for every one, "figure2" for the paper's six; in table order, each once.

    Raises:
        ValueError: naming the first unknown route and the nearest known one.
    """
    wanted: set[str] = set()
    for name in names:
        if name == "all":
            wanted.update(ROUTES)
        elif name == "figure2":
            wanted.update(FIGURE_2)
        elif name in ROUTES:
            wanted.add(name)
        else:
            near = difflib.get_close_matches(name, [*ROUTES, "all", "figure2"], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"--routes: found {name!r}, wanted all, figure2 or some of {', '.join(ROUTES)}{hint}")
    return [route for name, route in ROUTES.items() if name in wanted]


@dataclass(frozen=True)
class Objective:
    """What is distilled, apart from the prompt.

    t_range: shares of the training timesteps. threshold: c of the fixed rules. quantile, window: of the adaptive one.
    inject: "none", or where outliers are put in: at the "latent" gradient or at the "image" gradient; `inject_share` of the pixels are
    multiplied by `inject_factor` in each step.
    """

    guidance_scale: float = 100.0
    cfg: str = "authors"
    weighting: str = "sds"
    t_range: tuple[float, float] = (0.02, 0.5)
    threshold: float = 0.1
    quantile: float = 0.99
    window: int = 100
    inject: str = "none"
    inject_share: float = 1e-3
    inject_factor: float = 1e3

    def as_settings(self) -> dict[str, Any]:
        return asdict(self) | {"t_range": list(self.t_range)}


INJECT = ("none", "latent", "image")


def inject_outliers(gradient: Tensor, share: float, factor: float, generator: torch.Generator, dim: int) -> Tensor:
    """`gradient` with each pixel (all dimensions but the channels at `dim`) multiplied by `factor` with probability `share`."""
    shape = [size for axis, size in enumerate(gradient.shape) if axis != dim % gradient.ndim]
    hit = torch.rand(shape, generator=generator, device=generator.device) < share
    return torch.where(hit.unsqueeze(dim).to(gradient.device), gradient * factor, gradient)


def adaptive_threshold(route: Route, objective: Objective) -> QuantileThreshold | None:
    return QuantileThreshold(objective.quantile, objective.window, route.norm) if route.adaptive else None


def take_step(
    image: Tensor,
    prior: LatentPrior,
    conditioning: Conditioning,
    route: Route,
    objective: Objective,
    *,
    seed: int,
    step: int,
    linear: LinearMap | None = None,
    adaptive: QuantileThreshold | None = None,
    control: Tensor | None = None,
) -> Distillation:
    """One step of `distillation.distill` along a route, with outliers put in where `objective` says so.

    Timesteps, noise and outliers are functions of (seed, step) alone, so all routes see the same ones.

    Args:
        image: (B, H, W, 3) in [0, 1]; (B, h, w, C) latents on route "latent".
        linear: the map of route "linear".
        adaptive: the running quantile of an adaptive route; counts this step.
    """
    is_latent = route.pullback == "latent"
    device = image.device
    timesteps = sample_timesteps(
        len(image), objective.t_range, prior.num_train_timesteps, generator=step_generator(seed, step, stream="timesteps"), device=device
    )
    shape = (len(image), prior.latent_channels, prior.latent_size, prior.latent_size)
    noise = torch.randn(shape, generator=step_generator(seed, step, stream="noise")).to(device)
    gradient = find_residual(
        image,
        prior,
        conditioning,
        timesteps=timesteps,
        noise=noise,
        guidance_scale=objective.guidance_scale,
        cfg=objective.cfg,
        weighting=objective.weighting,
        control=control,
        image_is_latent=is_latent,
    ).latent
    outliers = step_generator(seed, step, stream="outliers")
    if objective.inject == "latent":
        gradient = inject_outliers(gradient, objective.inject_share, objective.inject_factor, outliers, dim=1)
    if is_latent:
        raw = gradient.movedim(1, -1)
    else:
        encode = prior.encode if linear is None else partial(linear.encode, latent_size=prior.latent_size)
        raw = pullback(gradient, image, encode)
    if objective.inject == "image":
        raw = inject_outliers(raw, objective.inject_share, objective.inject_factor, outliers, dim=-1)
    c = objective.threshold if adaptive is None else adaptive(raw)
    return Distillation(gradient, raw, RULES[route.rule](raw, c, norm=route.norm), c)
