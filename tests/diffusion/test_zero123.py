import math
import re

import numpy as np
import pytest
import torch

from tests.diffusion.tiny_zero123 import EMBEDDING, build_tiny_zero123, camera_weights
from threestudio_pgc.diffusion.prior import Conditioning, LatentPrior, PriorError
from threestudio_pgc.diffusion.zero123 import READY, Zero123Prior, clip_pixels, encode_reference, relative_pose, resolve_pose
from threestudio_pgc.pixelgrad import pullback

T = torch.tensor([20, 500])
LAYOUTS = ("clip_camera_projection", "cc_projection")
SEEN_FROM = {"reference_elevation_deg": 10.0, "reference_azimuth_deg": 350.0, "reference_distance": 3.0}
# The second view looks from 20 degrees above the first and from its other side of azimuth 0.
VIEWS = torch.tensor([10.0, 30.0]), torch.tensor([350.0, 20.0]), torch.tensor([3.0, 2.2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in both layouts."""
    root = tmp_path_factory.mktemp("zero123")
    return {layout: build_tiny_zero123(root / layout, layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def folder(folders):
    return folders["clip_camera_projection"]


@pytest.fixture(scope="module")
def prior(folder):
    return Zero123Prior.from_pretrained(folder).to(dtype=torch.float64)


def picture(seed=0):
    return torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference(prior, folder):
    return prior.reference(encode_reference(folder, picture()), picture())


@pytest.fixture(scope="module")
def conditioning(prior, reference):
    return prior.conditioning(reference, *VIEWS, **SEEN_FROM)


def latents(batch=2):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------------- pose


def test_no_views_have_no_poses():
    assert relative_pose(*torch.zeros(3, 0), **SEEN_FROM, pose="zero123").shape == (0, 4)


def test_the_reference_view_itself_has_not_moved():
    here = [view[:1] for view in VIEWS]
    assert relative_pose(*here, **SEEN_FROM, pose="zero123").tolist() == [[0, 0, 1, 0]]


def test_pose_by_hand():
    """30 degrees of azimuth across 0, 20 degrees up (the polar angle falls), 0.8 world units = half a model unit nearer."""
    pose = relative_pose(*VIEWS, **SEEN_FROM, pose="zero123", distance_unit=1.6)
    assert pose[1].tolist() == pytest.approx([-math.pi / 9, 0.5, math.sqrt(3) / 2, -0.5], abs=1e-7)


def test_stable_zero123_is_told_the_references_polar_angle_instead_of_the_distance():
    pose = relative_pose(*VIEWS, **SEEN_FROM, pose="stable-zero123")
    assert pose[:, 3].tolist() == pytest.approx([math.radians(80)] * 2, abs=1e-12)
    assert torch.equal(pose[:, :3], relative_pose(*VIEWS, **SEEN_FROM, pose="zero123")[:, :3])


def test_azimuths_a_turn_apart_are_the_same():
    there = VIEWS[0], VIEWS[1] - 360, VIEWS[2]
    poses = [relative_pose(*views, **SEEN_FROM, pose="zero123") for views in (VIEWS, there)]
    torch.testing.assert_close(*poses, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name, pose",
    [
        ("ashawkey/stable-zero123-diffusers", "stable-zero123"),
        ("ashawkey/zero123-xl-diffusers", "zero123"),
        ("/models/stable-diffusion/zero123-xl", "zero123"),
        ("", "zero123"),
    ],
)
def test_the_convention_is_told_by_the_models_own_name(name, pose):
    assert resolve_pose("auto", name) == pose
    assert resolve_pose("zero123", name) == "zero123"


def test_unknown_conventions_and_units_are_refused(prior, reference):
    with pytest.raises(PriorError, match="pose: found 'xl', wanted one of auto, zero123, stable-zero123"):
        prior.conditioning(reference, *VIEWS, **SEEN_FROM, pose="xl")
    with pytest.raises(PriorError, match="pose: found 'auto'"):
        relative_pose(*VIEWS, **SEEN_FROM, pose="auto")
    with pytest.raises(ValueError, match="distance_unit: found 0, wanted more than 0"):
        prior.conditioning(reference, *VIEWS, **SEEN_FROM, distance_unit=0)


# --------------------------------------------------------------------------------------------------------------- reference


def test_the_picture_reaches_clip_as_transformers_prepares_it():
    from transformers import CLIPImageProcessor

    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)(image, return_tensors="pt").pixel_values
    pixels = clip_pixels(torch.from_numpy(image) / 255, 28)
    assert (pixels - expected).abs().max() < 1 / 255 / 0.26  # transformers rounds to whole levels, once per direction


def test_the_embedding_is_the_image_encoders(folder):
    from transformers import CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder")
    expected = encoder(clip_pixels(picture(), 28)).image_embeds
    found = encode_reference(folder, picture())
    assert found.embedding.shape == (1, 1, EMBEDDING) and not found.embedding.requires_grad
    torch.testing.assert_close(found.embedding[:, 0], expected)
    assert (encode_reference(folder, picture(1)).embedding - found.embedding).abs().max() > 1e-3


def test_both_layouts_load_and_agree(folders):
    found = {}
    for layout, folder in folders.items():
        prior, embedding = Zero123Prior.from_pretrained(folder), encode_reference(folder, picture())
        conditioning = prior.conditioning(prior.reference(embedding, picture()), *VIEWS, **SEEN_FROM)
        found[layout] = prior.predict_noise(latents(), T, conditioning)
    first, second = found.values()
    assert torch.equal(first.cond, second.cond) and torch.equal(first.uncond, second.uncond)


def test_the_reference_latents_are_the_posteriors_mode_unscaled(prior, reference):
    expected = prior.vae.encode(picture().double().permute(2, 0, 1)[None] * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(reference.latents, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.encode(picture()[None]), expected * 0.18215, rtol=1e-12, atol=1e-12)


def test_pictures_of_other_shapes_are_refused(prior, folder):
    embedding = encode_reference(folder, picture())
    for image in (torch.zeros(1, 32, 32, 3), torch.zeros(16, 32, 3)):
        with pytest.raises(ValueError, match=f"image: found shape {re.escape(str(tuple(image.shape)))}, wanted \\(H, H, 3\\)"):
            encode_reference(folder, image)
        with pytest.raises(ValueError, match="wanted \\(H, H, 3\\)"):
            prior.reference(embedding, image)


# ------------------------------------------------------------------------------------------------------------ conditioning


def test_the_token_is_the_projected_embedding_and_pose(reference, conditioning):
    pose = relative_pose(*VIEWS, **SEEN_FROM, pose="zero123")
    for view in range(2):
        expected = reference.weight @ torch.cat([reference.embedding[0, 0], pose[view]]) + reference.bias
        torch.testing.assert_close(conditioning.cond[view, 0], expected, rtol=1e-12, atol=1e-12)
    assert conditioning.cond.shape == (2, 1, EMBEDDING) and conditioning.cond.dtype == torch.float64


def test_the_unconditional_token_is_zero_after_the_layer(conditioning):
    assert conditioning.uncond.shape == conditioning.cond.shape and not conditioning.uncond.any()


def test_the_models_name_decides_the_pose(folder, tmp_path):
    stable = tmp_path / "stable-zero123"
    stable.symlink_to(folder)
    priors = [Zero123Prior.from_pretrained(path) for path in (folder, stable)]
    reference = priors[0].reference(encode_reference(folder, picture()), picture())
    plain, told = (prior.conditioning(reference, *VIEWS, **SEEN_FROM).cond for prior in priors)
    assert not torch.allclose(plain, told)
    assert torch.equal(told, priors[0].conditioning(reference, *VIEWS, **SEEN_FROM, pose="stable-zero123").cond)


# -------------------------------------------------------------------------------------------------------------- prediction


def test_is_a_latent_prior(prior):
    assert isinstance(prior, LatentPrior)
    assert (prior.latent_channels, prior.image_size, prior.latent_size) == (4, 32, 8)


def test_predictions_equal_the_raw_unet(prior, conditioning):
    z_t = latents()
    prediction = prior.predict_noise(z_t, T, conditioning)
    assert not prediction.cond.requires_grad
    for view in range(2):
        z, t = z_t[view : view + 1], T[view : view + 1]
        beside = torch.cat([z, conditioning.reference[view : view + 1]], dim=1)
        expected = prior.unet(beside, t, encoder_hidden_states=conditioning.cond[view : view + 1]).sample
        torch.testing.assert_close(prediction.cond[view : view + 1], expected, rtol=1e-9, atol=1e-9)
        empty = prior.unet(torch.cat([z, torch.zeros_like(z)], dim=1), t, encoder_hidden_states=torch.zeros(1, 1, EMBEDDING).double())
        torch.testing.assert_close(prediction.uncond[view : view + 1], empty.sample, rtol=1e-9, atol=1e-9)


def test_the_reference_changes_the_conditional_prediction_only(prior, folder, reference, conditioning):
    base = prior.predict_noise(latents(), T, conditioning)
    other = prior.reference(encode_reference(folder, picture(1)), picture(1))
    for changed in (other, reference._replace(latents=other.latents), reference._replace(embedding=other.embedding)):
        prediction = prior.predict_noise(latents(), T, prior.conditioning(changed, *VIEWS, **SEEN_FROM))
        assert (prediction.cond - base.cond).abs().max() > 1e-5
        assert torch.equal(prediction.uncond, base.uncond)


def test_the_camera_changes_the_prediction(prior, reference, conditioning):
    base = prior.predict_noise(latents(), T, conditioning).cond
    moved = prior.conditioning(reference, VIEWS[0], VIEWS[1] + 40, VIEWS[2], **SEEN_FROM)
    assert (prior.predict_noise(latents(), T, moved).cond - base).abs().max() > 1e-6


def test_the_image_gradient_is_autograd_of_the_plain_formula(prior, conditioning):
    """The split backward equals differentiating sum(latents * gradient) through the VAE in one piece."""
    rgb = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    noise, level = latents().flip(0), prior.noise_level(T)
    z = prior.encode(rgb)
    predicted = prior.predict_noise(level.add_noise(z.detach(), noise), T, conditioning)
    gradient = level.sigma**2 * (predicted.uncond + 3.0 * (predicted.cond - predicted.uncond) - noise)
    (z * gradient).sum().backward()
    found = pullback(gradient, rgb, prior.encode)
    assert (found - rgb.grad).norm() < 1e-9 * rgb.grad.norm()


def test_bf16_networks_and_float32_outside(folder):
    half, full = Zero123Prior.from_pretrained(folder, dtype="bf16"), Zero123Prior.from_pretrained(folder)
    embeddings = [encode_reference(folder, picture(), dtype=dtype) for dtype in ("bf16", "fp32")]
    assert embeddings[0].embedding.dtype == torch.float32
    assert 0 < (embeddings[0].embedding - embeddings[1].embedding).abs().max() < 0.1 * embeddings[1].embedding.abs().max()
    conditionings = [p.conditioning(p.reference(embeddings[1], picture()), *VIEWS, **SEEN_FROM) for p in (half, full)]
    assert conditionings[0].cond.dtype == torch.float32 and torch.equal(conditionings[0].cond, conditionings[1].cond)
    predictions = [p.predict_noise(latents(), T, c) for p, c in zip((half, full), conditionings)]
    assert predictions[0].cond.dtype == torch.float32
    assert 0 < (predictions[0].cond - predictions[1].cond).abs().max() < 0.1


def test_a_trainers_autocast_does_not_reach_inside(folder):
    prior = Zero123Prior.from_pretrained(folder)

    def predict():
        reference = prior.reference(encode_reference(folder, picture()), picture())
        return prior.predict_noise(latents(), T, prior.conditioning(reference, *VIEWS, **SEEN_FROM)).cond

    outside = predict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(predict(), outside)


def test_everything_is_frozen(prior):
    for network in prior.networks().values():
        assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


# ------------------------------------------------------------------------------------------------------------------ misuse


def test_a_conditioning_without_a_reference_is_refused(prior, conditioning):
    bare = Conditioning(conditioning.cond, conditioning.uncond)
    with pytest.raises(ValueError, match="conditioning.reference: found None, wanted .* \\(2, 4, 8, 8\\)"):
        prior.predict_noise(latents(), T, bare)
    small = Conditioning(conditioning.cond, conditioning.uncond, reference=conditioning.reference[..., :4])
    with pytest.raises(ValueError, match="found \\(2, 4, 8, 4\\)"):
        prior.predict_noise(latents(), T, small)


def test_controlnets_are_refused(folder, tiny_controlnet):
    with pytest.raises(PriorError, match="controlnet_name_or_path: found .*, wanted none: ControlNets are made for"):
        Zero123Prior.from_pretrained(folder, controlnet=tiny_controlnet)


def test_another_familys_model_is_refused(tiny_sdxl):
    with pytest.raises(PriorError, match="StableDiffusionXLPipeline, wanted a Zero123Pipeline; for this model use pgc-sdxl-guidance"):
        Zero123Prior.from_pretrained(tiny_sdxl)


def test_an_ordinary_unet_is_refused(folder, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae, unet = AutoencoderKL.from_pretrained(folder, subfolder="vae"), UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.register_to_config(in_channels=4)
    scheduler = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with pytest.raises(PriorError, match="the U-Net takes 4 and gives 4; wanted 8 and 4"):
        Zero123Prior(vae, unet, scheduler)
    unet.register_to_config(in_channels=8, class_embed_type="timestep")
    with pytest.raises(PriorError, match="class_embed_type is 'timestep', wanted none: this is no Zero123"):
        Zero123Prior(vae, unet, scheduler)


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder", "cc_projection"])
def test_pickled_folders_are_refused_with_the_ids_of_others(tmp_path, part):
    folder = build_tiny_zero123(tmp_path / "m", "cc_projection")
    weights = next((folder / part).glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(PriorError, match=f"{part}.*can run code when read.*{READY[0]}.*convert_zero123"):
        Zero123Prior.from_pretrained(folder)
        encode_reference(folder, picture())


def test_a_checkpoint_file_is_refused_with_the_ids_of_others(tmp_path):
    (tmp_path / "zero123.ckpt").write_bytes(b"0")
    for load in (Zero123Prior.from_pretrained, lambda path: encode_reference(path, picture())):
        with pytest.raises(PriorError, match=f"zero123.ckpt.*{READY[1]}"):
            load(tmp_path / "zero123.ckpt")


def test_a_folder_without_the_cameras_layer_is_refused(tmp_path):
    folder = build_tiny_zero123(tmp_path / "m")
    (folder / "clip_camera_projection").rename(folder / "elsewhere")
    with pytest.raises(PriorError, match="Wanted the camera's linear layer in clip_camera_projection or cc_projection"):
        encode_reference(folder, picture())


def test_a_cameras_layer_of_other_names_or_sizes_is_refused(tmp_path, prior, folder):
    from safetensors.torch import save_file

    broken = build_tiny_zero123(tmp_path / "m")
    for tensors, message in (
        ({"projection.weight": torch.zeros(24, 28)}, "holds projection.weight, wanted proj.weight and proj.bias"),
        ({"proj.weight": torch.zeros(24, 30), "proj.bias": torch.zeros(24)}, "takes 30 numbers, wanted 24 of the image encoder and 4"),
    ):
        save_file(tensors, camera_weights(broken))
        with pytest.raises(PriorError, match=message):
            encode_reference(broken, picture())
    camera_weights(broken).write_bytes(b"damaged")
    with pytest.raises(PriorError, match="cannot be loaded"):
        encode_reference(broken, picture())
    embedding = encode_reference(folder, picture())
    with pytest.raises(PriorError, match="gives 7 numbers, wanted 24 for this U-Net"):
        prior.reference(embedding._replace(weight=torch.zeros(7, 28), bias=torch.zeros(7)), picture())


def test_half_precision_files_are_read_where_there_are_no_others(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    half = build_tiny_zero123(tmp_path / "m")
    whole = load_file(camera_weights(half))
    camera_weights(half).unlink()
    variants = {".fp16": 1.0, ".fp16_ema": 2.0}
    for name, factor in variants.items():
        path = camera_weights(half).with_suffix(f"{name}.safetensors")
        save_file({key: (value * factor).half() for key, value in whole.items()}, path)
    found, expected = encode_reference(half, picture()), encode_reference(folder, picture())
    assert torch.equal(found.weight, expected.weight.half().float()) and found.weight.dtype == torch.float32
