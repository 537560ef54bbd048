"""Tiny Zero123 models with random weights, in both published folder layouts; and the same weights under the original code's names."""

import json
import re
from pathlib import Path

import torch

EMBEDDING = 24  # numbers of the image encoder's embedding, and of the U-Net's token
VAE_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (4, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
    "sample_size": 32,
    "scaling_factor": 0.18215,
}
UNET_CONFIG = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": EMBEDDING,
    "norm_num_groups": 4,
}
# heads of 64 numbers, as in every CLIP
CLIP_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": EMBEDDING,
}


def tiny_networks(seed=0):
    """(unet, vae, image encoder, camera layer)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    unet, vae = UNet2DConditionModel(**UNET_CONFIG), AutoencoderKL(**VAE_CONFIG)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_CONFIG))
    for parameter in encoder.parameters():  # transformers' own are so small that every picture looks alike
        torch.nn.init.normal_(parameter, std=0.1)
    return unet, vae, encoder, torch.nn.Linear(EMBEDDING + 4, EMBEDDING)


def build_tiny_zero123(folder, layout="clip_camera_projection", *, seed=0) -> Path:
    """Save a Zero123 (32 px images, 8x8 latents) in one of the layouts "clip_camera_projection", "cc_projection"; return its folder."""
    from diffusers import DDIMScheduler
    from safetensors.torch import save_file

    folder = Path(folder)
    unet, vae, encoder, linear = tiny_networks(seed)
    for name, network in (("unet", unet), ("vae", vae), ("image_encoder", encoder)):
        network.save_pretrained(folder / name)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.save_pretrained(folder / "scheduler")

    prefix, pipeline, entry, config = {
        "clip_camera_projection": (
            "proj",
            "Zero123Pipeline",
            ["zero123", "CLIPCameraProjection"],
            {"_class_name": "CLIPCameraProjection", "additional_embeddings": 4, "embedding_dim": EMBEDDING},
        ),
        "cc_projection": (
            "projection",
            "Zero1to3StableDiffusionPipeline",
            ["pipeline_zero1to3", "CCProjection"],
            {"_class_name": "CCProjection"},
        ),
    }[layout]
    (folder / layout).mkdir()
    save_file({f"{prefix}.{name}": value for name, value in linear.state_dict().items()}, camera_weights(folder, layout))
    (folder / layout / "config.json").write_text(json.dumps(config))
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.18.2",
        layout: entry,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def camera_weights(folder, layout="clip_camera_projection") -> Path:
    return Path(folder) / layout / "diffusion_pytorch_model.safetensors"


# ------------------------------------------------------------------------------------------- the original code's names

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_state_dict(unet, vae, encoder, linear) -> dict[str, torch.Tensor]:
    """The state dict of a Zero123 checkpoint, by inverting each name on its own."""
    state = {f"model.diffusion_model.{_unet_name(name, unet.config)}": value for name, value in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        projection = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight", name)
        state[f"first_stage_model.{_vae_name(name, vae.config)}"] = value[:, :, None, None] if projection else value
    state |= {f"cc_projection.{name}": value for name, value in linear.state_dict().items()}
    return state | {f"cond_stage_model.model.visual.{name}": value for name, value in _visual(encoder).items()}


def _unet_name(name, config):
    per_block, in_resnet = config.layers_per_block + 1, ".resnets." in name
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
    ):
        if name.startswith(ours + "."):
            name = theirs + name.removeprefix(ours)
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, block, kind, layer, rest = found.groups()
        index = int(block) * per_block + int(layer) + (side == "down")
        name = f"{'in' if side == 'down' else 'out'}put_blocks.{index}.{int(kind == 'attentions')}.{rest}"
    elif found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        name = f"input_blocks.{(int(found[1]) + 1) * per_block}.0.op.{found[2]}"
    elif found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        attends = "CrossAttn" in config.up_block_types[int(found[1])]
        name = f"output_blocks.{(int(found[1]) + 1) * per_block - 1}.{2 if attends else 1}.conv.{found[2]}"
    return _replace_part(name, _RESNET) if in_resnet else name


def _vae_name(name, config):
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    last = len(config.block_out_channels) - 1
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    name = name.replace("conv_shortcut", "nin_shortcut")
    return _replace_part(name, _VAE_ATTENTION) if ".attn_1." in name else name


def _replace_part(name, table):
    for ours, theirs in table.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _visual(encoder):
    ours = {name.removeprefix("vision_model."): value for name, value in encoder.state_dict().items()}
    state = {
        "proj": ours["visual_projection.weight"].T,
        "class_embedding": ours["embeddings.class_embedding"],
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "conv1.weight": ours["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"ln_pre.{kind}"], state[f"ln_post.{kind}"] = ours[f"pre_layrnorm.{kind}"], ours[f"post_layernorm.{kind}"]
        for layer in range(encoder.config.num_hidden_layers):
            source, target = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            state[f"{target}.attn.in_proj_{kind}"] = torch.cat([ours[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            for name, theirs in {
                "self_attn.out_proj": "attn.out_proj",
                "layer_norm1": "ln_1",
                "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }.items():
                state[f"{target}.{theirs}.{kind}"] = ours[f"{source}.{name}.{kind}"]
    return state
