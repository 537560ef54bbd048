"""Writes the folders the package ships, a StableDiffusionXL pipeline and networks that go with it, all fp16 safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from .captions import vocabulary

PIPELINE, CONTROL, NORMAL_CONTROL, NORMAL_UNET = "pocket", "pocket-controlnet-depth", "pocket-controlnet-normal", "pocket-normals"


def export(modules: dict[str, nn.Module], folder: Path, assets: Path) -> None:
    """Writes `assets`/pocket and `assets`/pocket-controlnet-depth from the averaged modules and from the VAE and tokenizer in `folder`.

    Files that are not weights or configs of the model, such as the model card, are left alone.
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=modules["text_encoder"],
        text_encoder_2=modules["text_encoder_2"],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=modules["unet"],
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.to(dtype=torch.float16)
    target = assets / PIPELINE
    for name in ("vae", "unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        shutil.rmtree(target / name, ignore_errors=True)
    pipeline.save_pretrained(target, safe_serialization=True)
    (target / "vocabulary.txt").write_text("\n".join(vocabulary()) + "\n")
    if "controlnet" in modules:
        export_network(modules["controlnet"], assets / CONTROL)
    for part in ("tokenizer", "tokenizer_2"):  # the plain files too: older versions of transformers read only these
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(folder / "tokenizer" / name, target / part / name)
    for config in target.rglob("*config.json"):
        clean_config(config)
    size = sum(path.stat().st_size for part in (PIPELINE, CONTROL) for path in (assets / part).rglob("*") if path.is_file())
    print(f"export: {size / 2**20:.1f} MiB in {target} and {assets / CONTROL}", flush=True)


def export_network(network: nn.Module, folder: Path) -> None:
    """Writes a ControlNet or U-Net for the pipeline that lies beside `folder`, over what it holds; a README there is left alone."""
    network.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    clean_config(folder / "config.json")


def clean_config(config: Path) -> None:
    """Takes out of a saved config the folder its weights came from, and half precision as the precision to run in.

    Without the latter transformers loads text encoders as fp16 beside a U-Net that diffusers loads as fp32, and a pipeline on a
    CPU fails.
    """
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    if content.get("dtype") == "float16":
        content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
