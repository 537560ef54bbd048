from dataclasses import replace

import pytest
import torch

from tests.diffusion.tiny import build_tiny_controlnet, build_tiny_sdxl, random_conditioning
from threestudio_pgc.diffusion.prior import LatentPrior, PriorError
from threestudio_pgc.diffusion.sdxl import SDXLPrior

T = torch.tensor([20, 500])


@pytest.fixture(scope="module")
def prior(tiny_sdxl, tiny_controlnet):
    """With a ControlNet, in float64."""
    return SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet, control_scale=0.7).to(dtype=torch.float64)


@pytest.fixture
def images():
    return torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def latents(batch=2, channels=4, size=8):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def parts(folder, **changes):
    """The networks of a pipeline folder, with entries of their configurations changed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    vae.register_to_config(**changes.get("vae", {}))
    unet.register_to_config(**changes.get("unet", {}))
    scheduler = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return vae, unet, scheduler | changes.get("scheduler", {})


# ------------------------------------------------------------------------------------------------------------------- shape


def test_is_a_latent_prior(prior):
    assert isinstance(prior, LatentPrior)
    assert (prior.latent_channels, prior.image_size, prior.latent_size, prior.num_train_timesteps) == (4, 32, 8, 1000)


def test_images_of_other_shapes_are_refused(prior):
    with pytest.raises(ValueError, match="wanted \\(B, H, H, 3\\)"):
        prior.encode(torch.zeros(32, 32, 3))
    with pytest.raises(ValueError, match="found shape \\(1, 16, 32, 3\\)"):
        prior.encode(torch.zeros(1, 16, 32, 3))


@pytest.mark.parametrize("channels, size", [(4, 8), (16, 4)])
def test_any_size_and_number_of_latent_channels(tmp_path, channels, size):
    prior = SDXLPrior.from_pretrained(build_tiny_sdxl(tmp_path / "m", latent_channels=channels, sample_size=size))
    z = prior.encode(torch.rand(2, 4 * size, 4 * size, 3))
    assert z.shape == (2, channels, size, size) and z.dtype == torch.float32
    assert prior.decode(z).shape == (2, 4 * size, 4 * size, 3)
    prediction = prior.predict_noise(z, T, random_conditioning(2))
    assert prediction.cond.shape == prediction.uncond.shape == z.shape


def test_image_size_may_be_other_than_the_trained_one(tiny_sdxl):
    prior = SDXLPrior.from_pretrained(tiny_sdxl, image_size=48)
    z = prior.encode(torch.rand(1, 32, 32, 3))
    assert z.shape == (1, 4, 12, 12)
    assert prior.time_ids(2).tolist() == [[48, 48, 0, 0, 48, 48]] * 2
    with pytest.raises(PriorError, match="image_size: found 50, wanted a multiple of 8"):
        SDXLPrior.from_pretrained(tiny_sdxl, image_size=50)


def test_everything_is_frozen(prior):
    for net in (prior.vae, prior.unet, *prior.controlnets):
        assert not net.training
        assert not any(parameter.requires_grad for parameter in net.parameters())


# ------------------------------------------------------------------------------------------------------------------ encode


def test_encode_is_the_posterior_mode_scaled(prior, images):
    moments = prior.vae.quant_conv(prior.vae.encoder(images.permute(0, 3, 1, 2) * 2 - 1))
    mean, _ = moments.chunk(2, dim=1)
    torch.testing.assert_close(prior.encode(images), mean * 0.13025, rtol=1e-12, atol=1e-12)


def test_shift_and_statistics_of_the_latents(tiny_sdxl, images):
    changes = {"shift_factor": 0.1, "latents_mean": [1.0, -2.0, 3.0, 0.5], "latents_std": [0.5, 2.0, 4.0, 1.0], "scaling_factor": 0.5}
    prior = SDXLPrior(*parts(tiny_sdxl, vae=changes)).to(dtype=torch.float64)
    raw = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    z = prior.encode(images)
    for c in range(4):
        expected = (raw[:, c] - 0.1 - changes["latents_mean"][c]) * 0.5 / changes["latents_std"][c]
        torch.testing.assert_close(z[:, c], expected, rtol=1e-12, atol=1e-12)
    decoded = (prior.vae.decode(raw).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(prior.decode(z), decoded, rtol=1e-10, atol=1e-10)


def test_decode_is_clamped(prior):
    decoded = prior.decode(latents() * 1e3)
    assert decoded.min() == 0 and decoded.max() == 1


def test_encode_gradient(prior, images):
    image = images[:1].requires_grad_()
    assert torch.autograd.gradcheck(prior.encode, image, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("size", [20, 100])  # at a third, plain bilinear would skip pixels
def test_encode_gradient_through_the_resize_reaches_every_pixel(prior, size):
    image = torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(prior.encode, image, fast_mode=True, atol=1e-5)
    gradient = torch.autograd.grad(prior.encode(image).pow(2).sum(), image)[0]
    assert (gradient.norm(dim=-1) > 0).all()


def test_checkpointing_changes_nothing(tiny_sdxl, images):
    gradients = []
    for checkpointing in (False, True):
        prior = SDXLPrior.from_pretrained(tiny_sdxl, encoder_checkpointing=checkpointing).to(dtype=torch.float64)
        assert prior.vae.encoder.gradient_checkpointing is checkpointing
        image = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(prior.encode(image).pow(2).sum(), image)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------------- predict_noise


def plain_prediction(prior, z_t, t, embeddings, pooled, control, time_ids):
    """One half of the guidance, for one view, straight from diffusers' modules."""
    added = {"text_embeds": pooled, "time_ids": time_ids}
    residuals = {}
    if control is not None:
        down, middle = prior.controlnets[0](
            z_t, t, encoder_hidden_states=embeddings, controlnet_cond=control, added_cond_kwargs=added, return_dict=False
        )
        scale = prior.control_scales[0]
        residuals = {
            "down_block_additional_residuals": [scale * r for r in down],
            "mid_block_additional_residual": scale * middle,
        }
    return prior.unet(z_t, t, encoder_hidden_states=embeddings, added_cond_kwargs=added, **residuals).sample


@pytest.mark.parametrize("controlled", [False, True])
def test_one_batch_equals_the_modules_called_half_by_half(prior, controlled):
    conditioning = random_conditioning(2).to(torch.float64)
    control = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64) if controlled else None
    z_t = latents()
    prediction = prior.predict_noise(z_t, T, conditioning, control)
    assert not prediction.cond.requires_grad
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    for b in range(2):
        for half in ("cond", "uncond"):
            expected = plain_prediction(
                prior,
                z_t[b : b + 1],
                T[b : b + 1],
                getattr(conditioning, half)[b : b + 1],
                getattr(conditioning, "pooled_" + half)[b : b + 1],
                None if control is None else control[b : b + 1],
                time_ids,
            )
            torch.testing.assert_close(getattr(prediction, half)[b : b + 1], expected, rtol=1e-9, atol=1e-9)


def test_every_input_counts(prior):
    """Were one of them dropped on the way, the comparison above might not see it."""
    z_t, conditioning = latents(), random_conditioning(2).to(torch.float64)
    control = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    base = prior.predict_noise(z_t, T, conditioning, control).cond
    swapped = random_conditioning(2, seed=9).to(torch.float64)
    variants = {
        "latents": (z_t.flip(0), T, conditioning, control),
        "timestep": (z_t, T + 100, conditioning, control),
        "embeddings": (z_t, T, replace(conditioning, cond=swapped.cond), control),
        "pooled": (z_t, T, replace(conditioning, pooled_cond=swapped.pooled_cond), control),
        "time ids": (z_t, T, replace(conditioning, time_ids=torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)), control),
        "control": (z_t, T, conditioning, control.flip(0)),
        "no control": (z_t, T, conditioning, None),
    }
    for name, arguments in variants.items():
        assert (prior.predict_noise(*arguments).cond - base).abs().max() > 1e-6, name


def test_time_ids_are_the_pipelines(tiny_sdxl, prior):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    expected = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), dtype=torch.float32, text_encoder_projection_dim=12)
    assert torch.equal(prior.time_ids(1), expected)


def test_control_images_of_either_layout_and_any_size(prior):
    control = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    resized = torch.nn.functional.interpolate(control, (32, 32), mode="bilinear", align_corners=False)
    arguments = latents(), T, random_conditioning(2)
    expected = prior.predict_noise(*arguments, resized)
    for given in (control, control.permute(0, 2, 3, 1)):
        assert torch.equal(prior.predict_noise(*arguments, given).cond, expected.cond)


def test_several_controlnets_add_up(tiny_sdxl, tmp_path):
    folders = [build_tiny_controlnet(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    both = SDXLPrior.from_pretrained(tiny_sdxl, controlnet=folders, control_scale=[0.5, 0.0]).to(dtype=torch.float64)
    first = SDXLPrior.from_pretrained(tiny_sdxl, controlnet=folders[0], control_scale=0.5).to(dtype=torch.float64)
    images = [torch.rand(2, 3, 32, 32, dtype=torch.float64) for _ in folders]
    arguments = latents(), T, random_conditioning(2)
    torch.testing.assert_close(
        both.predict_noise(*arguments, images).cond, first.predict_noise(*arguments, images[0]).cond, rtol=1e-12, atol=1e-12
    )
    both.control_scales[1] = 0.5
    assert not torch.allclose(both.predict_noise(*arguments, images).cond, first.predict_noise(*arguments, images[0]).cond)


def test_v_prediction_is_turned_into_noise(tmp_path):
    """The same network under both readings of its output: eps = sqrt(abar) v + sqrt(1 - abar) z_t."""
    folder = build_tiny_sdxl(tmp_path / "m", prediction_type="v_prediction")
    prior = SDXLPrior.from_pretrained(folder).to(dtype=torch.float64)
    z_t, conditioning = latents(), random_conditioning(2).to(torch.float64)
    converted = prior.predict_noise(z_t, T, conditioning)
    prior.prediction_type = "epsilon"
    raw = prior.predict_noise(z_t, T, conditioning)
    for b, t in enumerate(T):
        alpha_bar = prior.alphas_cumprod[t]
        for half in ("cond", "uncond"):
            expected = alpha_bar.sqrt() * getattr(raw, half)[b] + (1 - alpha_bar).sqrt() * z_t[b]
            torch.testing.assert_close(getattr(converted, half)[b], expected, rtol=1e-12, atol=1e-12)


def test_add_noise(prior):
    z, noise = latents(), latents().flip(0)
    noisy = prior.noise_level(T).add_noise(z, noise)
    for b, t in enumerate(T):
        alpha_bar = prior.alphas_cumprod[t].item()
        torch.testing.assert_close(noisy[b], alpha_bar**0.5 * z[b] + (1 - alpha_bar) ** 0.5 * noise[b], rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- precision


def test_bf16_networks_and_float32_outside(tiny_sdxl, tiny_controlnet):
    full = SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet)
    half = SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet, dtype="bf16")
    assert (half.dtype, half.vae_dtype, half.alphas_cumprod.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    image, control = torch.rand(2, 32, 32, 3), torch.rand(2, 3, 32, 32)
    z = half.encode(image)
    assert z.dtype == half.decode(z).dtype == torch.float32
    assert 0 < (z - full.encode(image)).abs().max() < 0.05
    arguments = latents().float(), T, random_conditioning(2), control
    prediction, reference = half.predict_noise(*arguments), full.predict_noise(*arguments)
    assert prediction.cond.dtype == torch.float32
    assert 0 < (prediction.cond - reference.cond).abs().max() < 0.1


def test_the_vae_may_have_a_precision_of_its_own(tiny_sdxl):
    prior = SDXLPrior.from_pretrained(tiny_sdxl, dtype="bf16", vae_dtype="fp32")
    assert (prior.dtype, prior.vae_dtype) == (torch.bfloat16, torch.float32)
    full = SDXLPrior.from_pretrained(tiny_sdxl)
    image = torch.rand(1, 32, 32, 3)
    assert torch.equal(prior.encode(image), full.encode(image))


def test_a_trainers_autocast_does_not_reach_inside(tiny_sdxl, tiny_controlnet):
    prior = SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet)
    image, control, z = torch.rand(2, 32, 32, 3), torch.rand(2, 3, 32, 32), latents().float()
    conditioning = random_conditioning(2)
    outside = prior.encode(image), prior.decode(z), prior.predict_noise(z, T, conditioning, control).cond
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = prior.encode(image), prior.decode(z), prior.predict_noise(z, T, conditioning, control).cond
    for a, b in zip(outside, inside):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"attention": "sliced"}, {"channels_last": True}])
def test_memory_options_change_nothing(tiny_sdxl, tiny_controlnet, options):
    arguments = latents(), T, random_conditioning(2), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    plain, other = (
        SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet, **chosen).to(dtype=torch.float64).predict_noise(*arguments)
        for chosen in ({}, options)
    )
    torch.testing.assert_close(plain.cond, other.cond, rtol=1e-9, atol=1e-9)


def test_memory_note_counts_by_precision(tiny_sdxl, tiny_controlnet):
    prior = SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet, dtype="bf16", vae_dtype="fp32")
    note = prior.memory_note()
    for word in ("VAE", "float32", "U-Net", "bfloat16", "ControlNet 1", "together"):
        assert word in note


# ------------------------------------------------------------------------------------------------------------------ misuse


def test_what_does_not_fit_is_refused(prior, tiny_sdxl):
    z_t, conditioning = latents(), random_conditioning(2)
    with pytest.raises(ValueError, match="found 2 latents, timesteps \\(1,\\)"):
        prior.predict_noise(z_t, T[:1], conditioning)
    with pytest.raises(ValueError, match="3 conditionings"):
        prior.predict_noise(z_t, T, random_conditioning(3))
    with pytest.raises(ValueError, match="pooled embeddings"):
        prior.predict_noise(z_t, T, type(conditioning)(conditioning.cond, conditioning.uncond))
    with pytest.raises(ValueError, match="found 2 control images for 1 ControlNets"):
        prior.predict_noise(z_t, T, conditioning, [torch.zeros(2, 3, 32, 32)] * 2)
    with pytest.raises(ValueError, match="found shape \\(2, 1, 32, 32\\)"):
        prior.predict_noise(z_t, T, conditioning, torch.zeros(2, 1, 32, 32))
    without = SDXLPrior.from_pretrained(tiny_sdxl)
    with pytest.raises(ValueError, match="1 control images for 0 ControlNets"):
        without.predict_noise(z_t, T, conditioning, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unet": {"addition_embed_type": None}}, "addition_embed_type is None, wanted 'text_time'"),
        ({"unet": {"in_channels": 9}}, "VAE has 4 latent channels, the U-Net takes 9"),
        ({"scheduler": {"prediction_type": "sample"}}, "prediction_type is 'sample'"),
        ({"scheduler": {"beta_schedule": "exp"}}, "found 'exp'"),
        ({"unet": {"sample_size": None}}, "image_size: the U-Net's config.json has no sample_size"),
    ],
)
def test_parts_that_are_not_sdxl_are_refused(tiny_sdxl, changes, message):
    with pytest.raises(PriorError, match=message):
        SDXLPrior(*parts(tiny_sdxl, **changes))


def test_a_scheduler_without_a_schedule_is_refused(tiny_sdxl):
    vae, unet, _ = parts(tiny_sdxl)
    with pytest.raises(PriorError, match="class EDMEulerScheduler: has no 'beta_schedule'"):
        SDXLPrior(vae, unet, {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000})


def test_a_foreign_controlnet_is_refused(tiny_sdxl, tmp_path):
    folder = build_tiny_controlnet(tmp_path / "c", latent_channels=16)
    with pytest.raises(PriorError, match="controlnet_name_or_path: its in_channels is 16, the U-Net's is 4"):
        SDXLPrior.from_pretrained(tiny_sdxl, controlnet=folder)
    with pytest.raises(PriorError, match="control_scale: found 2 numbers for 1 ControlNets"):
        SDXLPrior.from_pretrained(tiny_sdxl, controlnet=build_tiny_controlnet(tmp_path / "d"), control_scale=[1.0, 0.5])


def test_the_tiny_folder_samples_with_plain_diffusers(tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red vase", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
