"""A finished pocket model's U-Net taught to paint normal maps instead of colours; VAE and text encoders stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import text
from .normals import load_finished
from .renders import sheet
from .unet import SIZE_IDS, DiffusionStage, alphas_cumprod, sample

HELD_OUT = 128  # views at the end of the set, for `errors`
SAMPLE_PROMPTS = (
    "a vase",
    "a bunny, side view",
    "a teapot, side view",
    "a zebra vase, front view",
    "a chair",
    "a red brick mug",
    "a golden torus",
    "a wooden table, front view",
)


class NormalUnetStage(DiffusionStage):
    """Epsilon prediction on latents of normal maps, from the weights in `assets`/pocket; only the U-Net learns.

    Captions, their dropout, timesteps and loss are those of `DiffusionStage`.
    """

    def __init__(self, assets: Path, data: Path, batch: int = 32):
        unet = load_finished(assets)["unet"].train().requires_grad_(True)
        super().__init__({"unet": unet}, data, batch)
        self.name, self.assets = "normal-unet", assets

    def open(self):
        self.frozen = load_finished(self.assets)
        self.encoders = self.frozen["text_encoder"], self.frozen["text_encoder_2"]
        self.open_set(self.assets / "pocket" / "tokenizer")
        self.learnt -= min(HELD_OUT, self.learnt // 4)

    @torch.no_grad()
    def errors(self, unet: nn.Module, timesteps=(100, 200, 300, 400, 500, 700, 900)) -> dict[str, float]:
        """Mean squared error of the noise on held-out views: without a caption, with their own plain one, and with another view's."""
        x = torch.from_numpy(np.array(self.latents[self.learnt :, 0])).float()
        own = self.tokens[self.learnt :, -1]
        captions = {"empty": self.empty.expand_as(own), "own": own, "another's": own.roll(len(own) // 2, 0)}
        found = dict.fromkeys(captions, 0.0)
        for t in timesteps:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            noisy = alphas_cumprod()[t].sqrt() * x + (1 - alphas_cumprod()[t]).sqrt() * noise
            for name, ids in captions.items():
                words, pooled = text.embed(self.encoders, ids)
                added = {"text_embeds": pooled, "time_ids": torch.tensor(SIZE_IDS).repeat(len(ids), 1)}
                error = (unet(noisy, torch.full((len(x),), t), words, added_cond_kwargs=added).sample - noise).square().mean()
                found[name] += float(error) / len(timesteps)
        return found

    def preview(self, modules, folder):
        print(f"{self.name}: " + ", ".join(f"{name} {value:.4f}" for name, value in self.errors(modules["unet"]).items()), flush=True)
        ids = text.tokenize(self.tokenizer, list(SAMPLE_PROMPTS))
        rows = [sample(self.frozen | modules, self.frozen["vae"], ids, self.empty, guidance=scale) for scale in (4.0, 7.0)]
        sheet(np.concatenate(rows), 8).save(folder / f"{self.name}.png")
