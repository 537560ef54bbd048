"""Tiny SDXL pipelines with random weights: diffusers' and transformers' own classes, saved to disk in diffusers layout."""

import json
from pathlib import Path

import torch

WORDS = ("a", "of", "with", "red", "green", "wooden", "zebra", "vase", "cup", "side", "front", "back", "overhead", "view")
MAX_LENGTH = 12


def build_tokenizer():
    """A CLIP tokenizer that knows every letter and, as one token each, WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(WORDS, trainers.BpeTrainer(end_of_word_suffix="</w>", vocab_size=1000, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *model["vocab"], "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]], model_max_length=MAX_LENGTH)


def build_tiny_sdxl(
    folder,
    *,
    latent_channels=4,
    sample_size=8,
    prediction_type="epsilon",
    force_upcast=False,
    scaling_factor=0.13025,
    seed=0,
    **save_options,
) -> Path:
    """Save a StableDiffusionXLPipeline (VAE f=4, so 32 px images and 8x8 latents by default) and return its folder."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=latent_channels,
            sample_size=sample_size * 4,
            scaling_factor=scaling_factor,
            force_upcast=force_upcast,
        ),
        unet=UNet2DConditionModel(**unet_config(latent_channels, sample_size)),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=8, projection_dim=8, **text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, projection_dim=12, **text)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=False,
    )
    pipeline.save_pretrained(folder, **save_options)
    return Path(folder)


def unet_config(latent_channels=4, sample_size=8) -> dict:
    return {
        "sample_size": sample_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12 + 6 * 4,
    }


def build_tiny_controlnet(folder, *, latent_channels=4, seed=1) -> Path:
    """A ControlNet for `build_tiny_sdxl`'s U-Net whose output layers are random (fresh ones are zero and would do nothing)."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    config = unet_config(latent_channels)
    for name in ("sample_size", "out_channels", "up_block_types"):
        del config[name]
    net = ControlNetModel(**config, conditioning_embedding_out_channels=(4, 8, 8))
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    net.save_pretrained(folder)
    return Path(folder)


def random_conditioning(batch, seed=2):
    """Conditioning of the tiny pipeline's sizes."""
    from threestudio_pgc.diffusion.prior import Conditioning

    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, MAX_LENGTH, 24)] * 2 + [(batch, 12)] * 2
    return Conditioning(*(torch.randn(shape, generator=generator) for shape in shapes))
