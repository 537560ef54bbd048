"""Score distillation from a frozen latent prior, with the image gradient regulated pixel by pixel."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.control import CONTROL_KINDS, NORMAL_CONVENTIONS, control_kind_of, known_normal_convention, make_control
from ..diffusion.distillation import distill
from ..diffusion.flux import FluxPrior
from ..diffusion.methods import distilled_conflict, make_method
from ..diffusion.objectives import CFG_FORMS, WEIGHTINGS, effective_scale
from ..diffusion.prior import Conditioning
from ..diffusion.sdxl import SDXLPrior
from ..diffusion.stable_diffusion import StableDiffusionPrior
from ..diffusion.stable_diffusion_3 import StableDiffusion3Prior
from ..diffusion.timesteps import SAMPLINGS, draw_timesteps, timestep_bounds
from ..diffusion.vae_prior import VAEPrior
from ..host import BaseObject, C, get_device, info, register, warn
from ..pixelgrad import PGCConfig, surrogate_loss
from ..pixelgrad.linear_map import find_linear_map
from .randomness import step_generator
from .regulation import Regulation

WHERE = "system.guidance"
BUFFERS = sorted({name for names in CONTROL_KINDS.values() for name in names})  # of a render, what control images are made of

# Fields the host's stable-diffusion-guidance has and this one has no use for: accepted at these values, so that swapping
# `system.guidance_type` alone works, refused at any other.
_INERT = {"use_img_loss": False, "use_sjc": False, "token_merging": False, "enable_sequential_cpu_offload": False}


class DistillationGuidance(BaseObject):
    """What every guidance of this package does; a subclass names its prior.

    Config:
        pretrained_model_name_or_path: hub id, local diffusers folder or `builtin:pocket`.
        vae_name_or_path: another VAE, such as the fp16-fix one; null keeps the model's own.
        unet_name_or_path: another denoising network, a fine-tune of the model's own (U-Net or transformer); null keeps the model's own.
        image_size: side of the picture the VAE sees, pixels; null: as the model was trained. Smaller needs less memory and shows less.
        controlnet_name_or_path: a ControlNet made for the model, or a list of them; null distils without control.
        control_kind: "depth" or "normal", or a list, one for each; null guesses it from the name.
        control_scale: strength of the ControlNet's residuals; a number for all or a list, one for each.
        normal_convention: how a normal ControlNet wants its colours, see `diffusion.control.NORMAL_CONVENTIONS`; null: as published
            for the named net, "opengl" where nothing is known of it.
        objective, objective_options: the distillation method and its own options, see `diffusion.methods.METHODS`.
        guidance_scale, cfg: classifier-free guidance; "authors" is eps_text + s (eps_text - eps_uncond), whose effective scale is s + 1,
            "diffusers" is eps_uncond + s (eps_text - eps_uncond). Null for both: what the method was published with.
        guidance_rescale: phi of Lin et al. 2023, 0 for none.
        weighting_strategy: "sds" (w = sigma_t^2), "uniform" or "fantasia3d".
        timestep_sampling: "uniform", t ~ U(min, max) per view; "dreamtime" or "sqrt-anneal", one t that falls as the run goes on.
        min_step_percent, max_step_percent: the range, in shares of the training timesteps; numbers or schedules.
        trainer_max_steps: how long the run is, for the falling ones. sqrt_anneal: the host's name for "sqrt-anneal".
        grad_clip: clamp of the latent gradient, per component; null for none.
        dtype: "auto" (fp16 on CUDA, fp32 on a CPU), "fp32", "fp16" or "bf16", for all networks but a VAE that overflows in it.
        half_precision_weights: false is dtype fp32.
        encoder_checkpointing: trade time for memory in the VAE's backward pass.
        enable_attention_slicing, enable_channels_last_format: as in the host's stable-diffusion-guidance. Memory-efficient attention is
            what torch does anyway, whatever enable_memory_efficient_attention says.
        pgc: see `pixelgrad.PGCConfig`.
    """

    PRIOR: ClassVar[type[VAEPrior]]
    needs_prompt: ClassVar[bool] = True
    PRIOR_SCALE: ClassVar[tuple[float, str] | None] = None  # guidance scale and form, where the prior wants another than the method

    @dataclass
    class Config(BaseObject.Config):
        pretrained_model_name_or_path: str = ""
        vae_name_or_path: Any = None
        unet_name_or_path: Any = None
        image_size: Any = None
        controlnet_name_or_path: Any = None
        control_kind: Any = None
        control_scale: Any = 1.0
        normal_convention: Any = None
        objective: str = "sds"
        objective_options: dict = field(default_factory=dict)
        guidance_scale: Any = None
        cfg: Any = None
        guidance_rescale: float = 0.0
        weighting_strategy: str = "sds"
        timestep_sampling: str = "uniform"
        min_step_percent: Any = 0.02
        max_step_percent: Any = 0.5
        sqrt_anneal: bool = False
        trainer_max_steps: int = 25000
        grad_clip: Any = None
        dtype: str = "auto"
        half_precision_weights: bool = True
        encoder_checkpointing: bool = False
        view_dependent_prompting: bool = True
        enable_memory_efficient_attention: bool = False
        enable_attention_slicing: bool = False
        enable_channels_last_format: bool = False
        pgc: PGCConfig = field(default_factory=PGCConfig)

        # See _INERT. The rest steer things no method here does.
        enable_sequential_cpu_offload: bool = False
        use_img_loss: bool = False
        use_sjc: bool = False
        var_red: bool = True
        token_merging: bool = False
        token_merging_params: dict = field(default_factory=dict)
        max_items_eval: int = 4

    cfg: Config

    # ------------------------------------------------------------------------------------------------------- building

    def configure(self, sharing: "DistillationGuidance | None" = None, stream: str = "") -> None:
        """Read the configuration and load the networks.

        Args:
            sharing: another guidance, whose networks are used instead of loading the same ones again; see `VAEPrior.from_pretrained`.
            stream: what this guidance's random numbers are named by. Two that are called in one step draw the same timesteps and noise
                unless their names differ.
        """
        self._stream = stream
        self._regulation = Regulation(self.cfg.pgc)
        self.pgc = self._regulation.config
        self._method = make_method(self.cfg.objective, self.cfg.objective_options)
        self._check_combination()
        self._controls = self._read_controls()
        device = get_device()
        info(f"Loading {self.cfg.pretrained_model_name_or_path} ...")
        self._prior = self.PRIOR.from_pretrained(
            self.cfg.pretrained_model_name_or_path,
            vae=self.cfg.vae_name_or_path,
            unet=self.cfg.unet_name_or_path,
            controlnet=[name for name, _, _ in self._controls] or None,
            control_scale=_plain(self.cfg.control_scale),
            dtype=self.cfg.dtype if self.cfg.half_precision_weights else "fp32",
            device=device,
            image_size=self.cfg.image_size,
            attention="sliced" if self.cfg.enable_attention_slicing else "sdpa",
            channels_last=self.cfg.enable_channels_last_format,
            encoder_checkpointing=self.cfg.encoder_checkpointing,
            sharing=None if sharing is None else sharing._prior,
        )
        info(self._prior.memory_note())
        if sharing is not None:
            others = sharing._prior.networks().values()
            shared = [name for name, network in self._prior.networks().items() if network in others]
            info(f"Of these, shared with the other guidance and in memory once: {', '.join(shared) or 'none'}")
        self._scale, self._form = self._guidance()
        if self._method.guidance_scale is not None:
            info(f"Guidance scale {self._scale:g} in the {self._form} form: {effective_scale(self._scale, self._form):g} in effect")
        self._method.prepare(self._prior)
        self._encode = self._pullback_encoder()
        self._step, self._epoch = 0, 0
        self._last_controls: list[Tensor] = []

    def _check_combination(self) -> None:
        """Refuse what cannot mean anything, before a model is loaded."""
        config, method, name = self.cfg, self._method, self.cfg.objective
        for key, value in _INERT.items():
            if config[key] != value:
                refuse(key, config[key], f"{value!r}: this guidance does not do this")
        if config.cfg not in (None, *CFG_FORMS):
            refuse("cfg", config.cfg, f"null or one of {', '.join(CFG_FORMS)}")
        if config.weighting_strategy not in WEIGHTINGS:
            refuse("weighting_strategy", config.weighting_strategy, f"one of {', '.join(WEIGHTINGS)}")
        if config.timestep_sampling not in SAMPLINGS:
            refuse("timestep_sampling", config.timestep_sampling, f"one of {', '.join(SAMPLINGS)}")
        if config.sqrt_anneal and config.timestep_sampling != "uniform":
            refuse("sqrt_anneal", True, f"false, because timestep_sampling is {config.timestep_sampling!r}")
        if not 0 <= config.guidance_rescale <= 1:
            refuse("guidance_rescale", config.guidance_rescale, "a number from 0 to 1")
        if method.guidance_scale is None:
            for key in ("guidance_scale", "cfg"):
                if config[key] is not None:
                    refuse(key, config[key], f"null: {name} takes the two predictions' difference itself and has no guidance scale")
        if config.guidance_rescale and (method.guidance_scale is None or not method.perpendicular):
            refuse("guidance_rescale", config.guidance_rescale, f"0: {name} does not form a guided prediction that could be rescaled")
        if config.cfg is not None and method.guidance_scale is not None and not method.perpendicular:
            refuse("cfg", config.cfg, f"null: {name} has its own form of guidance")
        if config.guidance_scale is not None and not isinstance(config.guidance_scale, (int, float)):
            refuse("guidance_scale", config.guidance_scale, "a number or null")
        if self.pgc.pullback == "none" and name == "bgt":
            refuse("objective", name, "another: bgt compares images, and with pgc.pullback none there is none")

    def _read_controls(self) -> list[tuple[str, str, str]]:
        """(name, kind, normal convention) of each ControlNet."""
        names = _as_list(self.cfg.controlnet_name_or_path)
        kinds = _as_list(self.cfg.control_kind) or [None] * len(names)
        if len(kinds) != len(names):
            refuse("control_kind", kinds, f"{len(names)} entries, one for each of controlnet_name_or_path")
        scale = _plain(self.cfg.control_scale)
        if isinstance(scale, list) and len(scale) != len(names):
            refuse("control_scale", scale, f"a number, or {len(names)} entries, one for each of controlnet_name_or_path")
        controls = []
        for name, kind in zip(names, kinds):
            kind = kind or control_kind_of(name)
            if kind is None:
                refuse("control_kind", None, f"depth or normal: the name {name!r} does not say which it is")
            if kind not in CONTROL_KINDS:
                refuse("control_kind", kind, f"one of {', '.join(CONTROL_KINDS)}")
            convention = self.cfg.normal_convention or known_normal_convention(name)
            if convention not in NORMAL_CONVENTIONS:
                refuse("normal_convention", convention, f"null or one of {', '.join(NORMAL_CONVENTIONS)}")
            controls.append((name, kind, convention))
        return controls

    def _guidance(self) -> tuple[float, str]:
        """Guidance scale and form: the configuration's, else the method's, and none on a checkpoint that has it distilled into it."""
        config, method = self.cfg, self._method
        own_scale, own_form = method.guidance_scale, method.cfg
        if self.PRIOR_SCALE is not None and own_scale is not None:
            own_scale, own_form = self.PRIOR_SCALE
        scale = config.guidance_scale if config.guidance_scale is not None else own_scale
        form = config.cfg or own_form
        conflict = distilled_conflict(self._prior.guidance_distilled, method, scale, form)
        if conflict is None:
            return scale or 0.0, form
        why = self._prior.guidance_distilled
        reason = f"{config.pretrained_model_name_or_path} is distilled, {why}: without a prompt it predicts nothing of use"
        if conflict == "objective":
            refuse("objective", config.objective, f"sds, bgt or vsd. {reason}, and {config.objective} lives on that prediction")
        if config.guidance_scale is not None:
            refuse("guidance_scale", config.guidance_scale, f"{0.0 if form == 'authors' else 1.0} in the {form} form, or null. {reason}")
        warn(f"{reason}; classifier-free guidance is off")
        return 0.0, "authors"

    def _pullback_encoder(self):
        """The map whose transpose brings the latent gradient to the image."""
        if self.pgc.pullback != "linear":
            return self._prior.encode
        if self.pgc.linear_map in (None, "paper") and self.PRIOR.FAMILY != "sdxl":
            refuse("pgc.linear_map", self.pgc.linear_map, "a file of `gradient_lab.py fit-linear`: the paper's map is of SDXL's VAE")
        linear = find_linear_map(self.pgc.linear_map)
        if len(linear.bias) != self._prior.latent_channels:
            raise ValueError(
                f"{WHERE}.pgc.linear_map: found a map to {len(linear.bias)} latent channels, "
                f"wanted {self._prior.latent_channels} for {self.cfg.pretrained_model_name_or_path}"
            )
        return partial(linear.encode, latent_size=self._prior.latent_size)

    # -------------------------------------------------------------------------------------------------------- the run

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._epoch, self._step = epoch, global_step

    def _now(self, value: Any) -> Any:
        return C(value, self._epoch, self._step)

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint of the run must hold beside the parameters: an adaptive threshold's running quantile, a method's adapter."""
        method = self._method.state_dict()
        return self._regulation.run_state() | ({"method": method} if method else {})

    def load_run_state(self, state: dict[str, Any]) -> None:
        self._regulation.load_run_state(state)
        if "method" in state:
            self._method.load_state_dict(state["method"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents."""
        return self._prior.latent_size, self._prior.latent_size, self._prior.latent_channels

    def last_norms(self) -> Tensor | None:
        """(B, H, W) norms of the last step's raw image gradient, for a picture; None before the first step."""
        return self._regulation.last_norms()

    def last_controls(self) -> list[Tensor]:
        """The last step's control images, (B, H, W, 3) each, one per ControlNet, for a picture."""
        return self._last_controls

    def __call__(
        self,
        rgb: Tensor,
        prompt_utils: Any,
        elevation: Tensor,
        azimuth: Tensor,
        camera_distances: Tensor,
        rgb_as_latents: bool = False,
        guidance_eval: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Distillation loss of a batch of rendered views.

        Args:
            rgb: (B, H, W, 3) in [0, 1], or (B, h, w, C) latents with `rgb_as_latents`, which are resized to the model's.
            prompt_utils: what the prompt processor returned; for Stable Diffusion also one of threestudio's own.
            elevation, azimuth: (B,) degrees. camera_distances: (B,).
            kwargs: the rest of the batch and of what was rendered. With a ControlNet depth, opacity (B, H, W, 1) and, for normals,
                view_normal (B, H, W, 3); c2w (B, 4, 4) tells vsd's adapter the camera.

        Returns:
            "loss_sds", a scalar whose gradient at `rgb` is the regulated per-view gradient divided by B, and numbers for the logs:
            "grad_norm", "min_step", "max_step", those of `Regulation.account`, and what the method says of its own.
        """
        if not hasattr(prompt_utils, "conditioning"):
            conditioning = self._conditioning_of_host(prompt_utils, elevation, azimuth, camera_distances)
            return self._distil(rgb, conditioning, rgb_as_latents, kwargs)
        if self._method.separate_negative and not prompt_utils.negative_prompt.strip():
            raise ValueError(
                f"system.prompt_processor.negative_prompt: found nothing, wanted what bad pictures look like: {self.cfg.objective} needs it"
            )
        conditioning = prompt_utils.conditioning(
            elevation,
            azimuth,
            camera_distances,
            self.cfg.view_dependent_prompting,
            separate_negative=self._method.separate_negative,
        )
        if conditioning.negative_weights is not None and not self._method.perpendicular:
            raise ValueError(
                f"system.prompt_processor.use_perp_neg: found true, wanted false: {self.cfg.objective} forms no guided prediction"
            )
        return self._distil(rgb, conditioning, rgb_as_latents, kwargs)

    def _conditioning_of_host(self, prompt_utils: Any, *view: Tensor) -> Conditioning:
        """From threestudio's own prompt processors: one embedding per view and its negative, which is all that Stable Diffusion takes."""
        key = "system.prompt_processor"
        ours = "wanted pgc-prompt-processor"
        if self.PRIOR.FAMILY != "sd":
            raise ValueError(f"{key}_type: found one of threestudio's own, {ours}: {self.PRIOR.WHAT} takes more than one embedding")
        if self._method.separate_negative:
            raise ValueError(
                f"{key}_type: found one of threestudio's own, {ours}: {self.cfg.objective} needs the negative prompt on its own"
            )
        if prompt_utils.use_perp_neg:
            raise ValueError(f"{key}.use_perp_neg: found true with threestudio's own prompt processor, {ours}")
        return Conditioning(*prompt_utils.get_text_embeddings(*view, self.cfg.view_dependent_prompting).chunk(2))

    def _distil(self, rgb: Tensor, conditioning: Conditioning, rgb_as_latents: bool, rendered: dict[str, Any]) -> dict[str, Any]:
        batch, device = len(rgb), rgb.device
        buffers = {name: rendered.get(name) for name in BUFFERS}
        self._last_controls = [make_control(kind, buffers, normal_convention=style) for _, kind, style in self._controls]
        last = self._prior.num_train_timesteps
        t_range = (self._now(self.cfg.min_step_percent), self._now(self.cfg.max_step_percent))
        timesteps = draw_timesteps(
            "sqrt-anneal" if self.cfg.sqrt_anneal else self.cfg.timestep_sampling,
            batch,
            t_range,
            last,
            progress=min(1.0, self._step / self.cfg.trainer_max_steps),
            generator=step_generator(f"{self._stream}timesteps", self._step),
            device=device,
        )
        size, channels = self._prior.latent_size, self._prior.latent_channels
        if rgb_as_latents and rgb.shape[-1] == channels:  # threestudio's systems leave the size of latents to the guidance
            rgb = F.interpolate(rgb.movedim(-1, 1), (size, size), mode="bilinear", align_corners=False).movedim(1, -1)
        image_is_latent = rgb_as_latents or self.pgc.pullback == "none"
        if image_is_latent and rgb.shape != (batch, size, size, channels):
            why = "rgb_as_latents" if rgb_as_latents else "system.guidance.pgc.pullback none"
            raise ValueError(f"{why}: found an image of shape {tuple(rgb.shape)}, wanted latents ({batch}, {size}, {size}, {channels})")
        noise = torch.randn(
            (batch, channels, size, size),
            generator=step_generator(f"{self._stream}noise", self._step, device),
            device=device,
        )
        step = distill(
            rgb.float(),
            self._prior,
            conditioning.to(device),
            timesteps=timesteps,
            noise=noise,
            rule=self._regulation.rule,
            threshold=self._regulation.threshold(self._epoch, self._step),
            norm=self.pgc.norm,
            method=self._method,
            guidance_scale=self._scale,
            cfg=self._form,
            rescale=self.cfg.guidance_rescale,
            weighting=self.cfg.weighting_strategy,
            control=self._last_controls or None,
            camera=rendered.get("c2w"),
            generator=step_generator(f"{self._stream}method", self._step),
            latent_clip=None if self.cfg.grad_clip is None else self._now(self.cfg.grad_clip),
            encode=self._encode,
            image_is_latent=image_is_latent,
            views_per_pullback=self.pgc.views_per_pullback,
        )
        low, high = timestep_bounds(t_range, last)
        numbers = self._regulation.account(step.raw, step.threshold, self._step)
        if not bool(torch.isfinite(step.latent_gradient).any()):
            numbers["all_nonfinite"] = 1.0  # the pullback has made zeros of it
        return {
            "loss_sds": surrogate_loss(rgb, step.regulated) / batch,
            "grad_norm": float(step.latent_gradient.norm()),
            "min_step": low,
            "max_step": high,
            **numbers,
            **step.numbers,
        }


def refuse(key: str, found: Any, wanted: str) -> NoReturn:
    """Raise the ValueError of a key of the guidance's configuration."""
    raise ValueError(f"{WHERE}.{key}: found {found!r}, wanted {wanted}")


def _plain(value: Any) -> Any:
    """A list of the configuration library as a list."""
    return value if value is None or isinstance(value, (str, int, float)) else list(value)


def _as_list(value: Any) -> list:
    value = _plain(value)
    return [] if value is None else value if isinstance(value, list) else [value]


@register("pgc-sdxl-guidance")
class SDXLGuidance(DistillationGuidance):
    """SDXL: base 1.0 or any fine-tune of its architecture. Config: see `DistillationGuidance`."""

    PRIOR = SDXLPrior

    @dataclass
    class Config(DistillationGuidance.Config):
        pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-xl-base-1.0"

    cfg: Config


@register("pgc-stable-diffusion-guidance")
class StableDiffusionGuidance(DistillationGuidance):
    """Stable Diffusion 1.x and 2.x, predicting noise or velocity. Config: see `DistillationGuidance`."""

    PRIOR = StableDiffusionPrior

    @dataclass
    class Config(DistillationGuidance.Config):
        pretrained_model_name_or_path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"

    cfg: Config


@register("pgc-sd3-guidance")
class StableDiffusion3Guidance(DistillationGuidance):
    """Stable Diffusion 3 and 3.5, flow matching. Config: see `DistillationGuidance`; it takes no ControlNets."""

    PRIOR = StableDiffusion3Prior

    @dataclass
    class Config(DistillationGuidance.Config):
        pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3-medium-diffusers"

    cfg: Config


@register("pgc-flux-guidance")
class FluxGuidance(DistillationGuidance):
    """FLUX.1-dev and its fine-tunes, flow matching. Config: see `DistillationGuidance`; it takes no ControlNets."""

    PRIOR = FluxPrior

    @dataclass
    class Config(DistillationGuidance.Config):
        pretrained_model_name_or_path: str = "black-forest-labs/FLUX.1-dev"

    cfg: Config
