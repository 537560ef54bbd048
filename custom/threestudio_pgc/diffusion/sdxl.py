"""SDXL as a frozen latent prior: VAE, U-Net and, if asked for, ControlNets. The text encoders live in `prompts` and are not loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from .prior import Conditioning, PriorError
from .unet_prior import UNetPrior
from .vae_prior import Condition


class SDXLPrior(UNetPrior):
    """The `LatentPrior` of Stable Diffusion XL (base 1.0 and any fine-tune), of any size and number of latent channels."""

    FAMILY, WHAT = "sdxl", "StableDiffusionXLPipeline"

    def time_ids(self, batch: int) -> Tensor:
        """(batch, 6) float: original height and width, crop top and left (0, 0), target height and width, in pixels."""
        size = float(self.image_size)
        return torch.tensor([[size, size, 0.0, 0.0, size, size]], device=self.device).expand(batch, 6)

    def _added(self, condition: Condition) -> dict[str, Tensor]:
        time_ids = self.time_ids(len(condition.hidden)) if condition.time_ids is None else condition.time_ids
        # left in float32: sizes in pixels are not exact in half precision
        return {"text_embeds": condition.pooled, "time_ids": time_ids.to(self.device, self.arithmetic_dtype)}

    def _check_conditioning(self, conditioning: Conditioning) -> None:
        if conditioning.pooled_cond is None or conditioning.pooled_uncond is None:
            raise ValueError("conditioning: SDXL needs the pooled embeddings of both halves, found None")

    def _check_unet(self, config) -> None:
        if config.addition_embed_type != "text_time":
            raise PriorError(
                f"the U-Net's addition_embed_type is {config.addition_embed_type!r}, wanted 'text_time': this is no SDXL model"
            )
