"""What the guidance relies on, for every kind of prior: the same latent gradient, pulled back the same way, whatever the network."""

import pytest
import torch

from tests.diffusion.tiny import random_conditioning
from threestudio_pgc.diffusion.distillation import distill
from threestudio_pgc.diffusion.families import PRIORS, load_prior
from threestudio_pgc.diffusion.methods import METHODS, Views, make_method
from threestudio_pgc.diffusion.model_files import FAMILIES
from threestudio_pgc.diffusion.prior import Conditioning, LatentPrior
from threestudio_pgc.pixelgrad import clip_norm, none, pixel_norm

KINDS = ["sd", "sd-v", "sd-control", "sdxl", "sdxl-control", "zero123", "sd3", "flux"]
T = torch.tensor([30, 480, 200, 330])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def make(kind, tiny_models):
    """make(**options) -> a fresh prior, loaded from its folder by the door users go through."""
    name = kind.removesuffix("-control")
    folder, controlnet = tiny_models[name]
    size = {"image_size": 32} if name == "flux" else {}  # whose configuration names none
    return lambda **options: load_prior(folder, controlnet=controlnet if kind.endswith("-control") else None, **size, **options)


def conditioning(kind, prior, batch):
    if kind != "zero123":
        return random_conditioning(batch, family=kind.split("-")[0])
    generator = torch.Generator().manual_seed(3)
    width = prior.unet.config.cross_attention_dim
    cond = torch.randn(batch, 1, width, generator=generator)
    size = prior.latent_size
    return Conditioning(cond, torch.zeros_like(cond), reference=torch.randn(batch, prior.latent_channels, size, size, generator=generator))


def step(kind, prior, batch=4, dtype=torch.float64):
    """Image, conditioning and the other arguments of `distill`; fewer views are the first of four."""
    generator = torch.Generator().manual_seed(4)
    size = prior.image_size
    image = torch.rand(4, size, size, 3, generator=generator).to(dtype)[:batch]
    noise = torch.randn(4, prior.latent_channels, prior.latent_size, prior.latent_size, generator=generator).to(dtype)[:batch]
    control = torch.rand(4, size, size, 3, generator=generator).to(dtype)[:batch] if prior.controlnets else None
    given = conditioning(kind, prior, 4)
    first = Conditioning(**{name: None if value is None else value[:batch] for name, value in vars(given).items()})
    return image, first, {"timesteps": T[:batch], "noise": noise, "control": control, "guidance_scale": 7.0}


def test_every_family_is_tested():
    assert {kind.split("-")[0] for kind in KINDS} == set(PRIORS) == set(FAMILIES)


def test_it_is_a_latent_prior_of_its_family(kind, make):
    prior = make()
    assert isinstance(prior, LatentPrior) and type(prior) is PRIORS[kind.split("-")[0]]
    assert not any(parameter.requires_grad for net in prior.networks().values() for parameter in net.parameters())


def test_noise_and_clean_latents_come_back_from_the_noisy_ones(kind, make):
    prior = make().to(dtype=torch.float64)
    _, _, options = step(kind, prior)
    level, z = prior.noise_level(T), options["noise"].flip(0)
    noisy = level.add_noise(z, options["noise"])
    torch.testing.assert_close(level.clean(noisy, options["noise"]), z, rtol=1e-9, atol=1e-9)
    assert (level.sigma[1] > level.sigma[3]).all() and (level.sigma[3] > level.sigma[2]).all() and (level.sigma[2] > level.sigma[0]).all()
    flow = kind in ("sd3", "flux")
    torch.testing.assert_close(level.alpha + level.sigma if flow else level.alpha**2 + level.sigma**2, torch.ones_like(level.alpha))


def test_a_second_prior_shares_every_network_and_gives_the_same_gradient(kind, make):
    first, alone = make(), make()
    second = make(sharing=first)
    assert all(second.networks()[name] is network for name, network in first.networks().items())
    assert not any(alone.networks()[name] is network for name, network in first.networks().items())
    image, given, options = step(kind, first, batch=2, dtype=torch.float32)
    raw = [distill(image, prior, given, rule=none, threshold=1.0, **options).raw for prior in (second, alone)]
    assert torch.equal(*raw) and raw[0].abs().max() > 0


def test_another_network_than_the_pipelines_own(kind, make, tmp_path):
    """Saved as a fine-tune is: in a folder of its own."""
    first, tuned = make(), make()
    with torch.no_grad():
        for parameter in tuned.network.parameters():
            parameter *= 1.1
    tuned.network.save_pretrained(tmp_path / "tuned")
    second = make(unet=tmp_path / "tuned", sharing=first)
    assert [name for name, network in first.networks().items() if second.networks()[name] is not network] == [first.NETWORK]
    image, given, options = step(kind, first, batch=2, dtype=torch.float32)
    found, expected, other = (distill(image, prior, given, rule=none, threshold=1.0, **options).raw for prior in (second, tuned, first))
    assert torch.equal(found, expected) and not torch.equal(found, other)


def test_the_unconditional_prediction_alone_is_the_same(kind, make):
    prior = make().to(dtype=torch.float64)
    image, given, options = step(kind, prior, batch=2)
    views = Views(prior, image, prior.encode(image), options["noise"], T[:2], given, options["control"])
    alone, both = views.predict_unconditional(views.noisy(), T[:2]), views.predict(views.noisy(), T[:2])
    torch.testing.assert_close(alone, both.uncond, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(alone, both.cond)


def test_the_raw_gradient_is_end_to_end_autograd_of_the_plain_formula(kind, make):
    prior = make().to(dtype=torch.float64)
    image, given, options = step(kind, prior, batch=2)
    found = distill(image, prior, given, rule=none, threshold=1.0, **options)

    leaf = image.clone().requires_grad_()
    latents, level = prior.encode(leaf), prior.noise_level(T[:2])
    with torch.no_grad():
        predicted = prior.predict_noise(level.alpha * latents + level.sigma * options["noise"], T[:2], given, options["control"])
        guided = predicted.cond + 7.0 * (predicted.cond - predicted.uncond)
        gradient = level.sigma**2 * (guided - options["noise"])
    (latents * gradient).sum().backward()
    assert (found.raw - leaf.grad).norm() < 1e-9 * leaf.grad.norm() and leaf.grad.norm() > 0


def test_micro_batches_equal_the_full_batch(kind, make):
    prior = make().to(dtype=torch.float64)
    image, given, options = step(kind, prior)
    whole = distill(image, prior, given, rule=none, threshold=1.0, views_per_pullback=4, **options).raw
    for views in (1, 3):
        parts = distill(image, prior, given, rule=none, threshold=1.0, views_per_pullback=views, **options).raw
        assert (parts - whole).norm() < 1e-6 * whole.norm()


def test_the_threshold_means_the_same_for_one_view_and_for_four(kind, make):
    prior = make().to(dtype=torch.float64)
    image, given, options = step(kind, prior)
    raw = distill(image, prior, given, rule=none, threshold=1.0, **options).raw
    c = float(pixel_norm(raw).median())
    four = distill(image, prior, given, rule=clip_norm, threshold=c, **options).regulated
    image, given, options = step(kind, prior, batch=1)
    one = distill(image, prior, given, rule=clip_norm, threshold=c, **options).regulated
    assert pixel_norm(four).max() <= c * (1 + 1e-9) and (pixel_norm(raw) > c).any()
    assert (one[0] - four[0]).norm() < 1e-6 * four[0].norm()


def test_a_surrounding_autocast_changes_nothing(kind, make):
    prior = make()
    image, given, options = step(kind, prior, batch=2, dtype=torch.float32)
    outside = distill(image, prior, given, rule=clip_norm, threshold=0.1, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distill(image, prior, given, rule=clip_norm, threshold=0.1, **options)
    assert torch.equal(inside.regulated, outside.regulated) and inside.regulated.dtype == torch.float32


def test_half_precision_gives_about_the_same_gradient(kind, make):
    full, half = make(), make(dtype="bf16", vae_dtype="fp32")
    image, given, options = step(kind, full, batch=2, dtype=torch.float32)
    raw = [distill(image, prior, given, rule=none, threshold=1.0, **options).raw for prior in (full, half)]
    assert raw[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(raw[0].flatten(), raw[1].flatten(), dim=0) > 0.98


def with_negative(given):
    """A negative prompt beside the empty one."""
    pooled = None if given.pooled_uncond is None else given.pooled_uncond.flip(0)[None]
    return Conditioning(**(vars(given) | {"negatives": given.uncond.flip(0)[None], "pooled_negatives": pooled}))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_on_it(kind, make, method):
    """Any method on any prior, with the rule on: finite, not nothing, and inside the threshold."""
    prior, method = make(), make_method(method)
    method.prepare(prior)
    image, given, options = step(kind, prior, batch=2, dtype=torch.float32)
    if method.separate_negative:
        given = with_negative(given)
    options |= {"camera": torch.eye(4).expand(2, 4, 4), "generator": torch.Generator().manual_seed(0)}
    found = distill(image, prior, given, rule=clip_norm, threshold=1e-3, method=method, **options)
    assert torch.isfinite(found.raw).all() and found.raw.abs().max() > 0
    assert pixel_norm(found.regulated).max() <= 1e-3 * (1 + 1e-5)


def test_its_adapter_starts_as_a_no_op_and_learns(kind, make):
    prior, method = make(), make_method("vsd", {"lora_lr": 0.01})
    image, given, options = step(kind, prior, batch=2, dtype=torch.float32)
    options |= {"camera": torch.eye(4).expand(2, 4, 4), "rule": none, "threshold": 1.0}
    z_t = prior.noise_level(T[:2]).add_noise(options["noise"].flip(0), options["noise"])
    before = prior.predict_conditional(z_t, T[:2], given, options["control"])
    method.prepare(prior)
    camera = torch.eye(4).flatten().expand(2, 16)
    assert torch.equal(method._training.predict(z_t, T[:2], given, options["control"], camera), before)
    for number in range(3):
        distill(image, prior, given, method=method, generator=torch.Generator().manual_seed(number), **options)
    assert not torch.equal(method._training.predict(z_t, T[:2], given, options["control"], camera), before)
    assert torch.equal(prior.predict_conditional(z_t, T[:2], given, options["control"]), before)
