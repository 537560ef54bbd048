import shutil
from dataclasses import replace

import pytest
import torch

from tests.diffusion.tiny import build_tiny_sd3, random_conditioning, transformer_config
from threestudio_pgc.diffusion.model_files import SCHEDULER, TRANSFORMER, VAE, read_config, stored_parameters
from threestudio_pgc.diffusion.prior import LatentPrior, PriorError
from threestudio_pgc.diffusion.stable_diffusion_3 import StableDiffusion3Prior
from threestudio_pgc.pixelgrad import pullback

T = torch.tensor([20, 500])


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3", t5=False)


@pytest.fixture(scope="module")
def prior(tiny_sd3):
    """In float64."""
    return StableDiffusion3Prior.from_pretrained(tiny_sd3).to(dtype=torch.float64)


@pytest.fixture
def images():
    return torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def latents(batch=2):
    return torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def conditioning(batch=2, seed=2):
    return random_conditioning(batch, seed, "sd3").to(torch.float64)


def configs(folder, **changes):
    """Those of a folder's parts, with entries changed."""
    parts = {"vae": VAE, "transformer": TRANSFORMER, "scheduler": SCHEDULER}
    return {name: read_config(folder, part) | changes.get(name, {}) for name, part in parts.items()}


# ------------------------------------------------------------------------------------------------------------------ encode


def test_no_views(prior):
    assert prior.noise_level(torch.zeros(0, dtype=torch.int64)).sigma.shape == (0, 1, 1, 1)
    assert pullback(latents(0), torch.zeros(0, 32, 32, 3), prior.encode).shape == (0, 32, 32, 3)


def test_is_a_latent_prior(prior):
    assert isinstance(prior, LatentPrior)
    assert (prior.latent_channels, prior.image_size, prior.latent_size, prior.num_train_timesteps) == (16, 32, 8, 1000)
    assert list(prior.networks()) == ["VAE", "transformer"]
    assert not any(parameter.requires_grad for net in prior.networks().values() for parameter in net.parameters())


def test_latents_are_shifted_then_scaled(prior, images):
    raw = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    z = prior.encode(images)
    torch.testing.assert_close(z, (raw - 0.0609) * 1.5305, rtol=1e-12, atol=1e-12)
    decoded = (prior.vae.decode(raw).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(prior.decode(z), decoded, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_pulling_back_a_latent_gradient_is_autograd(prior, images, views):
    gradient = latents(3)
    image = images.clone().requires_grad_()
    expected = torch.autograd.grad((prior.encode(image) * gradient).sum(), image)[0]
    found = pullback(gradient, images, prior.encode, views_per_pullback=views)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_few_views_at_a_time_are_the_full_batch(tiny_sd3, images):
    prior, image, gradient = StableDiffusion3Prior.from_pretrained(tiny_sd3), images.float(), latents(3).float()
    one, all_three = (pullback(gradient, image, prior.encode, views_per_pullback=views) for views in (1, 3))
    torch.testing.assert_close(one, all_three, rtol=1e-6, atol=1e-6 * all_three.abs().max().item())


# ------------------------------------------------------------------------------------------------------------- noise level


def test_timesteps_are_the_schedulers_own_before_its_shift(prior):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    t = torch.arange(1000)
    alpha, sigma = prior.noise_level(t)
    assert sigma.shape == (1000, 1, 1, 1) and sigma.dtype == torch.float64
    torch.testing.assert_close(scheduler.sigmas.flip(0), sigma.flatten().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.timesteps.flip(0), t + 1.0, rtol=1e-6, atol=0)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(sigma), rtol=1e-15, atol=0)


def test_noise_is_added_as_the_scheduler_does(prior):
    from diffusers import FlowMatchEulerDiscreteScheduler

    z, noise = latents(), latents().flip(0)
    expected = FlowMatchEulerDiscreteScheduler().scale_noise(z, T + 1.0, noise)
    torch.testing.assert_close(prior.noise_level(T).add_noise(z, noise), expected, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- predict_noise


def plain_velocity(prior, z_t, t, embedding, pooled):
    """Of one view, straight from diffusers' module."""
    return prior.transformer(z_t, encoder_hidden_states=embedding, pooled_projections=pooled, timestep=t + 1.0).sample


def test_one_batch_equals_the_module_called_half_by_half(prior):
    given, other, z_t = conditioning(), conditioning(seed=5), latents()
    given = replace(given, negatives=torch.stack([other.cond, other.uncond]))
    given = replace(given, pooled_negatives=torch.stack([other.pooled_cond, other.pooled_uncond]))
    prediction = prior.predict_noise(z_t, T, given)
    wanted = [(prediction.cond, given.cond, given.pooled_cond), (prediction.uncond, given.uncond, given.pooled_uncond)]
    wanted += zip(prediction.negatives, given.negatives, given.pooled_negatives)
    for found, embedding, pooled in wanted:
        for b, sigma in enumerate((0.021, 0.501)):
            one = slice(b, b + 1)
            velocity = plain_velocity(prior, z_t[one], T[one], embedding[one], pooled[one])
            torch.testing.assert_close(found[one], z_t[one] + (1 - sigma) * velocity, rtol=1e-9, atol=1e-9)


def test_clean_latents_lie_one_straight_step_away(prior):
    """z = z_t - sigma v: what `NoiseLevel.clean` makes of the predicted noise."""
    z_t, given = latents(), conditioning()
    velocity = plain_velocity(prior, z_t, T, given.cond, given.pooled_cond)
    level = prior.noise_level(T)
    clean = level.clean(z_t, prior.predict_noise(z_t, T, given).cond)
    torch.testing.assert_close(clean, z_t - level.sigma * velocity, rtol=1e-9, atol=1e-9)


def test_pure_noise_is_its_own_prediction(prior):
    z_t, last = latents(), torch.tensor([999, 999])
    assert prior.noise_level(last).alpha.abs().max() == 0
    prediction = prior.predict_noise(z_t, last, conditioning())
    assert torch.equal(prediction.cond, z_t) and torch.equal(prediction.uncond, z_t)


def test_every_input_counts(prior):
    z_t, given, other = latents(), conditioning(), conditioning(seed=9)
    base = prior.predict_noise(z_t, T, given).cond
    variants = {
        "latents": (z_t.flip(0), T, given),
        "timestep": (z_t, T + 100, given),
        "embeddings": (z_t, T, replace(given, cond=other.cond)),
        "pooled": (z_t, T, replace(given, pooled_cond=other.pooled_cond)),
    }
    for name, arguments in variants.items():
        assert (prior.predict_noise(*arguments).cond - base).abs().max() > 1e-6, name


def test_a_conditional_prediction_has_a_graph(prior):
    z_t = latents().requires_grad_()
    alone = prior.predict_conditional(z_t, T, conditioning())
    torch.testing.assert_close(alone, prior.predict_noise(z_t, T, conditioning()).cond, rtol=1e-9, atol=1e-9)
    assert torch.autograd.grad(alone.sum(), z_t)[0].abs().max() > 0


def test_every_block_hears_the_time_embedding(prior):
    z_t, given = latents(), conditioning()
    base, shapes = prior.predict_noise(z_t, T, given).cond, []

    def shift(module, arguments, output):
        shapes.append(output.shape)
        return output + 1

    handle = prior.time_embedding.register_forward_hook(shift)
    shifted = prior.predict_noise(z_t, T, given).cond
    handle.remove()
    assert shapes == [(4, 16)]
    assert (shifted - base).abs().max() > 1e-6


# --------------------------------------------------------------------------------------------------------------- precision


def test_bf16_networks_and_float32_outside(tiny_sd3):
    full, half = StableDiffusion3Prior.from_pretrained(tiny_sd3), StableDiffusion3Prior.from_pretrained(tiny_sd3, dtype="bf16")
    assert (half.dtype, half.vae_dtype) == (torch.bfloat16, torch.bfloat16)
    arguments = latents().float(), T, random_conditioning(2, family="sd3")
    prediction, reference = half.predict_noise(*arguments).cond, full.predict_noise(*arguments).cond
    assert prediction.dtype == torch.float32
    assert 0 < (prediction - reference).abs().max() < 0.1


def test_a_trainers_autocast_does_not_reach_inside(tiny_sd3):
    prior = StableDiffusion3Prior.from_pretrained(tiny_sd3)
    image, z, given = torch.rand(2, 32, 32, 3), latents().float(), random_conditioning(2, family="sd3")

    def results():
        return prior.encode(image), prior.decode(z), prior.predict_noise(z, T, given).cond

    outside = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    assert all(torch.equal(a, b) for a, b in zip(outside, inside))


def test_options_of_a_transformer(tiny_sd3, prior):
    given = latents(), T, conditioning()
    other = StableDiffusion3Prior.from_pretrained(tiny_sd3, channels_last=True, encoder_checkpointing=True).to(dtype=torch.float64)
    torch.testing.assert_close(other.predict_noise(*given).cond, prior.predict_noise(*given).cond, rtol=1e-9, atol=1e-9)
    with pytest.raises(PriorError, match="attention: found 'sliced', which SD3Transformer2DModel cannot do; wanted sdpa or xformers"):
        StableDiffusion3Prior.from_pretrained(tiny_sd3, attention="sliced")


# ------------------------------------------------------------------------------------------------------------------ misuse


def test_another_image_size(tiny_sd3):
    larger = StableDiffusion3Prior.from_pretrained(tiny_sd3, image_size=64)
    z = larger.encode(torch.rand(1, 32, 32, 3))
    assert z.shape == (1, 16, 16, 16)
    assert larger.predict_noise(z, T[:1], random_conditioning(1, family="sd3")).cond.shape == z.shape
    for size in (36, 72, -8):
        with pytest.raises(PriorError, match=f"image_size: found {size}, wanted a multiple of 8 pixels of at most 64"):
            StableDiffusion3Prior.from_pretrained(tiny_sd3, image_size=size)


def test_controlnets_are_refused_with_a_reason(tiny_sd3, tiny_controlnet):
    with pytest.raises(PriorError, match="controlnet_name_or_path: found 1 ControlNets, wanted none: .*SD3ControlNetModel"):
        StableDiffusion3Prior.from_pretrained(tiny_sd3, controlnet=tiny_controlnet)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"transformer": {"in_channels": 4}}, "VAE has 16 latent channels, the transformer takes 4 and gives 16"),
        ({"scheduler": {"_class_name": "EulerDiscreteScheduler"}}, "found class EulerDiscreteScheduler, wanted FlowMatchEuler"),
    ],
)
def test_parts_that_are_not_stable_diffusion_3_are_refused(tiny_sd3, changes, message):
    with pytest.raises(PriorError, match=message):
        StableDiffusion3Prior.from_config(configs(tiny_sd3, **changes))


def test_pooled_embeddings_are_needed(prior):
    given = conditioning()
    for lacking in (replace(given, pooled_cond=None), replace(given, negatives=given.cond[None])):
        with pytest.raises(ValueError, match="needs the pooled embeddings of every prompt"):
            prior.predict_noise(latents(), T, lacking)


def test_the_architecture_alone(tiny_sd3):
    prior = StableDiffusion3Prior.from_config(configs(tiny_sd3, transformer=transformer_config()))
    assert prior.device.type == "meta"
    stored = stored_parameters(tiny_sd3 / "transformer", ["diffusion_pytorch_model.safetensors"])
    positions = prior.transformer.pos_embed.pos_embed.numel()  # a buffer that is stored as well
    assert sum(parameter.numel() for parameter in prior.transformer.parameters()) == stored - positions


def test_a_turbo_checkpoint_is_told_by_its_name(tiny_sd3, prior, tmp_path):
    assert prior.guidance_distilled is None
    turbo = StableDiffusion3Prior.from_pretrained(shutil.copytree(tiny_sd3, tmp_path / "large-turbo"))
    assert turbo.guidance_distilled == "its name says 'turbo'"


def test_the_tiny_folder_samples_with_plain_diffusers(tiny_sd3):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red vase", height=32, width=32, num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
