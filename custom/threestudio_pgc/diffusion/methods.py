"""The distillation methods: which predictions each asks the prior for, and what it makes of them with its equation in `objectives`.

A method is its options, and what it trains. Called with the views of a step, it returns the gradient at their latents.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from . import objectives
from .adapter import CAMERA_NUMBERS, AdapterTraining
from .prior import Conditioning, LatentPrior, NoiseLevel, NoisePrediction
from .trajectories import denoise, even_timesteps, invert, noise_between, solver_steps


@dataclass(frozen=True)
class Views:
    """B rendered views on their way through a method; nothing here has a graph.

    image (B, H, W, 3) in [0, 1], or None where latents are optimised themselves. latents, noise (B, C, h, w). timesteps (B,).
    guidance_scale, cfg, rescale: see `objectives.cfg_combine`. weighting: see `objectives.WEIGHTINGS`. camera (B, 4, 4) camera to world,
    or None. generator: for what else a method draws.
    """

    prior: LatentPrior
    image: Tensor | None
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    control: Tensor | Sequence[Tensor] | None = None
    guidance_scale: float = 100.0
    cfg: str = "authors"
    rescale: float = 0.0
    weighting: str = "sds"
    camera: Tensor | None = None
    generator: torch.Generator | None = None

    @property
    def level(self) -> NoiseLevel:
        return self.prior.noise_level(self.timesteps)

    def noisy(self) -> Tensor:
        """z_t, of `noise`."""
        return self.level.add_noise(self.latents, self.noise)

    def predict(self, z_t: Tensor, t: Tensor) -> NoisePrediction:
        return self.prior.predict_noise(z_t, t, self.conditioning, self.control)

    def predict_unconditional(self, z_t: Tensor, t: Tensor) -> Tensor:
        """eps(z_t; t) alone, at half the cost of `predict`."""
        given = self.conditioning
        empty = replace(
            given,
            cond=given.uncond,
            pooled_cond=given.pooled_uncond,
            reference=None if given.reference is None else torch.zeros_like(given.reference),
        )
        return self.prior.predict_conditional(z_t, t, empty, self.control)

    def guide(self, prediction: NoisePrediction) -> Tensor:
        """Classifier-free guidance as the step is configured."""
        return objectives.cfg_combine(
            prediction,
            self.guidance_scale,
            self.cfg,
            rescale=self.rescale,
            negative_weights=self.conditioning.negative_weights,
        )


@dataclass(frozen=True)
class Residual:
    """What a method found: the gradient at the latents (B, C, h, w) and, where it has one, at the image itself (B, H, W, 3)."""

    latent: Tensor
    image: Tensor | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)  # for the log


class Method:
    """`guidance_scale`, `cfg`: what is used where the configuration leaves them null; a scale of None: the method has no such scale.

    separate_negative: the unconditional prediction is the empty prompt's, and the negative prompt is predicted on its own.
    perpendicular: perpendicular negatives can be used. needs_unconditional: lives on the unconditional prediction, which a checkpoint with
    guidance distilled into it does not know.
    """

    guidance_scale: ClassVar[float | None] = 100.0
    cfg: ClassVar[str] = "authors"
    separate_negative: ClassVar[bool] = False
    perpendicular: ClassVar[bool] = True
    needs_unconditional: ClassVar[bool] = False

    def prepare(self, prior: LatentPrior) -> None:
        """Build what the method trains beside the 3D model."""

    def close(self) -> None:
        """Leave the prior as it was before `prepare`."""

    def __call__(self, views: Views) -> Residual:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(eq=False)
class SDS(Method):
    """Score distillation sampling (Poole et al. 2022), the paper's setting."""

    def __call__(self, views: Views) -> Residual:
        prediction = views.predict(views.noisy(), views.timesteps)
        return Residual(
            objectives.sds(
                prediction,
                views.noise,
                views.level,
                views.guidance_scale,
                views.cfg,
                views.weighting,
                rescale=views.rescale,
                negative_weights=views.conditioning.negative_weights,
            )
        )


@dataclass(eq=False)
class CSD(Method):
    """Classifier score distillation (Yu et al. 2023).

    negative_scale: how strongly the negative prompt pushes away, in units of the prompt's pull.
    """

    negative_scale: float = 0.0

    guidance_scale = None
    perpendicular, needs_unconditional = False, True

    @property
    def separate_negative(self) -> bool:
        return self.negative_scale != 0

    def __call__(self, views: Views) -> Residual:
        prediction = views.predict(views.noisy(), views.timesteps)
        return Residual(objectives.csd(prediction, views.level, views.weighting, negative_scale=self.negative_scale))


@dataclass(eq=False)
class NFSD(Method):
    """Noise-free score distillation (Katzir et al. 2023). Wants a negative prompt that describes bad pictures.

    boundary: share of the schedule below which the noise is small enough for the domain's score to be the empty prompt's.
    """

    boundary: float = 0.2

    guidance_scale, cfg = 7.5, "diffusers"
    separate_negative, perpendicular, needs_unconditional = True, False, True

    def __call__(self, views: Views) -> Residual:
        prediction = views.predict(views.noisy(), views.timesteps)
        boundary = round(self.boundary * views.prior.num_train_timesteps)
        return Residual(objectives.nfsd(prediction, views.level, views.timesteps, views.guidance_scale, views.weighting, boundary=boundary))


@dataclass(eq=False)
class SSD(Method):
    """Stable score distillation (Tang et al. 2023).

    boundary: share of the schedule up to which the variance-reduced term is used.
    """

    boundary: float = 0.1

    guidance_scale = None
    perpendicular, needs_unconditional = False, True

    def __call__(self, views: Views) -> Residual:
        prediction = views.predict(views.noisy(), views.timesteps)
        boundary = round(self.boundary * views.prior.num_train_timesteps)
        return Residual(objectives.ssd(prediction, views.noise, views.level, views.timesteps, views.weighting, boundary=boundary))


@dataclass(eq=False)
class ISM(Method):
    """Interval score matching (Liang et al. 2023, LucidDreamer).

    interval: t - s, as a share of the schedule; views at t below it start from the clean latents.
    inversion_steps: DDIM steps from the clean latents to s.
    """

    interval: float = 0.05
    inversion_steps: int = 4

    guidance_scale, cfg = 7.5, "diffusers"
    needs_unconditional = True

    def __call__(self, views: Views) -> Residual:
        interval = max(1, round(self.interval * views.prior.num_train_timesteps))
        s = (views.timesteps - interval).clamp_min(0)
        to_s = even_timesteps(s, self.inversion_steps)
        # The last step of the inversion is the interval: its prediction is the one at x_s.
        z_t, inverted = invert(
            views.latents, torch.cat([to_s, views.timesteps[None]]), views.predict_unconditional, views.prior.noise_level
        )
        guided = views.guide(views.predict(z_t, views.timesteps))
        return Residual(objectives.ism(guided, inverted, views.level, views.weighting))


@dataclass(eq=False)
class SDI(Method):
    """Score distillation via reparametrised DDIM (Lukoianov et al. 2024): SDS with noise that DDIM inversion finds.

    inversion_steps: steps from the clean latents to t. inversion_guidance_scale: guidance on the way, in the diffusers form.
    """

    inversion_steps: int = 10
    inversion_guidance_scale: float = -7.5

    guidance_scale, cfg = 7.5, "diffusers"
    needs_unconditional = True

    def __call__(self, views: Views) -> Residual:
        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            return objectives.cfg_combine(views.predict(z_t, t), self.inversion_guidance_scale, "diffusers")

        t, level = views.timesteps, views.level
        z_t, _ = invert(views.latents, even_timesteps(t, self.inversion_steps), predict, views.prior.noise_level)
        noise = noise_between(views.latents, z_t, level)
        return Residual(objectives.sdi(views.guide(views.predict(z_t, t)), noise, level, views.weighting))


@dataclass(eq=False)
class BGT(Method):
    """HiFA's loss (Zhu & Zhuang 2023), the authors' "BGT+": latents and image against their denoised selves.

    lambda_rgb: weight of the image's residual.
    """

    lambda_rgb: float = 0.1

    def __call__(self, views: Views) -> Residual:
        steps = even_timesteps(views.timesteps, solver_steps(views.timesteps, views.prior.num_train_timesteps)).flip(0)
        denoised = denoise(views.noisy(), steps, lambda z_t, t: views.guide(views.predict(z_t, t)), views.prior.noise_level)
        latent = objectives.bgt(views.latents, denoised, views.level, views.weighting)
        if views.image is None or self.lambda_rgb == 0:
            return Residual(latent)
        decoded = torch.cat([views.prior.decode(z) for z in denoised.split(1)])  # a decoder's activations are a step's largest
        with torch.enable_grad():
            image = views.image.clone().requires_grad_(True)
            seen = views.prior.resize(image)
        residual = objectives.bgt_image(seen.detach(), decoded, views.level, views.weighting, lambda_rgb=self.lambda_rgb)
        return Residual(latent, torch.autograd.grad(seen, image, residual)[0])


@dataclass(eq=False)
class VSD(Method):
    """Variational score distillation (Wang et al. 2023, ProlificDreamer), with an adapter on the prior's own network.

    lora_rank, lora_lr: the adapter's rank and Adam learning rate. camera: tell the adapter the camera.
    checkpointing: recompute the network's activations in the adapter's backward pass: less memory, one more forward pass.
    """

    lora_rank: int = 4
    lora_lr: float = 1e-4
    camera: bool = True
    checkpointing: bool = False

    guidance_scale, cfg = 7.5, "diffusers"

    def close(self) -> None:
        self._training.adapter.remove()

    def prepare(self, prior: LatentPrior) -> None:
        self._training = AdapterTraining(prior, rank=self.lora_rank, learning_rate=self.lora_lr, checkpointing=self.checkpointing)

    def __call__(self, views: Views) -> Residual:
        z_t, t, c = views.noisy(), views.timesteps, None
        if self.camera and views.camera is not None:
            c = views.camera.to(views.latents).reshape(-1, CAMERA_NUMBERS)
        guided = views.guide(views.predict(z_t, t))
        adapted = self._training.predict(z_t, t, views.conditioning, views.control, c)
        loss = self._training.step(views.latents, views.conditioning, views.control, c, views.generator)
        return Residual(objectives.vsd(guided, adapted, views.level, views.weighting), numbers={"lora_error": loss})

    def state_dict(self) -> dict[str, Any]:
        return self._training.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._training.load_state_dict(state)


METHODS: dict[str, type[Method]] = {
    "sds": SDS,
    "csd": CSD,
    "nfsd": NFSD,
    "ssd": SSD,
    "ism": ISM,
    "sdi": SDI,
    "bgt": BGT,
    "vsd": VSD,
}


def distilled_conflict(
    why_distilled: str | None, method: Method, guidance_scale: float | None, cfg: str
) -> Literal["objective", "guidance_scale"] | None:
    """What a checkpoint cannot serve that has guidance distilled into it (a prior's `guidance_distilled` says why; None: it has not).

    It knows no unconditional prediction: a method that lives on one is out, and so is guidance of an effective scale other than 1.
    """
    if why_distilled is None:
        return None
    if method.needs_unconditional:
        return "objective"
    return None if objectives.effective_scale(guidance_scale, cfg) == 1 else "guidance_scale"


def make_method(name: str, options: Mapping[str, Any] | None = None, *, where: str = "system.guidance") -> Method:
    """A method by its name and options.

    Raises ValueError for an unknown name or option, or a value of another kind, naming `where`, what was found and what is wanted.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{where}.objective: found {name!r}, wanted one of {', '.join(METHODS)}{hint}")
    known = {option.name: option for option in fields(METHODS[name])}
    options = dict(options or {})
    for key, value in options.items():
        if key not in known:
            wanted = f"one of {', '.join(known)}" if known else "nothing"
            raise ValueError(f"{where}.objective_options.{key}: {name} has no such option; wanted {wanted}")
        kind = type(known[key].default)
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        if not fits:
            raise ValueError(f"{where}.objective_options.{key}: found {value!r}, wanted a value like {known[key].default!r}")
        if kind is int and value < 1 or key in ("boundary", "interval") and not 0 <= value <= 1 or key == "lora_lr" and value <= 0:
            raise ValueError(f"{where}.objective_options.{key}: found {value!r}, wanted a value like {known[key].default!r}")
    return METHODS[name](**options)
