"""SDXL as a frozen latent prior: VAE, U-Net and, if asked for, ControlNets. The text encoders live in `prompts` and are not loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import schedule
from .prior import (
    MODEL,
    MODEL_KEY,
    SCHEDULER,
    UNET,
    VAE,
    Conditioning,
    NoisePrediction,
    Part,
    PriorError,
    find_model,
    freeze,
    load_module,
    local_folder,
    memory_note,
    read_config,
    resolve_dtype,
    set_attention,
    without_autocast,
)

# Configuration keys, as errors name them.
VAE_KEY, CONTROLNET_KEY = "vae_name_or_path", "controlnet_name_or_path"


class SDXLPrior:
    """The `LatentPrior` of Stable Diffusion XL, of any size and number of latent channels.

    The networks run in their own precision: the U-Net and ControlNets in `dtype`, the VAE in `vae_dtype`. Everything outside them is
    float32 (float64 after `.to(dtype=torch.float64)`), and no autocast of a surrounding trainer reaches inside.

    Attributes: num_train_timesteps, alphas_cumprod (T,), latent_channels, image_size, latent_size (pixels and latents per side),
    prediction_type, device, dtype, vae_dtype, vae, unet, controlnets (list), control_scales (list of float).
    """

    def __init__(
        self,
        vae,
        unet,
        scheduler_config: Mapping,
        controlnets: Sequence = (),
        *,
        control_scale: float | Sequence[float] = 1.0,
        image_size: int | None = None,
        attention: str = "sdpa",
        channels_last: bool = False,
        encoder_checkpointing: bool = False,
    ):
        """Takes diffusers' AutoencoderKL, UNet2DConditionModel and ControlNetModels as they are loaded; freezes them.

        image_size  side of the image the VAE sees, pixels; by default the size the U-Net was trained at

        Raises PriorError where the parts do not fit each other or are not SDXL's.
        """
        self.vae, self.unet, self.controlnets = freeze(vae), freeze(unet), [freeze(net) for net in controlnets]
        self.vae_scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels = vae.config.latent_channels
        self.image_size = image_size or self._trained_size()
        self.latent_size = self.image_size // self.vae_scale
        self.control_scales = self._scales(control_scale)
        self._read_schedule(dict(scheduler_config))
        self._check_parts()

        raw_mean = vae.config.get("latents_mean") or [0.0] * self.latent_channels
        raw_std = vae.config.get("latents_std") or [1.0] * self.latent_channels
        scaling = vae.config.get("scaling_factor") or 1.0
        shift = vae.config.get("shift_factor") or 0.0
        self._latent_offset = torch.tensor(raw_mean, dtype=torch.float64) + shift
        self._latent_gain = scaling / torch.tensor(raw_std, dtype=torch.float64)

        for net in (self.unet, *self.controlnets):
            set_attention(net, attention)
            if channels_last:
                net.to(memory_format=torch.channels_last)
        if encoder_checkpointing:
            self.vae.enable_gradient_checkpointing()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        vae: str | Path | None = None,
        controlnet: str | Path | Sequence[str | Path] | None = None,
        control_scale: float | Sequence[float] = 1.0,
        dtype: str | torch.dtype = "auto",
        vae_dtype: str | torch.dtype = "auto",
        device: torch.device | str = "cpu",
        image_size: int | None = None,
        attention: str = "sdpa",
        channels_last: bool = False,
        encoder_checkpointing: bool = False,
    ) -> SDXLPrior:
        """Load from a local folder, `builtin:<name>` or hub id, safetensors only.

        vae            another VAE than the pipeline's, e.g. madebyollin/sdxl-vae-fp16-fix
        controlnet     one or several ControlNets, with `control_scale` one number for all or one each
        dtype          "auto" (fp16 on CUDA, fp32 on CPU) | "fp32" | "fp16" | "bf16", for U-Net and ControlNets
        vae_dtype      likewise; "auto" is `dtype`, but fp32 where that is fp16 and the VAE's config says `force_upcast`: the
                       original SDXL VAE overflows in half precision, the fp16-fix one does not
        attention      "sdpa" | "sliced" (less memory, slower) | "xformers"
        encoder_checkpointing  recompute the VAE encoder's activations in its backward pass: less memory, one more forward pass

        Raises PriorError, naming the argument, for anything that cannot be had or does not fit.
        """
        device = torch.device(device)
        unet_dtype = resolve_dtype(dtype, device)
        half = unet_dtype != torch.float32
        key = MODEL_KEY
        parts = [UNET, SCHEDULER] + ([VAE] if vae is None else [])
        root = find_model(pretrained_model_name_or_path, key, parts, half=half)
        _refuse_other_pipelines(root, key)
        vae_root, vae_part, vae_key = (root, VAE, key) if vae is None else (*find_single(vae, VAE_KEY, VAE, half), VAE_KEY)
        names = [] if controlnet is None else [controlnet] if isinstance(controlnet, str | Path) else list(controlnet)
        control_roots = [find_model(name, CONTROLNET_KEY, [MODEL], pipeline=False, half=half) for name in names]

        from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

        force_upcast = read_config(vae_root, vae_part).get("force_upcast", True)
        prior = cls(
            load_module(
                AutoencoderKL, vae_root, vae_part, vae_key, resolve_vae_dtype(vae_dtype, unet_dtype, force_upcast, device)
            ),
            load_module(UNet2DConditionModel, root, UNET, key, unet_dtype),
            read_config(root, SCHEDULER),
            [load_module(ControlNetModel, folder, MODEL, CONTROLNET_KEY, unet_dtype) for folder in control_roots],
            control_scale=control_scale,
            image_size=image_size,
            attention=attention,
            channels_last=channels_last,
            encoder_checkpointing=encoder_checkpointing,
        )
        return prior.to(device)

    @classmethod
    def from_config(
        cls, configs: Mapping[str, Mapping], *, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32, **options
    ) -> SDXLPrior:
        """The architecture without weights: on the meta device nothing is allocated, on another the weights are random.

        configs  "vae", "unet", "scheduler", and optionally "controlnet" (one dict), as in a diffusers folder
        """
        from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

        with torch.device(device):
            vae = AutoencoderKL.from_config(configs["vae"])
            unet = UNet2DConditionModel.from_config(configs["unet"])
            nets = [ControlNetModel.from_config(configs["controlnet"])] if "controlnet" in configs else []
        return cls(vae, unet, configs["scheduler"], nets, **options).to(dtype=dtype)

    # ------------------------------------------------------------------------------------------------------ what it is

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the U-Net and the ControlNets."""
        return next(self.unet.parameters()).dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @property
    def arithmetic_dtype(self) -> torch.dtype:
        """Precision of everything outside the networks: float32, or float64 where the networks are."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) abar_t, computed in float64, in the arithmetic's precision, on the prior's device."""
        return self._alphas_cumprod.to(self.device, self.arithmetic_dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SDXLPrior:
        """Move, and with `dtype` cast all networks (to float64 in tests). Returns itself."""
        for net in (self.vae, self.unet, *self.controlnets):
            nn.Module.to(net, device=device, dtype=dtype)  # diffusers' own `to` warns about casts that are meant
        return self

    def memory_note(self) -> str:
        """One line for the log: parameters and memory of each network, by precision."""
        nets = {"VAE": self.vae, "U-Net": self.unet}
        return memory_note(nets | {f"ControlNet {i}": net for i, net in enumerate(self.controlnets, 1)})

    # ---------------------------------------------------------------------------------------------------- what it does

    def encode(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> latents z (B, C, h, w), differentiable with respect to the image.

        Resized bilinearly to `image_size` where it differs (smoothed first where it shrinks, so that every pixel gets a gradient),
        then the mode of the posterior, not a sample of it: sampling would add noise to the gradient and nothing else.
        z = (raw - shift - mean) scaling / std, with the VAE's own constants.

        Raises ValueError where the image is not (B, H, H, 3).
        """
        if image.ndim != 4 or image.shape[-1] != 3 or image.shape[1] != image.shape[2]:
            raise ValueError(f"image: found shape {tuple(image.shape)}, wanted (B, H, H, 3)")
        pixels = self._resize(image.to(self.arithmetic_dtype).permute(0, 3, 1, 2)) * 2 - 1
        with without_autocast(self.device):
            raw = self.vae.encode(pixels.to(self.vae_dtype)).latent_dist.mode()
        return (raw.to(self.arithmetic_dtype) - self._channels(self._latent_offset)) * self._channels(self._latent_gain)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> image (B, H, W, 3), clamped to [0, 1]."""
        raw = latents.to(self.arithmetic_dtype) / self._channels(self._latent_gain) + self._channels(self._latent_offset)
        with without_autocast(self.device):
            pixels = self.vae.decode(raw.to(self.vae_dtype)).sample
        return ((pixels.to(self.arithmetic_dtype) + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)

    def alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """t (B,) -> abar_t (B, 1, 1, 1)."""
        return self.alphas_cumprod[t.to(self.device)].view(-1, 1, 1, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps; latents, noise (B, C, h, w), t (B,)."""
        return schedule.add_noise(latents, noise, self.alphas_cumprod_at(t))

    @torch.no_grad()
    def predict_noise(
        self, z_t: Tensor, t: Tensor, conditioning: Conditioning, control: Tensor | Sequence[Tensor] | None = None
    ) -> NoisePrediction:
        """Both halves of classifier-free guidance in one batch of 2B, conditional first. No graph is kept.

        z_t      (B, C, h, w)      t  (B,) integers in [0, T)      conditioning  of B views, pooled embeddings included
        control  (B, 3, H, W) or (B, H, W, 3) in [0, 1], one for each ControlNet; given to both halves. None: without ControlNets

        Raises ValueError where batch sizes, pooled embeddings or control images do not fit.
        """
        batch = z_t.shape[0]
        if t.shape != (batch,) or len(conditioning) != batch:
            raise ValueError(f"found {batch} latents, timesteps {tuple(t.shape)} and {len(conditioning)} conditionings, wanted as many")
        if conditioning.pooled_cond is None or conditioning.pooled_uncond is None:
            raise ValueError("conditioning: SDXL needs the pooled embeddings of both halves, found None")
        images = self._control_images(control, batch)

        z_t = z_t.to(self.device, self.arithmetic_dtype)
        t = t.to(self.device)
        sample = torch.cat([z_t, z_t]).to(self.dtype)
        steps = torch.cat([t, t])
        hidden = torch.cat([conditioning.cond, conditioning.uncond]).to(self.device, self.dtype)
        time_ids = self.time_ids(batch) if conditioning.time_ids is None else conditioning.time_ids
        added = {
            "text_embeds": torch.cat([conditioning.pooled_cond, conditioning.pooled_uncond]).to(self.device, self.dtype),
            # left in float32: sizes in pixels are not exact in half precision
            "time_ids": torch.cat([time_ids, time_ids]).to(self.device, self.arithmetic_dtype),
        }
        with without_autocast(self.device):
            down, middle = self._control_residuals(images, sample, steps, hidden, added)
            output = self.unet(
                sample,
                steps,
                encoder_hidden_states=hidden,
                added_cond_kwargs=added,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        cond, uncond = output.to(self.arithmetic_dtype).chunk(2)
        alpha_bar = self.alphas_cumprod_at(t)
        return NoisePrediction(
            schedule.noise_from_output(cond, z_t, alpha_bar, self.prediction_type),
            schedule.noise_from_output(uncond, z_t, alpha_bar, self.prediction_type),
        )

    def time_ids(self, batch: int) -> Tensor:
        """(batch, 6) float: original height and width, crop top and left (0, 0), target height and width, in pixels."""
        size = float(self.image_size)
        return torch.tensor([[size, size, 0.0, 0.0, size, size]], device=self.device).expand(batch, 6)

    # ------------------------------------------------------------------------------------------------------- internals

    def _resize(self, image: Tensor) -> Tensor:
        size = self.image_size
        if image.shape[-2:] == (size, size):
            return image
        return F.interpolate(image, (size, size), mode="bilinear", align_corners=False, antialias=image.shape[-1] > size)

    def _channels(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.arithmetic_dtype).view(1, -1, 1, 1)

    def _control_images(self, control, batch: int) -> list[Tensor]:
        if control is None:
            return []
        images = [control] if isinstance(control, Tensor) else list(control)
        if len(images) != len(self.controlnets):
            raise ValueError(f"control: found {len(images)} control images for {len(self.controlnets)} ControlNets, wanted one each")
        prepared = []
        for image in images:
            if image.ndim == 4 and image.shape[1] != 3 and image.shape[-1] == 3:
                image = image.permute(0, 3, 1, 2)
            if image.ndim != 4 or image.shape[:2] != (batch, 3):
                raise ValueError(f"control: found shape {tuple(image.shape)}, wanted ({batch}, 3, H, W) or ({batch}, H, W, 3)")
            image = self._resize(image.to(self.device, self.arithmetic_dtype))
            prepared.append(torch.cat([image, image]).to(self.dtype))
        return prepared

    def _control_residuals(self, images, sample, steps, hidden, added) -> tuple[list[Tensor] | None, Tensor | None]:
        """The ControlNets' residuals, each times its scale, summed over the ControlNets."""
        down, middle = None, None
        for net, scale, image in zip(self.controlnets, self.control_scales, images):
            own_down, own_middle = net(
                sample,
                steps,
                encoder_hidden_states=hidden,
                controlnet_cond=image,
                conditioning_scale=scale,
                added_cond_kwargs=added,
                return_dict=False,
            )
            down = own_down if down is None else [a + b for a, b in zip(down, own_down)]
            middle = own_middle if middle is None else middle + own_middle
        return down, middle

    def _trained_size(self) -> int:
        size = self.unet.config.sample_size
        if size is None:
            raise PriorError("image_size: the U-Net's config.json has no sample_size; wanted image_size in pixels")
        return (size if isinstance(size, int) else size[0]) * self.vae_scale

    def _scales(self, control_scale: float | Sequence[float]) -> list[float]:
        scales = list(control_scale) if isinstance(control_scale, Sequence) else [control_scale] * len(self.controlnets)
        if len(scales) != len(self.controlnets):
            raise PriorError(f"control_scale: found {len(scales)} numbers for {len(self.controlnets)} ControlNets, wanted one each")
        return [float(scale) for scale in scales]

    def _read_schedule(self, config: dict) -> None:
        try:
            self._alphas_cumprod = schedule.alphas_cumprod(config)
        except (KeyError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise PriorError(f"scheduler_config.json of class {config.get('_class_name')}: {what}") from error
        self.num_train_timesteps = len(self._alphas_cumprod)
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise PriorError(
                f"scheduler_config.json: prediction_type is {self.prediction_type!r}, wanted epsilon or v_prediction"
            )

    def _check_parts(self) -> None:
        unet = self.unet.config
        if unet.addition_embed_type != "text_time":
            raise PriorError(
                f"the U-Net's addition_embed_type is {unet.addition_embed_type!r}, wanted 'text_time': this is no SDXL model"
            )
        if unet.in_channels != self.latent_channels or unet.out_channels != self.latent_channels:
            raise PriorError(
                f"the VAE has {self.latent_channels} latent channels, the U-Net takes {unet.in_channels} and gives "
                f"{unet.out_channels}; wanted the same number in all"
            )
        step = self.vae_scale * 2 ** (len(unet.block_out_channels) - 1)
        if self.image_size % step or self.image_size <= 0:
            raise PriorError(f"image_size: found {self.image_size}, wanted a multiple of {step} pixels")
        for net in self.controlnets:
            for name in ("in_channels", "cross_attention_dim", "block_out_channels", "addition_embed_type"):
                found, wanted = net.config[name], unet[name]
                if _plain(found) != _plain(wanted):
                    raise PriorError(
                        f"{CONTROLNET_KEY}: its {name} is {found!r}, the U-Net's is {wanted!r}: they are not made for each other"
                    )


def resolve_vae_dtype(
    name: str | torch.dtype, unet_dtype: torch.dtype, force_upcast: bool, device: torch.device | str
) -> torch.dtype:
    """`auto`: the U-Net's precision, but fp32 where that is fp16 and the VAE overflows in it (`force_upcast` of its config)."""
    if name != "auto":
        return resolve_dtype(name, device, key="vae_dtype")
    return torch.float32 if force_upcast and unet_dtype == torch.float16 else unet_dtype


def _plain(value):
    return list(value) if isinstance(value, list | tuple) else value


def find_single(path_or_id: str | Path, key: str, part: Part, half: bool = False) -> tuple[Path, Part]:
    """A model of its own (config.json at the top), or the part of that name inside a pipeline's folder."""
    folder = local_folder(path_or_id)
    if (folder / part.subfolder).is_dir() and not (folder / MODEL.config).is_file():
        return find_model(path_or_id, key, [part], pipeline=False, half=half), part
    return find_model(path_or_id, key, [MODEL], pipeline=False, half=half), MODEL


def _refuse_other_pipelines(root: Path, key: str) -> None:
    """A Stable Diffusion 1 or 2 folder would otherwise fail much later, over its second text encoder."""
    found = read_config(root, Part("", "model_index.json", None)).get("_class_name", "")
    if "XL" not in found:
        raise PriorError(f"{key}: {root} is a {found or 'pipeline without a class name'}, wanted a StableDiffusionXLPipeline")
