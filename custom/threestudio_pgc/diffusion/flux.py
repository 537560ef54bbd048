"""FLUX.1 as a frozen latent prior, on 2 x 2 patches of latents of 16 channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .flow_prior import FlowPrior
from .prior import PriorError
from .vae_prior import Condition

PATCH = 2  # latents per side that make up one token
TRAINED_LATENTS = 128  # per side; the transformer's positions are rotary, so its configuration names no size


class FluxPrior(FlowPrior):
    """The `LatentPrior` of FLUX.1-dev and its fine-tunes, of any size. The transformer is told sigma itself.

    FLUX.1-dev has guidance distilled into it, as an input beside the timestep. That input is held at `embedded_guidance` for every
    prediction; 1 asks for the plain conditional score, on which classifier-free guidance then works as on any other prior.

    Attribute beside those of `FlowPrior`: embedded_guidance.
    """

    FAMILY, WHAT = "flux", "FluxPipeline"
    NETWORK_CLASS, NEEDS_POOLED = "FluxTransformer2DModel", "FLUX"
    NO_CONTROLNETS = "FLUX's are another class (FluxControlNetModel), which is not supported"

    embedded_guidance = 1.0

    def __init__(self, vae, transformer, scheduler_config: Mapping, controlnets: Sequence = (), **options):
        """As `FlowPrior`."""
        super().__init__(vae, transformer, scheduler_config, controlnets, **options)
        if not transformer.config.guidance_embeds:
            self.guidance_distilled = "its transformer does not take the guidance scale as an input (FLUX.1-schnell)"

    def _velocity(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(z_t),), self.embedded_guidance, device=self.device, dtype=self.arithmetic_dtype)
        size = z_t.shape[-1]
        patches = self.transformer(
            pack(z_t).to(self.dtype),
            encoder_hidden_states=condition.hidden,
            pooled_projections=condition.pooled,
            timestep=self.noise_level(t).sigma.flatten(),
            img_ids=patch_positions(size // PATCH, self.device),
            txt_ids=torch.zeros(condition.hidden.shape[1], 3, device=self.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(patches, size)

    def _trained_size(self) -> int:
        return TRAINED_LATENTS * self.vae_scale

    def _check_networks(self) -> None:
        taken, wanted = self.transformer.config.in_channels, self.latent_channels * PATCH**2
        given = self.transformer.out_channels
        if not taken == given == wanted:
            raise PriorError(
                f"the VAE has {self.latent_channels} latent channels, the transformer takes {taken} numbers per patch and gives {given}; "
                f"wanted {wanted} and {wanted}"
            )
        step = self.vae_scale * PATCH
        if self.image_size % step or self.image_size <= 0:
            raise PriorError(f"image_size: found {self.image_size}, wanted a multiple of {step} pixels")


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 w/2, 4 C): rows of patches, in each the channels, in each channel the patch row by row."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(patches: Tensor, size: int) -> Tensor:
    """The inverse of `pack`, for square latents of `size`."""
    side = size // PATCH
    latents = patches.unflatten(1, (side, side)).unflatten(3, (patches.shape[-1] // PATCH**2, PATCH, PATCH))
    return latents.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def patch_positions(side: int, device: torch.device) -> Tensor:
    """(side^2, 3): 0, row and column of each patch, for the rotary position embedding."""
    rows, columns = torch.meshgrid(torch.arange(side, device=device), torch.arange(side, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
