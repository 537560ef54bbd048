"""Score distillation from SDXL, with the image gradient regulated pixel by pixel."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..diffusion.control import depth_control
from ..diffusion.distillation import distill
from ..diffusion.sdxl import SDXLPrior
from ..diffusion.timesteps import sample_timesteps, timestep_bounds
from ..host import BaseObject, C, get_device, info, parse_structured, register, warn
from ..pixelgrad import RULES, PGCConfig, check_pgc, gradient_statistics, make_threshold, pixel_norm, surrogate_loss
from ..pixelgrad.linear_map import find_linear_map
from .randomness import step_generator

# Fields the host's stable-diffusion-guidance has and this one has no use for: accepted at these values, so that swapping
# `system.guidance_type` alone works, refused at any other.
_INERT = {
    "sqrt_anneal": False,
    "use_img_loss": False,
    "use_sjc": False,
    "token_merging": False,
    "enable_sequential_cpu_offload": False,
}


@register("pgc-sdxl-guidance")
class SDXLGuidance(BaseObject):
    """SDS from SDXL (base 1.0 or any fine-tune of its architecture), optionally with a depth ControlNet, under PGC.

    Config:
        pretrained_model_name_or_path: hub id, local diffusers folder or `builtin:pocket`.
        vae_name_or_path: another VAE, such as the fp16-fix one; null keeps the model's own.
        controlnet_name_or_path: a depth ControlNet of the SDXL family; null distils without control.
        control_scale: strength of the ControlNet's residuals.
        guidance_scale, cfg: classifier-free guidance; "authors" is eps_text + s (eps_text - eps_uncond), whose effective scale is s + 1,
            "diffusers" is eps_uncond + s (eps_text - eps_uncond).
        weighting_strategy: "sds" (w = sigma_t^2), "uniform" or "fantasia3d".
        min_step_percent, max_step_percent: t ~ U(min, max), in shares of the training timesteps, per view; numbers or schedules.
        grad_clip: clamp of the latent gradient, per component; null for none.
        half_precision_weights: fp16 on CUDA; a CPU computes in fp32 either way.
        encoder_checkpointing: trade time for memory in the VAE's backward pass.
        enable_attention_slicing, enable_channels_last_format: as in the host's stable-diffusion-guidance. Memory-efficient attention is
            what torch does anyway, whatever enable_memory_efficient_attention says.
        pgc: see `pixelgrad.PGCConfig`.
    """

    @dataclass
    class Config(BaseObject.Config):
        pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-xl-base-1.0"
        vae_name_or_path: Any = None
        controlnet_name_or_path: Any = None
        control_scale: float = 1.0
        guidance_scale: float = 100.0
        cfg: str = "authors"
        weighting_strategy: str = "sds"
        min_step_percent: Any = 0.02
        max_step_percent: Any = 0.5
        grad_clip: Any = None
        half_precision_weights: bool = True
        encoder_checkpointing: bool = False
        view_dependent_prompting: bool = True
        enable_memory_efficient_attention: bool = False
        enable_attention_slicing: bool = False
        enable_channels_last_format: bool = False
        pgc: PGCConfig = field(default_factory=PGCConfig)

        # See _INERT. The rest steer things SDS does not do.
        enable_sequential_cpu_offload: bool = False
        sqrt_anneal: bool = False
        trainer_max_steps: int = 25000
        use_img_loss: bool = False
        use_sjc: bool = False
        var_red: bool = True
        token_merging: bool = False
        token_merging_params: dict = field(default_factory=dict)
        max_items_eval: int = 4

    cfg: Config

    def configure(self) -> None:
        self.pgc = parse_structured(PGCConfig, self.cfg.pgc)
        check_pgc(self.pgc)
        for key, value in _INERT.items():
            if self.cfg[key] != value:
                raise ValueError(f"system.guidance.{key}: found {self.cfg[key]!r}, wanted {value!r}: pgc-sdxl-guidance does not do this")
        device = get_device()
        info(f"Loading {self.cfg.pretrained_model_name_or_path} ...")
        self._prior = SDXLPrior.from_pretrained(
            self.cfg.pretrained_model_name_or_path,
            vae=self.cfg.vae_name_or_path,
            controlnet=self.cfg.controlnet_name_or_path,
            control_scale=self.cfg.control_scale,
            dtype="auto" if self.cfg.half_precision_weights else "fp32",
            device=device,
            attention="sliced" if self.cfg.enable_attention_slicing else "sdpa",
            channels_last=self.cfg.enable_channels_last_format,
            encoder_checkpointing=self.cfg.encoder_checkpointing,
        )
        self._encode = self._pullback_encoder()
        self._adaptive = make_threshold(self.pgc)
        self._step, self._epoch = 0, 0
        self._last_raw: Tensor | None = None

    def _pullback_encoder(self):
        """The map whose transpose brings the latent gradient to the image."""
        if self.pgc.pullback != "linear":
            return self._prior.encode
        linear = find_linear_map(self.pgc.linear_map)
        if len(linear.bias) != self._prior.latent_channels:
            raise ValueError(
                f"system.guidance.pgc.linear_map: found a map to {len(linear.bias)} latent channels, "
                f"wanted {self._prior.latent_channels} for {self.cfg.pretrained_model_name_or_path}"
            )
        return partial(linear.encode, latent_size=self._prior.latent_size)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._epoch, self._step = epoch, global_step

    def _now(self, value: Any) -> Any:
        return C(value, self._epoch, self._step)

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint of the run must hold beside the parameters: the running quantile of an adaptive threshold."""
        return {} if self._adaptive is None else {"threshold": self._adaptive.state_dict()}

    def load_run_state(self, state: dict[str, Any]) -> None:
        if self._adaptive is not None and "threshold" in state:
            self._adaptive.load_state_dict(state["threshold"])

    def last_norms(self) -> Tensor | None:
        """(B, H, W) norms of the last step's raw image gradient, for a picture; None before the first step."""
        return None if self._last_raw is None else pixel_norm(self._last_raw, norm=self.pgc.norm)

    def __call__(
        self,
        rgb: Tensor,
        prompt_utils: Any,
        elevation: Tensor,
        azimuth: Tensor,
        camera_distances: Tensor,
        rgb_as_latents: bool = False,
        guidance_eval: bool = False,
        depth: Tensor | None = None,
        opacity: Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Distillation loss of a batch of rendered views.

        Args:
            rgb: (B, H, W, 3) in [0, 1], or (B, h, w, C) latents with `rgb_as_latents`.
            prompt_utils: what the prompt processor returned.
            elevation, azimuth: (B,) degrees. camera_distances: (B,).
            depth, opacity: (B, H, W, 1) from the renderer, needed with a ControlNet.

        Returns:
            "loss_sds", a scalar whose gradient at `rgb` is the regulated per-view gradient divided by B, and numbers for the logs:
            "grad_norm", "min_step", "max_step", "threshold", "share_clipped", "nonfinite_pixels", "norm_p50", "norm_p99", "norm_max",
            "all_nonfinite" (1.0 when no pixel of the step was usable).
        """
        batch = len(rgb)
        latent_image = rgb_as_latents or self.pgc.pullback == "none"
        control = None
        if self.cfg.controlnet_name_or_path is not None:
            if depth is None or opacity is None:
                raise ValueError("system.guidance.controlnet_name_or_path: a depth ControlNet needs depth and opacity from the renderer")
            control = depth_control(depth, opacity)

        t_range = (self._now(self.cfg.min_step_percent), self._now(self.cfg.max_step_percent))
        device = rgb.device
        timesteps = sample_timesteps(
            batch, t_range, self._prior.num_train_timesteps, generator=step_generator("timesteps", self._step), device=device
        )
        size = self._prior.latent_size
        noise = torch.randn(
            (batch, self._prior.latent_channels, size, size),
            generator=step_generator("noise", self._step, device),
            device=device,
        )
        low, high = timestep_bounds(t_range, self._prior.num_train_timesteps)
        step = distill(
            rgb.float(),
            self._prior,
            prompt_utils.conditioning(elevation, azimuth, camera_distances, self.cfg.view_dependent_prompting).to(device),
            timesteps=timesteps,
            noise=noise,
            rule=RULES[self.pgc.rule if self.pgc.enabled else "none"],
            threshold=self._adaptive or float(self._now(self.pgc.threshold)),
            norm=self.pgc.norm,
            guidance_scale=self.cfg.guidance_scale,
            cfg=self.cfg.cfg,
            weighting=self.cfg.weighting_strategy,
            control=control,
            latent_clip=None if self.cfg.grad_clip is None else self._now(self.cfg.grad_clip),
            encode=self._encode,
            image_is_latent=latent_image,
            views_per_pullback=self.pgc.views_per_pullback,
        )
        self._last_raw = step.raw
        statistics = gradient_statistics(step.raw, step.threshold, norm=self.pgc.norm)
        unusable = statistics["nonfinite"] == step.raw[..., 0].numel() or not bool(torch.isfinite(step.latent_gradient).any())
        if statistics["nonfinite"]:
            warn(f"step {self._step}: {int(statistics['nonfinite'])} pixels had a non-finite gradient and were zeroed")
        return {
            "loss_sds": surrogate_loss(rgb, step.regulated) / batch,
            "grad_norm": float(step.latent_gradient.norm()),
            "min_step": low,
            "max_step": high,
            "threshold": step.threshold,
            "share_clipped": statistics["share_clipped"],
            "nonfinite_pixels": statistics["nonfinite"],
            "norm_p50": statistics["norm_p50"],
            "norm_p99": statistics["norm_p99"],
            "norm_max": statistics["norm_max"],
            "all_nonfinite": float(unusable),
        }
