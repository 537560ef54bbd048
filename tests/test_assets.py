"""What is bundled: the pocket model as any user of diffusers would load it, and its size."""

import json
from pathlib import Path

import pytest
import torch

ASSETS = Path(__file__).resolve().parents[1] / "custom" / "threestudio_pgc" / "assets"
POCKET, CONTROLS = ASSETS / "pocket", [ASSETS / f"pocket-controlnet-{kind}" for kind in ("depth", "normal")]


def test_sizes_and_formats():
    files = [path for folder in (POCKET, *CONTROLS, ASSETS / "pocket-normals") for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 65e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for weights in (path for path in files if path.suffix == ".safetensors"):
        content = weights.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header.pop("__metadata__", None)
        assert {tensor["dtype"] for tensor in header.values()} <= {"F16", "I64"}, weights


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(POCKET)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_plain_diffusers_loads_it_and_samples_what_was_asked(pipeline):
    """Colours are the least of a prompt; a pipeline whose parts did not fit together would not even get those right."""
    prompts = ["a plain red cube", "a plain green cube", "a plain blue cube"]
    options = {"height": 128, "width": 128, "num_inference_steps": 20, "guidance_scale": 5.0, "output_type": "pt"}
    images = pipeline(prompts, generator=[torch.Generator().manual_seed(0) for _ in prompts], **options).images
    assert images.shape == (3, 3, 128, 128) and torch.isfinite(images).all()
    centre = images[:, :, 48:80, 48:80].mean(dim=(2, 3))  # (prompt, colour)
    assert (centre.argmax(dim=1) == torch.arange(3)).all(), centre


def test_every_word_of_the_vocabulary_is_one_token(pipeline):
    words = (POCKET / "vocabulary.txt").read_text().split()
    assert len(words) > 100
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words)


@pytest.mark.parametrize("kind", ["depth", "normal"])
def test_its_noise_prediction_is_better_than_none_and_control_makes_it_better(kind):
    """On a render it has never seen the error of epsilon lies under that of predicting nothing (1), and control lowers it. Normals
    whose right and left are exchanged lower it less: the renderer and the net mean the same by red."""
    from threestudio_pgc.diffusion.conditioning import make_conditioning
    from threestudio_pgc.diffusion.control import make_control
    from threestudio_pgc.diffusion.prompts import encode_prompts
    from threestudio_pgc.diffusion.sdxl import SDXLPrior
    from threestudio_pgc.scene.cameras import orbit_cameras
    from threestudio_pgc.scene.gbuffer import composite, render_gbuffer
    from threestudio_pgc.scene.mesh import load_mesh, normalize
    from threestudio_pgc.scene.raster import make_rasterizer

    buffers = render_gbuffer(normalize(load_mesh("builtin:bunny")), orbit_cameras(4), 128, 128, make_rasterizer("cpu"))
    red = torch.tensor([0.8, 0.07, 0.06]).expand(len(buffers.indices), 3)
    image = composite(red, buffers, torch.full((4, 128, 128, 3), 0.7))
    prior = SDXLPrior.from_pretrained("builtin:pocket", controlnet=f"builtin:pocket-controlnet-{kind}")
    encoded = encode_prompts("builtin:pocket", ["a red bunny", ""], use_cache=False)
    conditioning = make_conditioning(encoded, ["a red bunny"] * 4, "")
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([300, 400, 500, 600])
    with torch.no_grad():
        latents = prior.encode(image)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = prior.noise_level(timesteps).add_noise(latents, noise)
        plain = prior.predict_noise(noisy, timesteps, conditioning).cond
        right, mirrored = (make_control(kind, vars(buffers), normal_convention=style) for style in ("opengl", "normalbae"))
        guided, misled = (prior.predict_noise(noisy, timesteps, conditioning, control).cond for control in (right, mirrored))
    errors = [(prediction - noise).square().mean().item() for prediction in (plain, guided, misled)]
    assert errors[1] < errors[0] < 0.3, errors
    assert errors[1] == errors[2] if kind == "depth" else errors[1] < errors[2], errors


def test_the_normal_maps_of_the_normal_unet_face_the_way_they_are_seen_from(pipeline):
    """Red is the normal's x: towards the camera of a front view, away from that of a back view; the top is blue, grey where nothing is."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    parts = {name: part for name, part in pipeline.components.items() if name != "unet"}
    unet = UNet2DConditionModel.from_pretrained(ASSETS / "pocket-normals")
    painter = StableDiffusionXLPipeline(**parts, unet=unet, add_watermarker=False)
    painter.set_progress_bar_config(disable=True)
    prompts = ["a sphere, front view", "a sphere, back view"]
    options = {"height": 128, "width": 128, "num_inference_steps": 20, "guidance_scale": 5.0, "output_type": "pt"}
    images = painter(prompts, generator=[torch.Generator().manual_seed(0) for _ in prompts], **options).images
    front, back = images[:, :, 56:72, 56:72].mean(dim=(2, 3))
    assert front[0] > 0.7 and back[0] < 0.45
    assert (images[:, :, :4, :4].mean(dim=(2, 3)) - 0.5).abs().max() < 0.1
