"""What all priors are made of: a frozen VAE between image and latents, and a frozen network that predicts in the latents."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model_files import (
    CONTROLNET_KEY,
    MODEL,
    MODEL_KEY,
    SCHEDULER,
    VAE,
    VAE_KEY,
    Part,
    Wanted,
    check_family,
    check_memory,
    current_id,
    find_model,
    find_single,
    load_module,
    read_config,
)
from .precision import freeze, memory_note, resolve_dtype, resolve_vae_dtype, set_attention, without_autocast
from .prior import Conditioning, NoiseLevel, NoisePrediction, PriorError

NETWORK_KEY = "unet_name_or_path"  # configuration key, as errors name it; a transformer's too

Control = Tensor | Sequence[Tensor] | None


class Condition(NamedTuple):
    """What N latents are to show: one prediction of each. hidden (N, L, D); the others None where the network takes none."""

    hidden: Tensor
    pooled: Tensor | None = None  # (N, P)
    time_ids: Tensor | None = None  # (N, 6)
    reference: Tensor | None = None  # (N, C, h, w)


class VAEPrior:
    """A `LatentPrior` out of diffusers' networks. Subclasses say how `network` is asked, in `_predict`, and how noise is added, in
    `noise_level`.

    The networks run in their own precision: the denoising network and its ControlNets in `dtype`, the VAE in `vae_dtype`. Everything
    outside them is float32 (float64 after `.to(dtype=torch.float64)`), and no autocast of a surrounding trainer reaches inside.

    Attributes: num_train_timesteps, latent_channels, image_size, latent_size (pixels and latents per side), device, dtype, vae_dtype,
    vae, network (U-Net or transformer), controlnets (list), control_scales (list of float), guidance_distilled (why classifier-free
    guidance would harm this checkpoint, or None).
    """

    FAMILY: ClassVar[str]  # a key of `model_files.FAMILIES`
    WHAT: ClassVar[str]  # the pipeline's class, as errors name it
    NETWORK: ClassVar[str]  # what the denoising network is called in logs
    NETWORK_PART: ClassVar[Part]  # where it lies in a pipeline's folder; its subfolder is its key in `from_config`
    NETWORK_CLASS: ClassVar[str]  # its class in diffusers
    NO_CONTROLNETS: ClassVar[str | None] = None  # why this kind of model takes no ControlNet, where it takes none
    num_train_timesteps: int
    guidance_distilled: str | None = None

    def __init__(
        self,
        vae,
        network: nn.Module,
        controlnets: Sequence[nn.Module] = (),
        *,
        control_scale: float | Sequence[float] = 1.0,
        image_size: int | None = None,
        attention: str = "sdpa",
        channels_last: bool = False,
        encoder_checkpointing: bool = False,
    ):
        """Freezes the networks.

        image_size  side of the image the VAE sees, pixels; by default the size the network was trained at

        Raises PriorError where the VAE does not fit or an option cannot be had.
        """
        self._check_controls(controlnets, control_scale)
        self._loaded: dict[tuple[Any, ...], nn.Module] = {}  # by where it came from and how it was treated: what can be shared
        self.vae, self.network, self.controlnets = freeze(vae), freeze(network), [freeze(net) for net in controlnets]
        self.vae_scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels = vae.config.latent_channels
        self.image_size = image_size or self._trained_size()
        self.latent_size = self.image_size // self.vae_scale
        self.control_scales = self._scales(control_scale)
        self._check_networks()

        raw_mean = vae.config.get("latents_mean") or [0.0] * self.latent_channels
        raw_std = vae.config.get("latents_std") or [1.0] * self.latent_channels
        scaling = vae.config.get("scaling_factor") or 1.0
        shift = vae.config.get("shift_factor") or 0.0
        self._latent_offset = torch.tensor(raw_mean, dtype=torch.float64) + shift
        self._latent_gain = scaling / torch.tensor(raw_std, dtype=torch.float64)

        for net in (self.network, *self.controlnets):
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
        unet: str | Path | None = None,
        controlnet: str | Path | Sequence[str | Path] | None = None,
        control_scale: float | Sequence[float] = 1.0,
        dtype: str | torch.dtype = "auto",
        vae_dtype: str | torch.dtype = "auto",
        device: torch.device | str = "cpu",
        image_size: int | None = None,
        attention: str = "sdpa",
        channels_last: bool = False,
        encoder_checkpointing: bool = False,
        sharing: VAEPrior | None = None,
    ):
        """Load from a local folder, `builtin:<name>` or hub id, safetensors only.

        vae            another VAE than the pipeline's, e.g. madebyollin/sdxl-vae-fp16-fix
        unet           another denoising network than the pipeline's, U-Net or transformer: a fine-tune of the same architecture. The
                       scheduler stays the pipeline's
        controlnet     one or several ControlNets, with `control_scale` one number for all or one each
        dtype          "auto" (fp16 on CUDA, fp32 on CPU) | "fp32" | "fp16" | "bf16", for denoising network and ControlNets
        vae_dtype      likewise; "auto" is `dtype`, but fp32 where that is fp16 and the VAE's config says `force_upcast`: the
                       original SDXL VAE overflows in half precision, the fp16-fix one does not
        attention      "sdpa" | "sliced" (less memory, slower; U-Nets only) | "xformers"
        encoder_checkpointing  recompute the VAE encoder's activations in its backward pass: less memory, one more forward pass
        sharing        a prior whose networks are used instead of loading the same ones again. Shared is each network that comes from the
                       same place in the same precision, and none where device, attention, channels_last or encoder_checkpointing differ.
                       `to` then moves and casts the networks of both

        Raises PriorError, naming the argument, for anything that cannot be had, does not fit, or does not fit into memory.
        """
        device = torch.device(device)
        network_dtype = resolve_dtype(dtype, device)
        half = network_dtype != torch.float32
        controls = [] if controlnet is None else [controlnet] if isinstance(controlnet, str | Path) else list(controlnet)
        cls._check_controls(controls, control_scale)
        name = current_id(pretrained_model_name_or_path)
        check_family(find_model(name, MODEL_KEY, []), cls.FAMILY, cls.WHAT)  # before gigabytes are fetched
        own = [*([cls.NETWORK_PART] if unet is None else []), SCHEDULER, *([VAE] if vae is None else [])]
        root = find_model(name, MODEL_KEY, own, half=half)

        def find(given: str | Path | None, key: str, part: Part) -> tuple[Path, Part, str]:
            return (root, part, MODEL_KEY) if given is None else (*find_single(given, key, part, half), key)

        # VAE, denoising network, ControlNets
        found = [
            find(vae, VAE_KEY, VAE),
            find(unet, NETWORK_KEY, cls.NETWORK_PART),
            *(find(net, CONTROLNET_KEY, MODEL) for net in controls),
        ]
        vae_config = read_config(*found[0][:2])
        dtypes = [resolve_vae_dtype(vae_dtype, network_dtype, vae_config.get("force_upcast", True), device)]
        dtypes += [network_dtype] * (1 + len(controls))
        wanted = [Wanted(folder, part, precision) for (folder, part, _), precision in zip(found, dtypes)]
        origins = [(*network, device, attention, channels_last, encoder_checkpointing) for network in wanted]
        shared = {} if sharing is None else sharing._loaded
        check_memory([network for network, origin in zip(wanted, origins) if origin not in shared], device)

        classes = cls._classes()
        kinds = [classes["vae"], classes[cls.NETWORK_PART.subfolder], *[classes["controlnet"]] * len(controls)]
        networks = [
            shared[origin] if origin in shared else load_module(kind, folder, part, key, precision)
            for kind, (folder, part, key), precision, origin in zip(kinds, found, dtypes, origins)
        ]
        try:
            prior = cls(
                networks[0],
                networks[1],
                read_config(root, SCHEDULER),
                networks[2:],
                control_scale=control_scale,
                image_size=image_size,
                attention=attention,
                channels_last=channels_last,
                encoder_checkpointing=encoder_checkpointing,
            )
        except PriorError as error:
            if unet is None:
                raise
            raise PriorError(f"{error}; the {cls.NETWORK} is that of {NETWORK_KEY}, {str(unet)!r}") from error
        prior.guidance_distilled = prior.guidance_distilled or _distilled_by_name(name if unet is None else str(unet))
        prior.to(device)
        prior._loaded = dict(zip(origins, networks))
        return prior

    @classmethod
    def from_config(
        cls, configs: Mapping[str, Mapping], *, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32, **options
    ):
        """The architecture without weights: on the meta device nothing is allocated, on another the weights are random.

        configs  "vae", "unet" or "transformer", "scheduler", and optionally "controlnet" (one dict), as in a diffusers folder
        """
        with torch.device(device):
            nets = {name: model.from_config(configs[name]) for name, model in cls._classes().items() if name in configs}
        control = [nets["controlnet"]] if "controlnet" in nets else []
        return cls(nets["vae"], nets[cls.NETWORK_PART.subfolder], configs["scheduler"], control, **options).to(dtype=dtype)

    @classmethod
    def _classes(cls) -> dict[str, type]:
        """diffusers' classes by the names that configurations have. Imported here: diffusers takes seconds to import."""
        import diffusers

        network = getattr(diffusers, cls.NETWORK_CLASS)
        return {"vae": diffusers.AutoencoderKL, cls.NETWORK_PART.subfolder: network, "controlnet": diffusers.ControlNetModel}

    @classmethod
    def _check_controls(cls, controlnets: Sequence, control_scale: float | Sequence[float]) -> None:
        """Raises PriorError where this kind of model takes no ControlNets, or they are not as many as their scales."""
        if controlnets and cls.NO_CONTROLNETS is not None:
            raise PriorError(f"{CONTROLNET_KEY}: found {len(controlnets)} ControlNets, wanted none: {cls.NO_CONTROLNETS}")
        if isinstance(control_scale, Sequence) and len(control_scale) != len(controlnets):
            raise PriorError(f"control_scale: found {len(control_scale)} numbers for {len(controlnets)} ControlNets, wanted one each")

    # ------------------------------------------------------------------------------------------------------ what it is

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoising network and the ControlNets."""
        return next(self.network.parameters()).dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @property
    def arithmetic_dtype(self) -> torch.dtype:
        """Precision of everything outside the networks: float32, or float64 where the networks are."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    @abstractmethod
    def time_embedding(self) -> nn.Module:
        """The part of the network whose output (N, E) tells every block the timestep: where a camera can be told as well."""

    def networks(self) -> dict[str, nn.Module]:
        """Every network by the name it has in logs."""
        named = {"VAE": self.vae, self.NETWORK: self.network}
        return named | {f"ControlNet {i}": net for i, net in enumerate(self.controlnets, 1)}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        """Move, and with `dtype` cast all networks (to float64 in tests). Returns itself."""
        self._loaded = {}  # these are no longer the networks that were loaded
        for net in self.networks().values():
            nn.Module.to(net, device=device, dtype=dtype)  # diffusers' own `to` warns about casts that are meant
        return self

    def memory_note(self) -> str:
        """One line for the log: parameters and memory of each network, by precision."""
        return memory_note(self.networks())

    # ---------------------------------------------------------------------------------------------------- what it does

    def encode(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> latents z (B, C, h, w), differentiable with respect to the image.

        Resized bilinearly to `image_size` where it differs (smoothed first where it shrinks, so that every pixel gets a gradient),
        then the mode of the posterior, not a sample of it: sampling would add noise to the gradient and nothing else.
        z = (raw - shift - mean) scaling / std, with the VAE's own constants.

        Raises ValueError where the image is not (B, H, H, 3).
        """
        return (self._encode_raw(image) - self._channels(self._latent_offset)) * self._channels(self._latent_gain)

    def _encode_raw(self, image: Tensor) -> Tensor:
        """The posterior's mode as the VAE gives it, before shift and scale."""
        pixels = self.resize(image).permute(0, 3, 1, 2) * 2 - 1
        with without_autocast(self.device):
            raw = self.vae.encode(pixels.to(self.vae_dtype)).latent_dist.mode()
        return raw.to(self.arithmetic_dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> image (B, H, W, 3), clamped to [0, 1]."""
        raw = latents.to(self.arithmetic_dtype) / self._channels(self._latent_gain) + self._channels(self._latent_offset)
        with without_autocast(self.device):
            pixels = self.vae.decode(raw.to(self.vae_dtype)).sample
        return ((pixels.to(self.arithmetic_dtype) + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)

    def resize(self, image: Tensor) -> Tensor:
        """(B, H, H, C) -> (B, image_size, image_size, C) as the VAE sees it, in the arithmetic's precision.

        Raises ValueError where the image is not (B, H, H, 3).
        """
        if image.ndim != 4 or image.shape[-1] != 3 or image.shape[1] != image.shape[2]:
            raise ValueError(f"image: found shape {tuple(image.shape)}, wanted (B, H, H, 3)")
        return self._resize(image.to(self.arithmetic_dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    @abstractmethod
    def noise_level(self, t: Tensor) -> NoiseLevel:
        """t (B,) integers in [0, T) -> alpha, sigma (B, 1, 1, 1)."""

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, control: Control = None) -> NoisePrediction:
        """All predictions of classifier-free guidance from one batch: conditional, unconditional, negatives. No graph is kept.

        z_t      (B, C, h, w)      t  (B,) integers in [0, T)      conditioning  of B views
        control  (B, 3, H, W) or (B, H, W, 3) in [0, 1], one for each ControlNet; given to every prediction. None: without ControlNets

        Raises ValueError where batch sizes, pooled embeddings or control images do not fit.
        """
        given = conditioning
        hidden = [given.cond, given.uncond, *(() if given.negatives is None else given.negatives)]
        pooled = [given.pooled_cond, given.pooled_uncond, *(() if given.pooled_negatives is None else given.pooled_negatives)]
        noise = self._ask(z_t, t, given, hidden, pooled, control).chunk(len(hidden))
        return NoisePrediction(noise[0], noise[1], torch.stack(noise[2:]) if len(noise) > 2 else None)

    def predict_conditional(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, control: Control = None) -> Tensor:
        """eps(z_t; y, t), (B, C, h, w); as `predict_noise`, but of the prompt alone, and with a graph where autograd is on."""
        return self._ask(z_t, t, conditioning, [conditioning.cond], [conditioning.pooled_cond], control)

    # ------------------------------------------------------------------------------------------------------- internals

    def _ask(self, z_t, t, conditioning: Conditioning, hidden: list[Tensor], pooled: list[Tensor | None], control) -> Tensor:
        """Noise predictions (n B, C, h, w) for n embeddings of B views each."""
        batch, count = z_t.shape[0], len(hidden)
        if t.shape != (batch,) or len(conditioning) != batch:
            raise ValueError(f"found {batch} latents, timesteps {tuple(t.shape)} and {len(conditioning)} conditionings, wanted as many")
        self._check_conditioning(conditioning)
        images = [torch.cat([image] * count).to(self.dtype) for image in self._control_images(control, batch)]
        reference = conditioning.reference
        if reference is not None:
            reference = torch.cat([reference, *[torch.zeros_like(reference)] * (count - 1)]).to(self.device, self.arithmetic_dtype)
        self._check_width(hidden[0].shape[-1])
        condition = Condition(
            torch.cat(hidden).to(self.device, self.dtype),
            torch.cat(pooled).to(self.device, self.dtype) if pooled[0] is not None else None,
            None if conditioning.time_ids is None else torch.cat([conditioning.time_ids] * count),
            reference,
        )
        z_t = z_t.to(self.device, self.arithmetic_dtype)
        with without_autocast(self.device):
            return self._predict(torch.cat([z_t] * count), torch.cat([t.to(self.device)] * count), condition, images)

    @abstractmethod
    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition, images: list[Tensor]) -> Tensor:
        """Predicted noise (N, C, h, w) in the arithmetic's precision. `images`: (N, 3, H, W) in the network's, one per ControlNet."""

    def _check_width(self, found: int) -> None:
        """Raises ValueError where the embeddings are another model's: torch would speak of matrices."""
        config = self.network.config
        wanted = config.get("cross_attention_dim") or config.get("joint_attention_dim")
        if isinstance(wanted, int) and found != wanted:
            raise ValueError(
                f"conditioning: found embeddings {found} numbers wide, wanted {wanted} for this {self.NETWORK}: they are another model's"
            )

    def _check_conditioning(self, conditioning: Conditioning) -> None:
        """Raises ValueError where the network needs what the conditioning lacks."""

    @abstractmethod
    def _check_networks(self) -> None:
        """Raises PriorError where the networks do not fit each other."""

    @abstractmethod
    def _trained_size(self) -> int:
        """Side of the images the network was trained on, pixels."""

    def _resize(self, image: Tensor) -> Tensor:
        size = self.image_size
        if image.shape[-2:] == (size, size):
            return image
        return F.interpolate(image, (size, size), mode="bilinear", align_corners=False, antialias=image.shape[-1] > size)

    def _channels(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.arithmetic_dtype).view(1, -1, 1, 1)

    def _control_images(self, control: Control, batch: int) -> list[Tensor]:
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
            prepared.append(self._resize(image.to(self.device, self.arithmetic_dtype)))
        return prepared

    def _scales(self, control_scale: float | Sequence[float]) -> list[float]:
        scales = list(control_scale) if isinstance(control_scale, Sequence) else [control_scale] * len(self.controlnets)
        return [float(scale) for scale in scales]


def _distilled_by_name(path_or_id: str) -> str | None:
    found = re.search(r"turbo|lightning|hyper-?sd|schnell|(?<![a-z])lcm(?![a-z])", Path(path_or_id).name, re.IGNORECASE)
    return f"its name says {found.group()!r}" if found else None
