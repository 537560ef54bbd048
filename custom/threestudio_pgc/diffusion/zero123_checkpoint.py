"""A Zero123 checkpoint of the original code (one .ckpt file) to the folder that `Zero123Prior` loads."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from .model_files import PIPELINE_INDEX, UNET, VAE
from .prior import PriorError
from .zero123 import IMAGE_ENCODER, POSE_NUMBERS, PROJECTIONS, READY

KEY = "checkpoint"
# What the published checkpoints hold: Stable Diffusion 1 with four more input channels, and its VAE.
UNET_CONFIG = {
    "sample_size": 32,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE_CONFIG = {
    "sample_size": 256,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SCHEDULER_CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
VISUAL = "cond_stage_model.model.visual."
HEAD_SIZE = 64  # of every image encoder of CLIP; the checkpoint does not say
# OpenAI's name -> transformers'
_VISUAL_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
}
_LAYER_NAMES = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}


def convert_zero123_checkpoint(
    path: str | Path, out_folder: str | Path, *, unet_config: Mapping = UNET_CONFIG, vae_config: Mapping = VAE_CONFIG
) -> Path:
    """Write the networks of a .ckpt file as a diffusers folder of safetensors, in the precision of the file, and return the folder.

    The weights of the network itself are taken, not their running average (model_ema), as the published folders do.

    Only tensors and plain containers are read: a file that holds anything else could run code, and is refused. Raises PriorError where it
    is, where the file is missing or no Zero123 checkpoint, and where the folder is not empty.
    """
    path, folder = Path(path).expanduser(), Path(out_folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PriorError(f"out_folder: {folder} is there already, wanted a new or an empty folder")
    state = _read(path)

    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    from safetensors.torch import save_file

    for prefix in ("model.diffusion_model.", "first_stage_model.", "cc_projection.", VISUAL):
        if not any(name.startswith(prefix) for name in state):
            raise PriorError(f"{KEY}: {path} is no Zero123 checkpoint: it has no tensors {prefix}*")
    for name in ("cc_projection.weight", "cc_projection.bias"):
        if name not in state:
            raise PriorError(f"{KEY}: {path} has no tensor {name}")
    # All are made before any is written: a file that does not fit leaves no half folder behind.
    unet = _fill(UNet2DConditionModel, unet_config, convert_ldm_unet_checkpoint, state, path)
    vae = _fill(AutoencoderKL, vae_config, convert_ldm_vae_checkpoint, state, path)
    encoder = _image_encoder(state, path)
    projection, name = next(iter(PROJECTIONS.items()))
    linear = {f"{name}.{kind}": state[f"cc_projection.{kind}"].contiguous() for kind in ("weight", "bias")}

    unet.save_pretrained(folder / UNET.subfolder)
    vae.save_pretrained(folder / VAE.subfolder)
    encoder.save_pretrained(folder / IMAGE_ENCODER.subfolder)
    DDIMScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    (folder / projection.subfolder).mkdir()
    save_file(linear, folder / projection.subfolder / f"{projection.stem}.safetensors")
    sizes = {"embedding_dim": linear[f"{name}.weight"].shape[1] - POSE_NUMBERS, "additional_embeddings": POSE_NUMBERS}
    _write_json(folder / projection.subfolder / projection.config, {"_class_name": "CLIPCameraProjection", **sizes})
    _write_json(
        folder / PIPELINE_INDEX,
        {
            "_class_name": "Zero123Pipeline",
            projection.subfolder: ["zero123", "CLIPCameraProjection"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return folder


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise PriorError(f"{KEY}: no file {path}, wanted a .ckpt file")
    try:
        # mapped where the format allows it: a published file is larger than many machines' memory
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        # Torch goes on to advise weights_only=False, which is what must not be done.
        reason = next((line for line in str(error).splitlines() if "WeightsUnpickler" in line or "GLOBAL" in line), str(error))
        raise PriorError(
            f"{KEY}: {path} holds more than tensors and plain containers ({reason.strip()}), such as objects of the trainer that wrote "
            f"it. Reading those can run code, so the file is refused. Ready folders: {', '.join(READY)}. Wanted a file of tensors: where "
            "you trust the file, open it apart from here and save its 'state_dict' alone"
        ) from error
    except (OSError, EOFError, RuntimeError) as error:
        raise PriorError(f"{KEY}: {path} cannot be read: {error}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise PriorError(f"{KEY}: {path} holds a {type(loaded).__name__}, wanted a dict of tensors")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _fill(model_class: type, config: Mapping, convert, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    with torch.device("meta"):
        module = model_class.from_config(dict(config))
    try:
        module.load_state_dict(convert(dict(state), config=dict(config)), assign=True)
    except (KeyError, RuntimeError) as error:
        raise PriorError(f"{KEY}: the tensors in {path} are not those of Zero123's {model_class.__name__}: {_short(error)}") from error
    return module


def _image_encoder(state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """CLIP's image tower, its sizes read from its tensors."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    visual = {name.removeprefix(VISUAL): value for name, value in state.items() if name.startswith(VISUAL)}
    try:
        width, _, patch, _ = visual["conv1.weight"].shape
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(visual["transformer.resblocks.0.mlp.c_fc.bias"]),
            projection_dim=visual["proj"].shape[1],
            num_hidden_layers=len({name.split(".")[2] for name in visual if name.startswith("transformer.resblocks.")}),
            num_attention_heads=width // HEAD_SIZE,
            image_size=patch * isqrt(len(visual["positional_embedding"]) - 1),
            patch_size=patch,
        )
        with torch.device("meta"):
            encoder = CLIPVisionModelWithProjection(config)
        positions = torch.arange(len(visual["positional_embedding"]))[None]
        encoder.vision_model.embeddings.position_ids = positions  # a buffer that no state dict fills
        encoder.load_state_dict(convert_clip_visual(visual), assign=True)
    except (KeyError, RuntimeError) as error:
        raise PriorError(f"{KEY}: the tensors {VISUAL}* in {path} are not those of a CLIP image encoder: {_short(error)}") from error
    return encoder


def convert_clip_visual(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's tensors of a CLIP vision transformer under the names of transformers' CLIPVisionModelWithProjection."""
    converted = {}
    for name, value in visual.items():
        if name == "proj":  # OpenAI multiplies from the left
            converted["visual_projection.weight"] = value.T.contiguous()
            continue
        start = next(start for start in (*_VISUAL_NAMES, "") if name.startswith(start))
        renamed = "vision_model." + _VISUAL_NAMES.get(start, "") + name.removeprefix(start)
        for old, new in _LAYER_NAMES.items():
            renamed = renamed.replace(f".{old}", f".{new}")
        if ".attn.in_proj_" in renamed:  # queries, keys and values in one matrix
            for part, piece in zip("qkv", value.chunk(3)):
                converted[renamed.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = piece.contiguous()
        else:
            converted[renamed] = value.contiguous()
    return converted


def _short(error: Exception) -> str:
    """Torch names every tensor that does not fit."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
