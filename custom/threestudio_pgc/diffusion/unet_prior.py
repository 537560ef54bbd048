"""Priors whose network is a U-Net under a diffusion schedule: Stable Diffusion 1 and 2, SDXL, Zero123."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import schedule
from .model_files import CONTROLNET_KEY, UNET
from .prior import NoiseLevel, PriorError
from .vae_prior import Condition, VAEPrior


class UNetPrior(VAEPrior):
    """Attributes beside those of `VAEPrior`: unet (the network), prediction_type ("epsilon" or "v_prediction"), alphas_cumprod (T,)."""

    NETWORK, NETWORK_PART, NETWORK_CLASS = "U-Net", UNET, "UNet2DConditionModel"

    def __init__(self, vae, unet, scheduler_config: Mapping, controlnets: Sequence = (), **options):
        """Takes diffusers' AutoencoderKL, UNet2DConditionModel and ControlNetModels as they are loaded; freezes them.

        options: those of `VAEPrior`. Raises PriorError where the parts do not fit each other or are not this kind of model's.
        """
        self.unet = unet
        super().__init__(vae, unet, controlnets, **options)
        self._read_schedule(dict(scheduler_config))
        self.guidance_distilled = _why_distilled(scheduler_config, unet.config)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) abar_t, computed in float64, in the arithmetic's precision, on the prior's device."""
        return self._alphas_cumprod.to(self.device, self.arithmetic_dtype)

    @property
    def time_embedding(self) -> nn.Module:
        return self.unet.time_embedding

    def noise_level(self, t: Tensor) -> NoiseLevel:
        """alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t)."""
        alpha_bar = self.alphas_cumprod[t.to(self.device)].view(-1, 1, 1, 1)
        return NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition, images: list[Tensor]) -> Tensor:
        sample = z_t if condition.reference is None else torch.cat([z_t, condition.reference], dim=1)
        sample, added = sample.to(self.dtype), self._added(condition)
        down, middle = self._control_residuals(images, sample, t, condition.hidden, added)
        output = self.unet(
            sample,
            t,
            encoder_hidden_states=condition.hidden,
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return schedule.noise_from_output(output.to(self.arithmetic_dtype), z_t, self.noise_level(t), self.prediction_type)

    def _added(self, condition: Condition) -> dict[str, Tensor] | None:
        """What the U-Net takes beside the text."""
        return None

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

    def _read_schedule(self, config: dict) -> None:
        try:
            self._alphas_cumprod = schedule.alphas_cumprod(config)
        except (KeyError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise PriorError(f"scheduler_config.json of class {config.get('_class_name')}: {what}") from error
        self.num_train_timesteps = len(self._alphas_cumprod)
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise PriorError(f"scheduler_config.json: prediction_type is {self.prediction_type!r}, wanted epsilon or v_prediction")

    @abstractmethod
    def _check_unet(self, config) -> None:
        """Raises PriorError where the U-Net is another kind of model's."""

    def _channels_taken(self) -> int:
        """Input channels that the U-Net must have."""
        return self.latent_channels

    def _check_networks(self) -> None:
        unet = self.unet.config
        self._check_unet(unet)
        if unet.in_channels != self._channels_taken() or unet.out_channels != self.latent_channels:
            raise PriorError(
                f"the VAE has {self.latent_channels} latent channels, the U-Net takes {unet.in_channels} and gives {unet.out_channels}; "
                f"wanted {self._channels_taken()} and {self.latent_channels}"
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


def _plain(value):
    return list(value) if isinstance(value, list | tuple) else value


def _why_distilled(scheduler: Mapping, unet: Mapping) -> str | None:
    """How a turbo, lightning or LCM checkpoint gives itself away: it samples from the last timestep in a few steps.

    The same spacing on a schedule with zero terminal SNR is an ordinary model's (Lin et al. 2023).
    """
    if unet.get("time_cond_proj_dim") is not None:
        return "its U-Net takes the guidance scale as an input (a latent consistency model)"
    trailing = scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
    if trailing and scheduler.get("_class_name", "").startswith(("Euler", "LCM", "TCD")):
        return "its scheduler samples in a few trailing steps (a turbo or lightning model)"
    return None
