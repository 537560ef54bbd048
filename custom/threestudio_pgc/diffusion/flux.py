"""FLUX.1 as a frozen latent prior: a flow-matching transformer on 2 x 2 patches of 16-channel latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import schedule
from .prior import TRANSFORMER, Conditioning, NoiseLevel, PriorError
from .vae_prior import Condition, VAEPrior

PATCH = 2  # latents per side that make up one token
TRAINED_LATENTS = 128  # per side; the transformer's positions are rotary, so its configuration names no size


class FluxPrior(VAEPrior):
    """The `LatentPrior` of FLUX.1-dev and its fine-tunes, of any size.

    A flow-matching model as Stable Diffusion 3: z_t = (1 - sigma) z + sigma eps, sigma = (t + 1) / T for t = 0 ... T - 1; its transformer
    is told sigma itself and predicts eps - z.

    FLUX.1-dev has guidance distilled into it, as an input beside the timestep. That input is held at `embedded_guidance` for every
    prediction; 1 asks for the plain conditional score, on which classifier-free guidance then works as on any other prior.

    Attributes beside those of `VAEPrior`: transformer (the network), embedded_guidance.
    """

    FAMILY, WHAT = "flux", "FluxPipeline"
    NETWORK, NETWORK_PART, NETWORK_CLASS = "transformer", TRANSFORMER, "FluxTransformer2DModel"
    NO_CONTROLNETS = "FLUX's are another class (FluxControlNetModel), which is not supported"

    embedded_guidance = 1.0

    def __init__(self, vae, transformer, scheduler_config: Mapping, controlnets: Sequence = (), **options):
        """Takes diffusers' AutoencoderKL and FluxTransformer2DModel as they are loaded; freezes them. `controlnets` must be empty.

        options: those of `VAEPrior`. Raises PriorError where the parts do not fit each other or are not this kind of model's.
        """
        self.transformer = transformer
        super().__init__(vae, transformer, controlnets, **options)
        self.num_train_timesteps = scheduler_config.get("num_train_timesteps", 1000)
        if not transformer.config.guidance_embeds:
            self.guidance_distilled = "its transformer does not take the guidance scale as an input (FLUX.1-schnell)"

    @property
    def time_embedding(self) -> nn.Module:
        return self.transformer.time_text_embed

    def noise_level(self, t: Tensor) -> NoiseLevel:
        """sigma = (t + 1) / T, alpha = 1 - sigma."""
        sigma = (t.to(self.device, self.arithmetic_dtype) + 1).view(-1, 1, 1, 1) / self.num_train_timesteps
        return NoiseLevel(1 - sigma, sigma)

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition, images: list[Tensor]) -> Tensor:
        level, count, size = self.noise_level(t), len(z_t), z_t.shape[-1]
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((count,), self.embedded_guidance, device=self.device, dtype=self.arithmetic_dtype)
        patches = self.transformer(
            pack(z_t).to(self.dtype),
            encoder_hidden_states=condition.hidden,
            pooled_projections=condition.pooled,
            timestep=level.sigma.flatten(),
            img_ids=patch_positions(size // PATCH, self.device),
            txt_ids=torch.zeros(condition.hidden.shape[1], 3, device=self.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return schedule.noise_from_output(unpack(patches.to(self.arithmetic_dtype), size), z_t, level, "flow")

    def _check_conditioning(self, conditioning: Conditioning) -> None:
        given = conditioning
        lacks_negatives = given.negatives is not None and given.pooled_negatives is None
        if given.pooled_cond is None or given.pooled_uncond is None or lacks_negatives:
            raise ValueError("conditioning: FLUX needs the pooled embeddings of every prompt, found None")

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
