"""Stable Diffusion 1 and 2 as a frozen latent prior, predicting noise or velocity."""

from __future__ import annotations

from .prior import PriorError
from .unet_prior import UNetPrior


class StableDiffusionPrior(UNetPrior):
    """The `LatentPrior` of Stable Diffusion 1.x and 2.x and their fine-tunes, of any size; one text encoder, no pooled embedding."""

    FAMILY, WHAT = "sd", "StableDiffusionPipeline"

    def _check_unet(self, config) -> None:
        for name in ("addition_embed_type", "class_embed_type"):
            if config.get(name) is not None:
                raise PriorError(f"the U-Net's {name} is {config[name]!r}, wanted none: this is no Stable Diffusion 1 or 2 model")
