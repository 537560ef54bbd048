import pytest
import torch

from tests.diffusion.tiny import T5_LENGTH, build_tiny_flux, random_conditioning
from threestudio_pgc.diffusion.flux import FluxPrior, pack, patch_positions, unpack
from threestudio_pgc.diffusion.prior import PriorError
from threestudio_pgc.diffusion.prompts import encode_prompts

T = torch.tensor([20, 500])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("flux") / "m")


@pytest.fixture(scope="module")
def prior(folder):
    return FluxPrior.from_pretrained(folder, image_size=32).to(dtype=torch.float64)


def latents(batch=2):
    return torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_no_latents_make_no_patches():
    assert pack(torch.zeros(0, 16, 8, 8)).shape == (0, 16, 64) and unpack(torch.zeros(0, 16, 64), 8).shape == (0, 16, 8, 8)


def test_patches_are_the_pipelines():
    from diffusers import FluxPipeline

    z = latents()
    assert torch.equal(pack(z), FluxPipeline._pack_latents(z, 2, 16, 8, 8))
    assert torch.equal(unpack(pack(z), 8), z)
    assert torch.equal(patch_positions(4, "cpu"), FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32))


def test_the_prediction_is_the_transformers_velocity_turned_into_noise(prior):
    given, z_t = random_conditioning(2, family="flux"), latents()
    found = prior.predict_noise(z_t, T, given)
    sigma = (T.double() + 1) / 1000
    for half, hidden, pooled in (("cond", given.cond, given.pooled_cond), ("uncond", given.uncond, given.pooled_uncond)):
        with torch.no_grad():
            velocity = prior.transformer(
                pack(z_t),
                encoder_hidden_states=hidden.double(),
                pooled_projections=pooled.double(),
                timestep=sigma,
                img_ids=patch_positions(4, "cpu"),
                txt_ids=torch.zeros(T5_LENGTH, 3),
                guidance=torch.ones(2, dtype=torch.float64),
                return_dict=False,
            )[0]
        expected = z_t + (1 - sigma).view(-1, 1, 1, 1) * unpack(velocity, 8)
        torch.testing.assert_close(getattr(found, half), expected, rtol=1e-9, atol=1e-10)


def test_the_embedded_guidance_is_an_input(prior):
    arguments = latents(), T, random_conditioning(2, family="flux")
    plain = prior.predict_noise(*arguments).cond
    prior.embedded_guidance = 3.5
    try:
        assert not torch.allclose(prior.predict_noise(*arguments).cond, plain)
    finally:
        del prior.embedded_guidance
    assert torch.equal(prior.predict_noise(*arguments).cond, plain)


def test_a_model_without_that_input_is_a_distilled_one(tmp_path):
    folder = build_tiny_flux(tmp_path / "m", guidance_embeds=False)
    prior = FluxPrior.from_pretrained(folder, image_size=32)
    assert "schnell" in prior.guidance_distilled
    assert torch.isfinite(prior.predict_noise(latents().float(), T, random_conditioning(2, family="flux")).cond).all()
    assert FluxPrior.from_pretrained(build_tiny_flux(tmp_path / "n"), image_size=32).guidance_distilled is None


def test_prompts_are_encoded_as_the_pipeline_does(folder, tmp_path):
    from diffusers import FluxPipeline

    encoded = encode_prompts(folder, ["a zebra vase", ""], cache_dir=tmp_path)
    pipeline = FluxPipeline.from_pretrained(folder)
    for prompt, item in encoded.items():
        with torch.no_grad():
            hidden, pooled, _ = pipeline.encode_prompt(prompt, prompt, device="cpu", max_sequence_length=T5_LENGTH)
        torch.testing.assert_close(item.embedding, hidden[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(item.pooled, pooled[0], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(prior, folder, tiny_sdxl):
    with pytest.raises(PriorError, match="image_size: found 36, wanted a multiple of 8 pixels"):
        FluxPrior.from_pretrained(folder, image_size=36)
    with pytest.raises(PriorError, match="controlnet_name_or_path.*FluxControlNetModel"):
        FluxPrior.from_pretrained(folder, controlnet="some/net")
    with pytest.raises(PriorError, match="wanted a FluxPipeline; for this model use pgc-sdxl-guidance"):
        FluxPrior.from_pretrained(tiny_sdxl)
    with pytest.raises(ValueError, match="FLUX needs the pooled embeddings"):
        prior.predict_noise(latents(), T, random_conditioning(2, family="sd"))
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    from tests.diffusion.tiny import flux_config, vae_config

    with pytest.raises(PriorError, match="8 latent channels, the transformer takes 64 numbers per patch"):
        FluxPrior(AutoencoderKL(**vae_config(8)), FluxTransformer2DModel(**flux_config()), {}, image_size=32)
