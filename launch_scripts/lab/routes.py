"""The routes by which a latent gradient reaches what is optimised, and one step along a route."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from threestudio_pgc.diffusion.distillation import Distillation, distill
from threestudio_pgc.diffusion.methods import METHODS, Method, Residual, Views, distilled_conflict, make_method
from threestudio_pgc.diffusion.prior import Conditioning
from threestudio_pgc.diffusion.timesteps import sample_timesteps
from threestudio_pgc.diffusion.vae_prior import VAEPrior
from threestudio_pgc.pixelgrad import RULES, Norm, QuantileThreshold
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
    return [ROUTES[name] for name in _known_names("--routes", names, ROUTES, {"all": ROUTES, "figure2": FIGURE_2})]


def parse_objectives(names: Sequence[str]) -> list[str]:
    """Distillation methods by name, "all" for every one; in table order, each once. ValueError as in `parse_routes`."""
    return _known_names("--objectives", names, METHODS, {"all": METHODS})


def check_objective(name: str) -> None:
    """ValueError, naming the option and the nearest method, where there is no such one."""
    _known_names("--objective", [name], METHODS, {})


def _known_names(option: str, names: Sequence[str], known: Collection[str], groups: Mapping[str, Collection[str]]) -> list[str]:
    wanted: set[str] = set()
    for name in names:
        if name not in groups and name not in known:
            near = difflib.get_close_matches(name, [*known, *groups], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            kinds = f"{', '.join(groups)} or some of" if groups else "one of"
            raise ValueError(f"{option}: found {name!r}, wanted {kinds} {', '.join(known)}{hint}")
        wanted.update(groups.get(name, [name]))
    return [name for name in known if name in wanted]


@dataclass(frozen=True)
class Objective:
    """What is distilled, apart from the prompt.

    method, method_options: see `diffusion.methods.METHODS`; options as (name, value) pairs. guidance_scale, cfg, rescale: see
    `objectives.cfg_combine`; None for the method's own.
    t_range: shares of the training timesteps. threshold: c of the fixed rules. quantile, window: of the adaptive one.
    inject: "none", or where outliers are put in: at the "latent" gradient or at the "image" gradient; `inject_share` of the pixels are
    multiplied by `inject_factor` in each step.
    """

    method: str = "sds"
    method_options: tuple[tuple[str, Any], ...] = ()
    guidance_scale: float | None = None
    cfg: str | None = None
    rescale: float = 0.0
    weighting: str = "sds"
    t_range: tuple[float, float] = (0.02, 0.5)
    threshold: float = 0.1
    quantile: float = 0.99
    window: int = 100
    inject: str = "none"
    inject_share: float = 1e-3
    inject_factor: float = 1e3

    def as_settings(self) -> dict[str, Any]:
        """As JSON. A run is known by its settings, so what runs did not have at first stands here only where it is used."""
        later = {"method": self.method, "method_options": dict(self.method_options), "rescale": self.rescale}
        settings = {name: value for name, value in asdict(self).items() if name not in later}
        used = {name: value for name, value in later.items() if value not in ("sds", {}, 0.0)}
        return settings | used | {"t_range": list(self.t_range)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Objective:
        options = tuple(settings.get("method_options", {}).items())
        return cls(**settings | {"t_range": tuple(settings["t_range"]), "method_options": options})

    def start(self, prior: VAEPrior) -> Method:
        """The method, ready for one run on `prior`; what it trains (vsd) is new.

        Raises ValueError for an unknown method or option, and for guidance on a checkpoint that has it distilled into it.
        """
        method = make_method(self.method, dict(self.method_options), where="gradient_lab")
        why, step = prior.guidance_distilled, self.step_options(method)
        conflict = distilled_conflict(why, method, step["guidance_scale"], step["cfg"])
        if conflict == "objective":
            raise ValueError(f"--objective: found {self.method}, wanted sds, bgt or vsd: the checkpoint is distilled, {why}")
        if conflict == "guidance_scale":
            found, off = f"{step['guidance_scale']:g} in the {step['cfg']} form", 0 if step["cfg"] == "authors" else 1
            raise ValueError(f"--guidance-scale: found {found}, wanted {off}: the checkpoint is distilled, {why}")
        method.prepare(prior)
        return method

    def step_options(self, method: Method) -> dict[str, Any]:
        """What `distillation.distill` takes of this."""
        scale = method.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return {
            "method": method,
            "guidance_scale": 0.0 if scale is None else scale,
            "cfg": self.cfg or method.cfg,
            "rescale": self.rescale,
            "weighting": self.weighting,
        }


def inject_outliers(gradient: Tensor, share: float, factor: float, generator: torch.Generator, dim: int) -> Tensor:
    """`gradient` with each pixel (all dimensions but the channels at `dim`) multiplied by `factor` with probability `share`."""
    shape = [size for axis, size in enumerate(gradient.shape) if axis != dim % gradient.ndim]
    hit = torch.rand(shape, generator=generator, device=generator.device) < share
    return torch.where(hit.unsqueeze(dim).to(gradient.device), gradient * factor, gradient)


@dataclass(eq=False)
class WithOutliers(Method):
    """A method whose gradient at the latents has outliers put in."""

    method: Method
    share: float
    factor: float
    generator: torch.Generator

    def __call__(self, views: Views) -> Residual:
        found = self.method(views)
        return replace(found, latent=inject_outliers(found.latent, self.share, self.factor, self.generator, dim=1))


def adaptive_threshold(route: Route, objective: Objective) -> QuantileThreshold | None:
    return QuantileThreshold(objective.quantile, objective.window, route.norm) if route.adaptive else None


def stateful_parts(method: Method, adaptive: QuantileThreshold | None) -> dict[str, Any]:
    """What a run has to keep beside its parameters, for `runs.optimise`."""
    return {"method": method} | ({} if adaptive is None else {"threshold": adaptive})


def take_step(
    image: Tensor,
    prior: VAEPrior,
    conditioning: Conditioning,
    route: Route,
    objective: Objective,
    *,
    seed: int,
    step: int,
    method: Method | None = None,
    linear: LinearMap | None = None,
    adaptive: QuantileThreshold | None = None,
    control: Tensor | None = None,
    camera: Tensor | None = None,
) -> Distillation:
    """One step of `distillation.distill` along a route, with outliers put in where `objective` says so.

    Timesteps, noise and outliers are functions of (seed, step) alone, so all routes and methods see the same ones.

    Args:
        image: (B, H, W, 3) in [0, 1]; (B, h, w, C) latents on route "latent".
        method: the run's, as `Objective.start` made it; None makes one for this step alone.
        linear: the map of route "linear".
        adaptive: the running quantile of an adaptive route; counts this step.
        camera: (B, 4, 4) camera to world, for vsd.
    """
    is_latent = route.pullback == "latent"
    device = image.device
    timesteps = sample_timesteps(
        len(image), objective.t_range, prior.num_train_timesteps, generator=step_generator(seed, step, stream="timesteps"), device=device
    )
    shape = (len(image), prior.latent_channels, prior.latent_size, prior.latent_size)
    noise = torch.randn(shape, generator=step_generator(seed, step, stream="noise")).to(device)
    options = objective.step_options(method or objective.start(prior))
    outliers = step_generator(seed, step, stream="outliers")
    if objective.inject == "latent":
        options["method"] = WithOutliers(options["method"], objective.inject_share, objective.inject_factor, outliers)
    found = distill(
        image,
        prior,
        conditioning,
        rule=RULES["none"],  # the route's has to see the outliers
        threshold=objective.threshold,
        encode=None if linear is None else partial(linear.encode, latent_size=prior.latent_size),
        image_is_latent=is_latent,
        timesteps=timesteps,
        noise=noise,
        control=control,
        camera=camera,
        generator=step_generator(seed, step, stream="method"),
        **options,
    )
    raw = found.raw
    if objective.inject == "image":
        raw = inject_outliers(raw, objective.inject_share, objective.inject_factor, outliers, dim=-1)
    c = objective.threshold if adaptive is None else adaptive(raw)
    return replace(found, raw=raw, regulated=RULES[route.rule](raw, c, norm=route.norm), threshold=c)
