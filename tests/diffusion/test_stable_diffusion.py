import shutil
import warnings
from dataclasses import replace

import pytest
import torch

from tests.diffusion.tiny import build_tiny_sd, build_tiny_sd3, build_tiny_sd_controlnet, random_conditioning, sd_unet_config
from threestudio_pgc.diffusion import model_files
from threestudio_pgc.diffusion.model_files import UNET, VAE, MovedModelWarning, stored_parameters
from threestudio_pgc.diffusion.prior import LatentPrior, PriorError
from threestudio_pgc.diffusion.sdxl import SDXLPrior
from threestudio_pgc.diffusion.stable_diffusion import StableDiffusionPrior
from threestudio_pgc.diffusion.stable_diffusion_3 import StableDiffusion3Prior
from threestudio_pgc.pixelgrad import pullback

T = torch.tensor([20, 999])
GONE, COPY = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="module")
def tiny_sd_controlnet(tmp_path_factory):
    return build_tiny_sd_controlnet(tmp_path_factory.mktemp("tiny") / "controlnet")


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def prior(request, tmp_path_factory, tiny_sd_controlnet):
    """With a ControlNet, in float64."""
    folder = build_tiny_sd(tmp_path_factory.mktemp("tiny") / request.param, prediction_type=request.param)
    prior = StableDiffusionPrior.from_pretrained(folder, controlnet=tiny_sd_controlnet, control_scale=0.7)
    return prior.to(dtype=torch.float64)


@pytest.fixture
def images():
    return torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Puts a folder into an otherwise empty hub cache, under an id."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, name):
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("c0ffee")
        shutil.copytree(folder, repo / "snapshots" / "c0ffee")

    return put


def latents(batch=2):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def conditioning(batch=2, seed=2):
    return random_conditioning(batch, seed, "sd").to(torch.float64)


# ------------------------------------------------------------------------------------------------------------------ encode


def test_no_views(prior):
    assert prior.noise_level(torch.zeros(0, dtype=torch.int64)).sigma.shape == (0, 1, 1, 1)
    assert pullback(latents(0), torch.zeros(0, 32, 32, 3), prior.encode).shape == (0, 32, 32, 3)


def test_is_a_latent_prior(prior):
    assert isinstance(prior, LatentPrior)
    assert (prior.latent_channels, prior.image_size, prior.latent_size, prior.num_train_timesteps) == (4, 32, 8, 1000)
    assert not any(parameter.requires_grad for net in prior.networks().values() for parameter in net.parameters())


def test_latents_are_the_posterior_mode_scaled(prior, images):
    raw = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    z = prior.encode(images)
    torch.testing.assert_close(z, raw * 0.18215, rtol=1e-12, atol=1e-12)
    decoded = (prior.vae.decode(raw).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(prior.decode(z), decoded, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_pulling_back_a_latent_gradient_is_autograd(prior, images, views):
    gradient = latents(3)
    image = images.clone().requires_grad_()
    expected = torch.autograd.grad((prior.encode(image) * gradient).sum(), image)[0]
    found = pullback(gradient, images, prior.encode, views_per_pullback=views)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_few_views_at_a_time_are_the_full_batch(tiny_sd, images):
    prior, image, gradient = StableDiffusionPrior.from_pretrained(tiny_sd), images.float(), latents(3).float()
    one, all_three = (pullback(gradient, image, prior.encode, views_per_pullback=views) for views in (1, 3))
    torch.testing.assert_close(one, all_three, rtol=1e-6, atol=1e-6 * all_three.abs().max().item())


# ----------------------------------------------------------------------------------------------------------- predict_noise


def plain_prediction(prior, z_t, t, embedding, control):
    """Of one view, straight from diffusers' modules."""
    residuals = {}
    if control is not None:
        down, middle = prior.controlnets[0](z_t, t, encoder_hidden_states=embedding, controlnet_cond=control, return_dict=False)
        residuals = {"down_block_additional_residuals": [0.7 * r for r in down], "mid_block_additional_residual": 0.7 * middle}
    output = prior.unet(z_t, t, encoder_hidden_states=embedding, **residuals).sample
    if prior.prediction_type == "epsilon":
        return output
    alpha_bar = prior.alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * z_t


@pytest.mark.parametrize("controlled", [False, True])
def test_one_batch_equals_the_modules_called_half_by_half(prior, controlled):
    given, z_t = conditioning(), latents()
    given = replace(given, negatives=torch.stack([conditioning(seed=seed).cond for seed in (5, 6)]))
    control = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64) if controlled else None
    prediction = prior.predict_noise(z_t, T, given, control)
    wanted = [(prediction.cond, given.cond), (prediction.uncond, given.uncond), *zip(prediction.negatives, given.negatives)]
    for found, embedding in wanted:
        for b in range(2):
            one = slice(b, b + 1)
            expected = plain_prediction(prior, z_t[one], T[one], embedding[one], None if control is None else control[one])
            torch.testing.assert_close(found[one], expected, rtol=1e-9, atol=1e-9)


def test_every_input_counts(prior):
    z_t, given, control = latents(), conditioning(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    base = prior.predict_noise(z_t, T, given, control).cond
    variants = {
        "latents": (z_t.flip(0), T, given, control),
        "timestep": (z_t, T - 10, given, control),
        "embeddings": (z_t, T, conditioning(seed=9), control),
        "control": (z_t, T, given, control.flip(0)),
        "no control": (z_t, T, given, None),
    }
    for name, arguments in variants.items():
        assert (prior.predict_noise(*arguments).cond - base).abs().max() > 1e-6, name


def test_a_conditional_prediction_has_a_graph(prior):
    z_t = latents().requires_grad_()
    alone = prior.predict_conditional(z_t, T, conditioning())
    torch.testing.assert_close(alone, prior.predict_noise(z_t, T, conditioning()).cond, rtol=1e-9, atol=1e-9)
    assert torch.autograd.grad(alone.sum(), z_t)[0].abs().max() > 0


def test_a_trainers_autocast_does_not_reach_inside(tiny_sd, tiny_sd_controlnet):
    prior = StableDiffusionPrior.from_pretrained(tiny_sd, controlnet=tiny_sd_controlnet)
    image, control, z, given = torch.rand(2, 32, 32, 3), torch.rand(2, 3, 32, 32), latents().float(), random_conditioning(2, family="sd")

    def results():
        return prior.encode(image), prior.decode(z), prior.predict_noise(z, T, given, control).cond

    outside = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    assert all(torch.equal(a, b) for a, b in zip(outside, inside))


# ------------------------------------------------------------------------------------------------------------------ misuse


@pytest.mark.parametrize(
    "chosen, given, guidance",
    [
        (StableDiffusionPrior, "sdxl", "pgc-sdxl-guidance"),
        (StableDiffusionPrior, "sd3", "pgc-sd3-guidance"),
        (SDXLPrior, "sd", "pgc-stable-diffusion-guidance"),
        (SDXLPrior, "sd3", "pgc-sd3-guidance"),
        (StableDiffusion3Prior, "sd", "pgc-stable-diffusion-guidance"),
        (StableDiffusion3Prior, "sdxl", "pgc-sdxl-guidance"),
    ],
)
def test_a_folder_of_another_family_is_refused_and_says_what_to_use(tiny_sd, tiny_sdxl, tmp_path, chosen, given, guidance):
    folder = {"sd": tiny_sd, "sdxl": tiny_sdxl}.get(given) or build_tiny_sd3(tmp_path / "sd3", t5=False)
    with pytest.raises(PriorError, match=f"pretrained_model_name_or_path: .* wanted a {chosen.WHAT}; for this model use {guidance}"):
        chosen.from_pretrained(folder)


def test_a_u_net_of_another_family_is_refused(tiny_sdxl):
    with pytest.raises(PriorError, match="addition_embed_type is 'text_time', wanted none: this is no Stable Diffusion 1 or 2"):
        StableDiffusionPrior.from_config(
            {part: model_files.read_config(tiny_sdxl, where) for part, where in (("vae", VAE), ("unet", UNET))} | {"scheduler": {}}
        )


def test_controlnets_of_another_family_are_refused(tiny_sd, tiny_sdxl, tiny_controlnet, tiny_sd_controlnet):
    with pytest.raises(PriorError, match="controlnet_name_or_path: its cross_attention_dim is 24, the U-Net's is 8"):
        StableDiffusionPrior.from_pretrained(tiny_sd, controlnet=tiny_controlnet)
    with pytest.raises(PriorError, match="controlnet_name_or_path: its cross_attention_dim is 8, the U-Net's is 24"):
        SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_sd_controlnet)


def test_parts_of_the_architecture_alone(tiny_sd):
    configs = {"vae": model_files.read_config(tiny_sd, VAE), "unet": sd_unet_config(), "controlnet": sd_unet_config()}
    for name in ("sample_size", "out_channels", "up_block_types"):
        del configs["controlnet"][name]
    configs["scheduler"] = model_files.read_config(tiny_sd, model_files.SCHEDULER)
    prior = StableDiffusionPrior.from_config(configs)
    assert prior.device.type == "meta" and len(prior.controlnets) == 1


# --------------------------------------------------------------------------------------------------------------- moved ids


def test_an_id_that_moved_loads_the_copy_and_says_so(tiny_sd, hub_cache):
    hub_cache(tiny_sd, COPY)
    with pytest.warns(MovedModelWarning, match=f"'{GONE}' is gone from the hub; '{COPY}', a copy, is used instead") as caught:
        assert StableDiffusionPrior.from_pretrained(GONE).latent_channels == 4
    assert len([warning for warning in caught if warning.category is MovedModelWarning]) == 1


def test_an_id_that_moved_but_is_cached_loads_in_silence(tiny_sd, hub_cache):
    hub_cache(tiny_sd, GONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MovedModelWarning)
        assert StableDiffusionPrior.from_pretrained(GONE).latent_channels == 4


def test_an_id_that_moved_and_cannot_be_had_names_the_copy(hub_cache):
    with pytest.warns(MovedModelWarning), pytest.raises(PriorError, match=f"'{COPY}' is neither a local folder nor in the hub cache"):
        StableDiffusionPrior.from_pretrained(GONE)


# ------------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("part, name", [(UNET, "unet"), (VAE, "vae")])
def test_parameters_are_counted_without_loading_them(tiny_sd, part, name):
    net = getattr(StableDiffusionPrior.from_pretrained(tiny_sd), name)
    found = stored_parameters(tiny_sd / part.subfolder, [f"{part.stem}.safetensors"])
    assert found == sum(parameter.numel() for parameter in net.parameters())


def test_weights_that_do_not_fit_into_memory_are_refused_before_loading(tiny_sd, monkeypatch):
    needed = 4 * sum(stored_parameters(tiny_sd / part.subfolder, [f"{part.stem}.safetensors"]) for part in (UNET, VAE))
    monkeypatch.setattr(model_files, "_free_memory", lambda _: needed)
    StableDiffusionPrior.from_pretrained(tiny_sd)
    monkeypatch.setattr(model_files, "_free_memory", lambda _: needed - 1)
    StableDiffusionPrior.from_pretrained(tiny_sd, dtype="bf16")
    message = "weights of VAE, denoising network and ControlNets take 0.0 GiB on cpu, where 0.0 GiB are free; dtype=bf16 halves it"
    with pytest.raises(PriorError, match=message):
        StableDiffusionPrior.from_pretrained(tiny_sd)


def test_the_tiny_folder_samples_with_plain_diffusers(tiny_sd):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red vase", height=32, width=32, num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
