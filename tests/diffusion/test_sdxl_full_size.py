"""SDXL base 1.0 at its real size, on the meta device: the architecture and its shapes, without 15 GB of weights."""

import pytest
import torch

from threestudio_pgc.diffusion.prior import Conditioning, PriorError
from threestudio_pgc.diffusion.sdxl import SDXLPrior

UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
CONTROLNET = {name: value for name, value in UNET.items() if name not in ("sample_size", "out_channels", "up_block_types")} | {
    "conditioning_embedding_out_channels": (16, 32, 96, 256)
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


@pytest.fixture(scope="module")
def prior():
    return SDXLPrior.from_config(
        {"unet": UNET, "vae": VAE, "controlnet": CONTROLNET, "scheduler": SCHEDULER}, device="meta", dtype=torch.float16
    )


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_it_is_sdxl_with_its_depth_controlnet(prior):
    assert count(prior.unet) == 2_567_463_684
    assert count(prior.vae) == 83_653_863
    assert count(prior.controlnets[0]) == 1_251_014_160
    assert (prior.image_size, prior.latent_size, prior.latent_channels, prior.vae_scale) == (1024, 128, 4, 8)
    assert "U-Net 2567.5 M (float16, 4897 MiB)" in prior.memory_note()


def test_shapes_at_1024_pixels(prior):
    for size in (512, 1024):
        assert prior.encode(torch.empty(1, size, size, 3, device="meta")).shape == (1, 4, 128, 128)
    z_t = torch.empty(1, 4, 128, 128, device="meta")
    conditioning = Conditioning(*(torch.empty(shape, device="meta") for shape in [(1, 77, 2048)] * 2 + [(1, 1280)] * 2))
    t = torch.empty(1, dtype=torch.int64, device="meta")
    prediction = prior.predict_noise(z_t, t, conditioning, torch.empty(1, 512, 512, 3, device="meta"))
    for half in (prediction.cond, prediction.uncond):
        assert half.shape == (1, 4, 128, 128) and half.dtype == torch.float32
    assert prior.decode(z_t).shape == (1, 1024, 1024, 3)


def test_the_schedule_is_sdxls(prior):
    alphas = SDXLPrior.alphas_cumprod.fget(prior)
    assert alphas.shape == (1000,) and alphas.device.type == "meta"
    assert prior._alphas_cumprod[0].item() == pytest.approx(1 - 0.00085)
    assert prior._alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=1e-4)


def test_half_precision_of_the_original_vae_is_avoided():
    """What the loader decides on CUDA; deciding needs none."""
    from threestudio_pgc.diffusion.precision import resolve_vae_dtype

    half, full = torch.float16, torch.float32
    assert resolve_vae_dtype("auto", half, VAE["force_upcast"], "cuda") == full
    assert resolve_vae_dtype("auto", half, False, "cuda") == half  # the fp16-fix VAE
    assert resolve_vae_dtype("auto", torch.bfloat16, True, "cuda") == torch.bfloat16  # as wide as fp32: nothing overflows
    assert resolve_vae_dtype("auto", full, True, "cuda") == full
    assert resolve_vae_dtype("fp16", half, True, "cuda") == half  # asked for by name
    with pytest.raises(PriorError, match="vae_dtype: fp16 on a CPU"):
        resolve_vae_dtype("fp16", full, False, "cpu")
