"""Two priors, one copy of the networks they have in common."""

import shutil

import pytest
import torch

from tests.diffusion.tiny import build_tiny_controlnet, random_conditioning
from threestudio_pgc.diffusion import model_files
from threestudio_pgc.diffusion.adapter import AdapterTraining
from threestudio_pgc.diffusion.model_files import read_config, stored_parameters
from threestudio_pgc.diffusion.prior import PriorError
from threestudio_pgc.diffusion.sdxl import SDXLPrior

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def first(tiny_sdxl, tiny_controlnet):
    return SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet)


def shared(prior, other):
    """Names of the networks that two priors have in common."""
    networks = list(other.networks().values())
    return [name for name, network in prior.networks().items() if any(network is found for found in networks)]


def test_a_prior_that_was_not_loaded_has_nothing_to_share(tiny_sdxl):
    parts = {"unet": model_files.UNET, "vae": model_files.VAE, "scheduler": model_files.SCHEDULER}
    built = SDXLPrior.from_config({name: read_config(tiny_sdxl, part) for name, part in parts.items()}, device="cpu")
    assert shared(SDXLPrior.from_pretrained(tiny_sdxl, sharing=built), built) == []


def test_shared_networks_are_not_read_again(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    first = SDXLPrior.from_pretrained(folder)
    for part in ("unet", "vae"):
        path = folder / part / WEIGHTS
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PriorError, match="cannot be loaded"):
        SDXLPrior.from_pretrained(folder)
    assert shared(SDXLPrior.from_pretrained(folder, sharing=first), first) == ["VAE", "U-Net"]


def test_shared_networks_need_no_second_memory(tiny_sdxl, tiny_controlnet, monkeypatch):
    first = SDXLPrior.from_pretrained(tiny_sdxl)
    needed = 4 * stored_parameters(tiny_controlnet, [WEIGHTS])
    monkeypatch.setattr(model_files, "_free_memory", lambda _: needed)
    SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet, sharing=first)
    monkeypatch.setattr(model_files, "_free_memory", lambda _: needed - 1)
    with pytest.raises(PriorError, match="weights of VAE, denoising network and ControlNets take"):
        SDXLPrior.from_pretrained(tiny_sdxl, controlnet=tiny_controlnet, sharing=first)


def test_controlnets_may_differ(first, tiny_sdxl, tiny_controlnet, tmp_path):
    other = build_tiny_controlnet(tmp_path / "other", seed=2)
    for controls, expected in (
        ([], []),
        ([tiny_controlnet], ["ControlNet 1"]),
        ([other], []),
        ([other, tiny_controlnet], ["ControlNet 2"]),
    ):
        prior = SDXLPrior.from_pretrained(tiny_sdxl, controlnet=controls, control_scale=0.5, sharing=first)
        assert shared(prior, first) == ["VAE", "U-Net", *expected]
        assert prior.control_scales == [0.5] * len(controls) and first.control_scales == [1.0]


def test_another_unet_or_vae_leaves_the_rest_shared(first, tiny_sdxl, tiny_controlnet, tmp_path):
    unet, vae = (shutil.copytree(tiny_sdxl / part, tmp_path / part) for part in ("unet", "vae"))
    prior = SDXLPrior.from_pretrained(tiny_sdxl, unet=unet, controlnet=tiny_controlnet, sharing=first)
    assert shared(prior, first) == ["VAE", "ControlNet 1"]
    assert shared(SDXLPrior.from_pretrained(tiny_sdxl, vae=vae, sharing=first), first) == ["U-Net"]
    assert shared(SDXLPrior.from_pretrained(tiny_sdxl, unet=unet, sharing=prior), prior) == ["VAE", "U-Net"]


@pytest.mark.parametrize(
    "options", [{"dtype": "bf16"}, {"attention": "sliced"}, {"channels_last": True}, {"encoder_checkpointing": True}], ids=str
)
def test_networks_that_are_to_be_treated_otherwise_are_loaded(first, tiny_sdxl, options):
    other = SDXLPrior.from_pretrained(tiny_sdxl, **options, sharing=first)
    assert shared(other, first) == []
    assert shared(SDXLPrior.from_pretrained(tiny_sdxl, **options, sharing=other), other) == ["VAE", "U-Net"]


def test_a_prior_of_another_precision_shares_what_has_the_same(first, tiny_sdxl):
    assert shared(SDXLPrior.from_pretrained(tiny_sdxl, dtype="bf16", vae_dtype="fp32", sharing=first), first) == ["VAE"]
    cast = SDXLPrior.from_pretrained(tiny_sdxl).to(dtype=torch.float64)
    assert shared(SDXLPrior.from_pretrained(tiny_sdxl, sharing=cast), cast) == []


def test_another_image_size_is_the_priors_own(first, tiny_sdxl):
    larger = SDXLPrior.from_pretrained(tiny_sdxl, image_size=64, sharing=first)
    assert shared(larger, first) == ["VAE", "U-Net"] and (larger.latent_size, first.latent_size) == (16, 8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_adapters_on_one_network_train_as_on_two(tiny_sdxl, checkpointing):
    """Each one's hooks act while it is active; the other's then do nothing."""
    first, alone = SDXLPrior.from_pretrained(tiny_sdxl), SDXLPrior.from_pretrained(tiny_sdxl)
    second = SDXLPrior.from_pretrained(tiny_sdxl, sharing=first)
    arguments = torch.randn(2, 4, 8, 8), torch.tensor([100, 700]), random_conditioning(2)
    untouched = first.predict_conditional(*arguments)

    def train(*trainings):
        for number in range(3):
            for seed, training in trainings:
                generator = torch.Generator().manual_seed(10 * number + seed)
                training.step(arguments[0] + seed, arguments[2], None, torch.ones(2, 16) * seed, generator)

    options = {"learning_rate": 1e-2, "checkpointing": checkpointing}
    one, two = AdapterTraining(first, **options), AdapterTraining(second, rank=2, learning_rate=1e-2)
    train((0, one), (1, two))
    expected = AdapterTraining(alone, rank=2, learning_rate=1e-2)
    train((1, expected))
    camera = torch.ones(2, 16)
    found = two.predict(*arguments, None, camera)
    assert torch.equal(found, expected.predict(*arguments, None, camera))
    assert not torch.equal(found, one.predict(*arguments, None, camera)) and not torch.equal(found, untouched)
    one.adapter.remove()
    assert torch.equal(two.predict(*arguments, None, camera), found) and torch.equal(first.predict_conditional(*arguments), untouched)
