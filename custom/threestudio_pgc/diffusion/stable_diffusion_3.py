"""Stable Diffusion 3 and 3.5 as a frozen latent prior, with a VAE of 16 channels."""

from __future__ import annotations

from torch import Tensor

from .flow_prior import FlowPrior
from .prior import PriorError
from .vae_prior import Condition


class StableDiffusion3Prior(FlowPrior):
    """The `LatentPrior` of Stable Diffusion 3 and 3.5, of any size. The transformer is told sigma T = t + 1."""

    FAMILY, WHAT = "sd3", "StableDiffusion3Pipeline"
    NETWORK_CLASS, NEEDS_POOLED = "SD3Transformer2DModel", "Stable Diffusion 3"
    NO_CONTROLNETS = "Stable Diffusion 3's are another class (SD3ControlNetModel), which is not supported"

    def _velocity(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.transformer(
            z_t.to(self.dtype),
            encoder_hidden_states=condition.hidden,
            pooled_projections=condition.pooled,
            timestep=t + 1,
            return_dict=False,
        )[0]

    def _trained_size(self) -> int:
        return self.transformer.config.sample_size * self.vae_scale

    def _check_networks(self) -> None:
        config = self.transformer.config
        taken, given = config.in_channels, self.transformer.out_channels
        if not taken == given == self.latent_channels:
            raise PriorError(
                f"the VAE has {self.latent_channels} latent channels, the transformer takes {taken} and gives {given}; "
                f"wanted {self.latent_channels} and {self.latent_channels}"
            )
        step, largest = self.vae_scale * config.patch_size, config.pos_embed_max_size
        if self.image_size % step or not 0 < self.image_size <= step * largest:
            raise PriorError(
                f"image_size: found {self.image_size}, wanted a multiple of {step} pixels of at most {step * largest}, "
                "as far as the transformer has positions"
            )
