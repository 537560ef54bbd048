"""Tiny pipelines with random weights: diffusers' and transformers' own classes, saved to disk in diffusers layout."""

import json
from pathlib import Path

import torch

WORDS = ("a", "of", "with", "red", "green", "wooden", "zebra", "vase", "cup", "side", "front", "back", "overhead", "view")
MAX_LENGTH = 12
T5_LENGTH = 20


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
    text = text_config(tokenizer)
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**vae_config(latent_channels, sample_size), scaling_factor=scaling_factor, force_upcast=force_upcast),
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


def text_config(tokenizer) -> dict:
    """What the CLIP text encoders have in common."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def vae_config(latent_channels=4, sample_size=8) -> dict:
    """f = 4."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (4, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": latent_channels,
        "sample_size": sample_size * 4,
    }


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
    return save_controlnet(folder, unet_config(latent_channels), seed)


def save_controlnet(folder, config, seed) -> Path:
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    for name in ("sample_size", "out_channels", "up_block_types"):
        del config[name]
    net = ControlNetModel(**config, conditioning_embedding_out_channels=(4, 8, 8))
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    net.save_pretrained(folder)
    return Path(folder)


def build_tiny_sd(
    folder,
    *,
    prediction_type="epsilon",
    latent_channels=4,
    sample_size=8,
    scaling_factor=0.18215,
    seed=0,
    **save_options,
) -> Path:
    """Save a StableDiffusionPipeline (32 px images and 8x8 latents by default) and return its folder."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**vae_config(latent_channels, sample_size), scaling_factor=scaling_factor),
        unet=UNet2DConditionModel(**sd_unet_config(latent_channels, sample_size)),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            skip_prk_steps=True,
            steps_offset=1,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=8, projection_dim=8, **text_config(tokenizer))),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, **save_options)
    return Path(folder)


def sd_unet_config(latent_channels=4, sample_size=8) -> dict:
    return {
        "sample_size": sample_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    }


def build_tiny_sd_controlnet(folder, *, latent_channels=4, seed=1) -> Path:
    """A ControlNet for `build_tiny_sd`'s U-Net, its output layers random."""
    return save_controlnet(folder, sd_unet_config(latent_channels), seed)


def build_tiny_sd3(folder, *, t5=True, latent_channels=16, sample_size=8, seed=0, **save_options) -> Path:
    """Save a StableDiffusion3Pipeline (32 px images and 8x8 latents by default), without its third text encoder where t5 is False."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer, t5_tokenizer = build_tokenizer(), build_t5_tokenizer()
    text = text_config(tokenizer)
    t5_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**transformer_config(latent_channels, sample_size)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            **vae_config(latent_channels, sample_size),
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, projection_dim=8, **text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, projection_dim=12, **text)),
        text_encoder_3=t5_encoder if t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer if t5 else None,
    )
    pipeline.save_pretrained(folder, **save_options)
    return Path(folder)


def transformer_config(latent_channels=16, sample_size=8) -> dict:
    """Of Stable Diffusion 3.5's kind: normalised queries and keys, and a block with a second attention."""
    return {
        "sample_size": sample_size,
        "patch_size": 2,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }


def build_tiny_flux(folder, *, guidance_embeds=True, latent_channels=16, sample_size=8, seed=0, **save_options) -> Path:
    """Save a FluxPipeline; its configuration names no size, so a prior is told image_size=32 where it is loaded."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer, t5_tokenizer = build_tokenizer(), build_t5_tokenizer()
    t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(**flux_config(latent_channels, guidance_embeds)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            **vae_config(latent_channels, sample_size),
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=20, projection_dim=20, **text_config(tokenizer))),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer,
    )
    pipeline.save_pretrained(folder, **save_options)
    return Path(folder)


def flux_config(latent_channels=16, guidance_embeds=True) -> dict:
    return {
        "patch_size": 1,
        "in_channels": latent_channels * 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 20,
        "guidance_embeds": guidance_embeds,
        "axes_dims_rope": (4, 6, 6),
    }


def build_t5_tokenizer():
    """A T5 tokenizer that knows every letter and, as one token each, WORDS."""
    from transformers import T5TokenizerFast

    words = [("\u2581" + word, -1.0) for word in WORDS]
    letters = [(chr(c), -5.0) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *words, *letters]
    return T5TokenizerFast(vocab=list(dict(vocab).items()), extra_ids=0, model_max_length=T5_LENGTH)


# Family -> embedding's length and width, width of the pooled embedding.
CONDITIONING_SIZES = {
    "sd": (MAX_LENGTH, 8, None),
    "sdxl": (MAX_LENGTH, 24, 12),
    "sd3": (MAX_LENGTH + T5_LENGTH, 32, 20),
    "flux": (T5_LENGTH, 32, 20),
}


def random_conditioning(batch, seed=2, family="sdxl"):
    """Conditioning of the tiny pipelines' sizes."""
    from threestudio_pgc.diffusion.prior import Conditioning

    generator = torch.Generator().manual_seed(seed)
    length, width, pooled = CONDITIONING_SIZES[family]
    shapes = [(batch, length, width)] * 2 + [(batch, pooled)] * (0 if pooled is None else 2)
    return Conditioning(*(torch.randn(shape, generator=generator) for shape in shapes))
