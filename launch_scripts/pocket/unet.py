"""U-Net, text encoders and depth ControlNet of the pocket model, and their training on latents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import text
from .renders import sheet
from .training import Stage
from .vae import to_pixels

TIME_EMBED = 8  # width of each of the six size numbers of SDXL's added conditioning
SIZE_IDS = (128.0, 128.0, 0.0, 0.0, 128.0, 128.0)
SNR_CAP = 5.0
DROP_CAPTION = 0.12
SAMPLE_PROMPTS = (
    "a red brick vase, front view",
    "a green polka dot teapot, side view",
    "a black and white checkered sphere",
    "a wooden bunny, side view",
    "a zebra bunny, front view",
    "a golden knot",
    "a lava egg",
    "a blue and white striped torus",
    "a leopard teapot, front view",
    "a marble vase, side view",
    "a cube made of mossy stone",
    "a red and yellow checkered vase",
    "a giraffe mug",
    "a white brick teapot",
    "a rainbow bottle",
    "a purple bunny with white polka dots",
)


def build_unet(channels, latent_channels: int, cross_dim: int, pooled_dim: int, latent_size: int = 16):
    """UNet2DConditionModel of SDXL's kind: text_time conditioning, attention to the text at all but the finest level."""
    from diffusers import UNet2DConditionModel

    deeper = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * deeper),
        up_block_types=(*("CrossAttnUpBlock2D",) * deeper, "UpBlock2D"),
        attention_head_dim=tuple(max(1, width // 32) for width in channels),
        transformer_layers_per_block=1,
        cross_attention_dim=cross_dim,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED,
        projection_class_embeddings_input_dim=pooled_dim + len(SIZE_IDS) * TIME_EMBED,
    )


def build_control(unet):
    """ControlNetModel with the U-Net's encoder and a narrow eye for the depth image at eight times the latent's resolution."""
    from diffusers import ControlNetModel

    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32, 64), conditioning_channels=3)
    return control


def build_modules(folder: Path, channels, text_widths, control: bool) -> dict[str, nn.Module]:
    """Fresh modules: unet, text_encoder, text_encoder_2 and, if asked for, controlnet. `folder` holds the VAE and the tokenizer."""
    from transformers import CLIPTokenizer

    latent_channels = json.loads((folder / "vae" / "config.json").read_text())["latent_channels"]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoders = text.build_text_encoders(tokenizer, text_widths)
    modules = {"unet": build_unet(channels, latent_channels, sum(text_widths), text_widths[1])}
    modules |= {"text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    if control:
        modules["controlnet"] = build_control(modules["unet"])
    return modules


def start_control(modules: dict[str, nn.Module]) -> None:
    """Gives the ControlNet the U-Net's present weights; its zero convolutions make it silent at first.

    The path of the depth image is given a gain of about one instead of the usual zero at its end (and of a tenth of a thousandth
    before it, which is what torch's default leaves of a signal after eight layers): two zeros in a row take long to wake up.
    """
    fresh = build_control(modules["unet"])
    for key in ("conv_in", "time_proj", "time_embedding", "add_embedding", "down_blocks", "mid_block"):
        getattr(modules["controlnet"], key).load_state_dict(getattr(fresh, key).state_dict())
    for layer in modules["controlnet"].controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=1.5 / (9 * layer.in_channels) ** 0.5)


def alphas_cumprod(count: int = 1000) -> Tensor:
    """Scaled-linear schedule of Stable Diffusion, (count,) float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, count, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def sample_times(batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) timesteps, stratified; half of the draws lie in [20, 500), where distillation looks, the rest anywhere."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return torch.where(u < 0.5, 20 + 960 * u, 1000 * (2 * u - 1)).long().clamp(0, 999)


def min_snr_loss(predicted: Tensor, noise: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Min-SNR-weighted error of epsilon (Hang et al. 2023), a scalar, and the plain one of each sample, (N,); alpha_bar (N,)."""
    error = (predicted.float() - noise).square().mean((1, 2, 3))
    snr = alpha_bar / (1 - alpha_bar)
    return (error * snr.clamp(max=SNR_CAP) / snr).mean(), error


class DiffusionStage(Stage):
    """Epsilon prediction with min-SNR weights. With a ControlNet among the modules, three samples in four see their depth image.

    A dropped caption is the empty text encoded, or zeros: the two forms the pipelines use for the unconditional.
    """

    def __init__(self, modules: dict[str, nn.Module], data: Path, batch: int = 32):
        self.modules, self.data, self.batch = modules, data, batch
        self.name = "controlnet" if "controlnet" in modules else "unet"
        self.alphas = alphas_cumprod()

    def open(self):
        for key in ("text_encoder", "text_encoder_2"):
            self.modules[key] = text.revive(self.modules[key]).requires_grad_(True)
        self.encoders = self.modules["text_encoder"], self.modules["text_encoder_2"]
        self.open_set(self.data / "tokenizer")
        self.control = np.load(self.data / "control.npy", mmap_mode="r")
        self.looks_per_view = len(self.latents) // len(self.control)

    def open_set(self, tokenizer: Path) -> None:
        from transformers import CLIPTokenizer

        self.latents = np.load(self.data / "latents.npy", mmap_mode="r")
        self.learnt = len(self.latents)
        self.tokens = torch.from_numpy(np.load(self.data / "tokens.npy").astype(np.int64))
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
        self.empty = text.tokenize(self.tokenizer, [""])

    def loss(self, generator):
        m, n = self.modules, self.batch
        rows = torch.randint(self.learnt, (n,), generator=generator).tolist()
        mirrored = torch.randint(self.latents.shape[1], (n,), generator=generator).tolist()
        x = torch.from_numpy(np.stack([self.latents[r, k] for r, k in zip(rows, mirrored)])).float()
        ids = self.tokens[rows, torch.randint(self.tokens.shape[1], (n,), generator=generator)]
        drop = torch.rand(n, generator=generator)
        ids = torch.where((drop < DROP_CAPTION)[:, None], self.empty, ids)
        t = sample_times(n, generator)[torch.randperm(n, generator=generator)]
        noise = torch.randn(x.shape, generator=generator)
        a = self.alphas[t][:, None, None, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            words, pooled = text.embed(self.encoders, ids)
            keep = (drop >= DROP_CAPTION / 3).to(words.dtype)[:, None]
            added = {"text_embeds": pooled * keep, "time_ids": torch.tensor(SIZE_IDS).repeat(n, 1)}
            words, residuals = words * keep[:, None], {}
            if "controlnet" in m:
                seen = (3 * n + 3) // 4
                depth = [self.control[r // self.looks_per_view][:, :: -1 if k else 1] for r, k in zip(rows[:seen], mirrored)]
                images = (torch.from_numpy(np.stack(depth)).float() / 255)[:, None].expand(-1, 3, -1, -1)
                part = {key: value[:seen] for key, value in added.items()}
                down, mid = m["controlnet"](noisy[:seen], t[:seen], words[:seen], images, added_cond_kwargs=part, return_dict=False)
                pad = (0, 0, 0, 0, 0, 0, 0, n - seen)
                residuals["down_block_additional_residuals"] = [F.pad(residual, pad) for residual in down]
                residuals["mid_block_additional_residual"] = F.pad(mid, pad)
            predicted = m["unet"](noisy, t, words, added_cond_kwargs=added, **residuals).sample
        loss, error = min_snr_loss(predicted, noise, self.alphas[t])
        middle = (t >= 100) & (t < 500)
        return loss, {"eps_mse": float(error.detach().mean()), "eps_100_500": float(error.detach()[middle].mean())}

    def preview(self, modules, folder):
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(folder / "vae")
        modules = {key: text.revive(module) if "text" in key else module for key, module in modules.items()}
        control = None
        if "controlnet" in modules:
            views = np.linspace(0, len(self.control) - 1, len(SAMPLE_PROMPTS)).astype(int)
            control = torch.from_numpy(np.array(self.control[views])).float().div(255)[:, None].expand(-1, 3, -1, -1)
        ids = text.tokenize(self.tokenizer, list(SAMPLE_PROMPTS))
        images = sample(modules, vae, ids, self.empty, control=control)
        if control is not None:
            images = np.concatenate([images, (control.permute(0, 2, 3, 1) * 255).byte().numpy()])
        sheet(images, 8).save(folder / f"{self.name}.png")


@torch.no_grad()
def sample(modules, vae, ids: Tensor, empty: Tensor, guidance: float = 5.0, steps: int = 25, seed: int = 0, control: Tensor | None = None):
    """Deterministic DDIM with guidance; uint8 pictures (N, H, W, 3) for token numbers (N, L). `control` (N, 3, H, W) in [0, 1]."""
    unet, alphas, n = modules["unet"], alphas_cumprod(), len(ids)
    words, pooled = text.embed((modules["text_encoder"], modules["text_encoder_2"]), torch.cat([ids, empty.expand(n, -1)]))
    added = {"text_embeds": pooled, "time_ids": torch.tensor(SIZE_IDS).repeat(2 * n, 1)}
    side = unet.config.sample_size
    z = torch.randn(n, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(999, 0, steps + 1).long()
    for t, following in zip(times[:-1], times[1:]):
        twice, residuals = torch.cat([z, z]), {}
        if control is not None:
            down, mid = modules["controlnet"](twice, t, words, torch.cat([control, control]), added_cond_kwargs=added, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        cond, uncond = unet(twice, t, words, added_cond_kwargs=added, **residuals).sample.chunk(2)
        noise = uncond + guidance * (cond - uncond)
        a, b = alphas[t], alphas[following]
        clean = (z - (1 - a).sqrt() * noise) / a.sqrt()
        z = b.sqrt() * clean + (1 - b).sqrt() * noise
    return to_pixels(torch.cat([vae.decode(part).sample for part in clean.split(16)]))
