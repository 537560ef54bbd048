"""The normal ControlNet of a pocket model that is finished: only the ControlNet learns, starting from the one for depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import text
from .renders import LOOKS_PER_VIEW, sheet
from .training import Stage
from .unet import SAMPLE_PROMPTS, SIZE_IDS, alphas_cumprod, min_snr_loss, sample, sample_times

HELD_OUT = 64  # views at the end of the set, for `errors`


def load_finished(assets: Path) -> dict[str, nn.Module]:
    """U-Net, text encoders, VAE and depth ControlNet as they are shipped, frozen."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = assets / "pocket"
    modules = {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2"),
        "depth": ControlNetModel.from_pretrained(assets / "pocket-controlnet-depth"),
    }
    return {name: module.float().eval().requires_grad_(False) for name, module in modules.items()}


def mirror(normals: np.ndarray) -> np.ndarray:
    """A normal image (H, W, 3) uint8 of the mirrored view: what faced right faces left."""
    flipped = normals[:, ::-1].copy()
    flipped[..., 0] = 255 - flipped[..., 0]
    return flipped


class NormalStage(Stage):
    """Epsilon prediction of the frozen model with the ControlNet's help; captions are never dropped, timesteps as for the U-Net."""

    name = "normal"

    def __init__(self, assets: Path, data: Path, batch: int = 32):
        self.assets, self.data, self.batch = assets, data, batch
        self.alphas = alphas_cumprod()
        self.modules = {"controlnet": load_finished(assets)["depth"].train().requires_grad_(True)}

    def open(self):
        self.frozen = load_finished(self.assets)
        self.latents = np.load(self.data / "latents.npy", mmap_mode="r")
        self.normals = np.load(self.data / "normals.npy", mmap_mode="r")
        self.tokens = torch.from_numpy(np.load(self.data / "tokens.npy").astype(np.int64))
        self.learnt = len(self.latents) - min(HELD_OUT, len(self.normals) // 4) * LOOKS_PER_VIEW

    def batch_of(self, rows: list[int], mirrored: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (N, C, h, w), normal images (N, 3, H, W) in [0, 1] and token numbers (N, L) of some pictures."""
        latents = np.stack([self.latents[r, k] for r, k in zip(rows, mirrored)])
        views = [self.normals[r // LOOKS_PER_VIEW] for r in rows]
        images = np.stack([mirror(view) if k else view for view, k in zip(views, mirrored)])
        return torch.from_numpy(latents).float(), torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, self.tokens[rows, 0]

    def predict(self, controlnet, noisy: Tensor, t: Tensor, ids: Tensor, images: Tensor | None) -> Tensor:
        with torch.no_grad():
            words, pooled = text.embed((self.frozen["text_encoder"], self.frozen["text_encoder_2"]), ids)
        added, residuals = {"text_embeds": pooled, "time_ids": torch.tensor(SIZE_IDS).repeat(len(ids), 1)}, {}
        if images is not None:
            down, mid = controlnet(noisy, t, words, images, added_cond_kwargs=added, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.frozen["unet"](noisy, t, words, added_cond_kwargs=added, **residuals).sample

    def loss(self, generator):
        n = self.batch
        rows = torch.randint(self.learnt, (n,), generator=generator).tolist()
        x, images, ids = self.batch_of(rows, torch.randint(2, (n,), generator=generator).tolist())
        t = sample_times(n, generator)[torch.randperm(n, generator=generator)]
        noise = torch.randn(x.shape, generator=generator)
        a = self.alphas[t][:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.predict(self.modules["controlnet"], a.sqrt() * x + (1 - a).sqrt() * noise, t, ids, images)
        loss, error = min_snr_loss(predicted, noise, self.alphas[t])
        return loss, {"eps_mse": float(error.detach().mean())}

    @torch.no_grad()
    def errors(self, controlnet, timesteps=(100, 200, 300, 400, 500)) -> dict[str, float]:
        """Mean squared error of the noise on held-out views: without control, with the right normals, and with mirrored ones."""
        rows = list(range(self.learnt, len(self.latents), LOOKS_PER_VIEW))
        x, images, ids = self.batch_of(rows, [0] * len(rows))
        wrong = torch.cat([1 - images[:, :1], images[:, 1:]], dim=1)
        found = dict.fromkeys(("none", "right", "red mirrored"), 0.0)
        for t in timesteps:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            noisy, times = self.alphas[t].sqrt() * x + (1 - self.alphas[t]).sqrt() * noise, torch.full((len(x),), t)
            for name, seen in zip(found, (None, images, wrong)):
                error = (self.predict(controlnet, noisy, times, ids, seen) - noise).square().mean()
                found[name] += float(error) / len(timesteps)
        return found

    def preview(self, modules, folder):
        controlnet = modules["controlnet"]
        print("normal: " + ", ".join(f"{name} {value:.4f}" for name, value in self.errors(controlnet).items()), flush=True)
        views = np.linspace(0, len(self.normals) - 1, len(SAMPLE_PROMPTS)).astype(int)
        control = torch.from_numpy(np.array(self.normals[views])).permute(0, 3, 1, 2).float() / 255
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self.assets / "pocket" / "tokenizer")
        ids, empty = text.tokenize(tokenizer, list(SAMPLE_PROMPTS)), text.tokenize(tokenizer, [""])
        images = sample(self.frozen | {"controlnet": controlnet}, self.frozen["vae"], ids, empty, control=control)
        sheet(np.concatenate([images, np.array(self.normals[views])]), 8).save(folder / "normal.png")
