"""Each method against its predictions asked for and combined by hand, on a real (tiny) SDXL in float64."""

import pytest
import torch

from tests.diffusion.tiny import MAX_LENGTH, random_conditioning
from threestudio_pgc.diffusion import objectives
from threestudio_pgc.diffusion.distillation import distill
from threestudio_pgc.diffusion.methods import METHODS, VSD, Views, make_method
from threestudio_pgc.diffusion.sdxl import SDXLPrior
from threestudio_pgc.pixelgrad import clip_norm, none

T = torch.tensor([60, 640])


@pytest.fixture
def prior(tiny_sdxl):
    return SDXLPrior.from_pretrained(tiny_sdxl).to(dtype=torch.float64)


def conditioning(negatives=0):
    given = random_conditioning(2)
    if negatives:
        generator = torch.Generator().manual_seed(8)
        given.negatives = torch.randn(negatives, 2, MAX_LENGTH, 24, generator=generator)
        given.pooled_negatives = torch.randn(negatives, 2, 12, generator=generator)
    return given


def views(prior, negatives=0, **changes):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 32, 32, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        latents = prior.encode(image)
    step = {"guidance_scale": 7.5, "cfg": "diffusers", "weighting": "sds", "generator": torch.Generator().manual_seed(2)}
    return Views(prior, image, latents, noise, T, conditioning(negatives), **(step | changes))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def shares(prior, t):
    abar = prior.alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def predictions(prior, v, z_t, t):
    """Each prompt asked for on its own."""
    given = v.conditioning
    plain = type(given)

    def ask(hidden, pooled):
        return prior.predict_conditional(z_t, t, plain(hidden, hidden, pooled, pooled))

    with torch.no_grad():
        found = [ask(given.cond, given.pooled_cond), ask(given.uncond, given.pooled_uncond)]
        return found + [ask(*pair) for pair in zip(given.negatives if given.negatives is not None else (), given.pooled_negatives or ())]


def test_all_of_the_issues_methods_are_there():
    assert list(METHODS) == ["sds", "csd", "nfsd", "ssd", "ism", "sdi", "bgt", "vsd"]


@pytest.mark.parametrize("cfg", ["authors", "diffusers"])
def test_sds(prior, cfg):
    v = views(prior, cfg=cfg)
    alpha, sigma = shares(prior, T)
    cond, uncond = predictions(prior, v, alpha * v.latents + sigma * v.noise, T)
    guided = {"authors": cond, "diffusers": uncond}[cfg] + 7.5 * (cond - uncond)
    close(make_method("sds")(v).latent, sigma**2 * (guided - v.noise))


def test_csd_and_its_negative_prompt(prior):
    v = views(prior, weighting="uniform")
    alpha, sigma = shares(prior, T)
    cond, uncond = predictions(prior, v, v.noisy(), T)
    close(make_method("csd")(v).latent, cond - uncond)
    v = views(prior, weighting="uniform")
    v.conditioning.negatives, v.conditioning.pooled_negatives = v.conditioning.cond[None].flip(1), v.conditioning.pooled_cond[None].flip(1)
    swapped = type(v.conditioning)(
        *(x.flip(0) for x in (v.conditioning.cond, v.conditioning.uncond, v.conditioning.pooled_cond, v.conditioning.pooled_uncond))
    )
    negative = prior.predict_conditional(v.noisy(), T, swapped)
    method = make_method("csd", {"negative_scale": 0.5})
    assert method.separate_negative and not make_method("csd").separate_negative
    close(method(v).latent, cond - uncond - 0.5 * (negative - uncond))


def test_nfsd_changes_at_its_boundary(prior):
    v = views(prior, negatives=1, weighting="uniform")
    prediction = v.predict(v.noisy(), T)
    found = make_method("nfsd")(v).latent  # t = 60 lies below 0.2 T, 640 above
    close(found[0], prediction.uncond[0] + 7.5 * (prediction.cond - prediction.uncond)[0])
    close(found[1], (prediction.uncond - prediction.negatives[0])[1] + 7.5 * (prediction.cond - prediction.uncond)[1])


def test_ssd_changes_at_its_boundary(prior):
    v = views(prior, weighting="uniform")
    prediction = v.predict(v.noisy(), T)
    found, difference = make_method("ssd")(v).latent, prediction.cond - prediction.uncond
    close(found[1], difference[1])
    close(found[0].norm(), difference[0].norm())
    assert abs((found[0] * v.noise[0]).sum()) < 1e-9 * found[0].norm() * v.noise[0].norm()


def test_ism_compares_two_points_of_one_inversion(prior):
    v = views(prior, weighting="uniform")
    s = (T - 50).clamp_min(0)
    a_s, s_s = shares(prior, s)
    a_t, s_t = shares(prior, T)
    zero = torch.zeros_like(T)
    first = prior.predict_noise(v.latents, zero, v.conditioning).uncond
    x_s = a_s * v.latents + s_s * first
    at_s = prior.predict_noise(x_s, s, v.conditioning).uncond
    x_t = a_t * (x_s - s_s * at_s) / a_s + s_t * at_s
    at_t = prior.predict_noise(x_t, T, v.conditioning)
    expected = at_t.uncond + 7.5 * (at_t.cond - at_t.uncond) - at_s
    close(make_method("ism", {"inversion_steps": 1})(v).latent, expected)
    assert not torch.allclose(make_method("ism", {"inversion_steps": 3})(v).latent, expected)


def test_sdi_is_sds_with_inverted_noise(prior):
    v = views(prior)
    a, s = shares(prior, T)
    at_0 = prior.predict_noise(v.latents, torch.zeros_like(T), v.conditioning)
    kappa = at_0.uncond - 7.5 * (at_0.cond - at_0.uncond)  # one step from the clean latents puts its own prediction in
    at_t = prior.predict_noise(a * v.latents + s * kappa, T, v.conditioning)
    expected = s**2 * (at_t.uncond + 7.5 * (at_t.cond - at_t.uncond) - kappa)
    close(make_method("sdi", {"inversion_steps": 1})(v).latent, expected)


def test_bgt_in_one_step_without_its_image_is_sds_times_two_sigma_over_alpha(prior):
    v = views(prior, weighting="uniform")
    v = Views(**(vars(v) | {"timesteps": torch.tensor([30, 250])}))  # at most a quarter of the schedule: one solver step
    alpha, sigma = shares(prior, v.timesteps)
    close(make_method("bgt", {"lambda_rgb": 0.0})(v).latent, 2 * sigma / alpha * make_method("sds")(v).latent)
    assert make_method("bgt", {"lambda_rgb": 0.0})(v).image is None


def test_bgts_image_gradient_is_autograd_of_its_loss(prior):
    """With three solver steps for the second view, and a picture that is not of the prior's size."""
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(2, 24, 24, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    v = views(prior, weighting="uniform")
    v = Views(**(vars(v) | {"image": image.detach()}))
    found = make_method("bgt", {"lambda_rgb": 0.3})(v)

    def guided(z, t):
        prediction = prior.predict_noise(z, t, v.conditioning)
        return prediction.uncond + 7.5 * (prediction.cond - prediction.uncond)

    z, steps = v.noisy(), [torch.tensor([60, 640]), torch.tensor([60, 427]), torch.tensor([60, 213])]
    for now, then in zip(steps, steps[1:]):
        eps, (a, s), (a2, s2) = guided(z, now), shares(prior, now), shares(prior, then)
        z = a2 * (z - s * eps) / a + s2 * eps
    a, s = shares(prior, steps[-1])
    clean = (z - s * guided(z, steps[-1])) / a
    close(found.latent, 2 * (v.latents - clean))
    loss = 0.3 * (prior.resize(image) - prior.decode(clean)).square().sum()
    close(found.image, torch.autograd.grad(loss, image)[0])


def test_bgts_image_gradient_reaches_the_pixels_beside_the_pulled_back_one(prior):
    v = views(prior)
    step = {"timesteps": T, "noise": v.noise, "rule": none, "threshold": 1.0}
    both = distill(v.image, prior, v.conditioning, method=make_method("bgt"), **step)
    latent_only = distill(v.image, prior, v.conditioning, method=make_method("bgt", {"lambda_rgb": 0.0}), **step)
    expected = make_method("bgt")(views(prior, guidance_scale=100.0, cfg="authors")).image
    close(both.raw - latent_only.raw, expected)
    regulated = distill(
        v.image, prior, v.conditioning, method=make_method("bgt"), **(step | {"rule": clip_norm, "threshold": 0.01})
    ).regulated
    assert both.raw.norm(dim=-1).max() > 0.01 >= regulated.norm(dim=-1).max() * (1 - 1e-9)


def test_vsd_starts_at_the_guidance_alone_and_its_adapter_learns_the_views(prior):
    method = make_method("vsd", {"lora_lr": 0.01})
    method.prepare(prior)
    camera = torch.eye(4).expand(2, 4, 4)
    v = views(prior, camera=camera, weighting="uniform")
    cond, uncond = predictions(prior, v, v.noisy(), T)
    first = method(v)
    close(first.latent, uncond + 7.5 * (cond - uncond) - cond)  # an adapter that changes nothing predicts what the prompt does
    assert first.numbers["lora_error"] > 0
    second = method(v)
    assert not torch.allclose(second.latent, first.latent)
    torch.testing.assert_close(predictions(prior, v, v.noisy(), T)[0], cond, rtol=0, atol=0)  # the prior itself has not moved


def test_vsd_tells_its_adapter_the_camera(prior):
    method = VSD()
    method.prepare(prior)
    with torch.no_grad():
        method._training.adapter.camera_out.normal_(generator=torch.Generator().manual_seed(0))
    results = {}
    for name, camera in (("eye", torch.eye(4).expand(2, 4, 4)), ("other", -torch.eye(4).expand(2, 4, 4)), ("none", None)):
        state = {key: value.clone() for key, value in method._training.adapter.state_dict().items()}
        results[name] = method(views(prior, camera=camera)).latent
        method._training.adapter.load_state_dict(state)
    assert not torch.allclose(results["eye"], results["other"]) and not torch.allclose(results["eye"], results["none"])
    blind = VSD(camera=False)
    blind._training = method._training
    close(blind(views(prior, camera=torch.eye(4).expand(2, 4, 4))).latent, results["none"])


@pytest.mark.parametrize("name", METHODS)
def test_a_view_gets_the_same_alone_and_in_a_batch(prior, name):
    """Whatever a method asks the prior for, one view's gradient is its own. Micro-batched equals full batch."""
    method = make_method(name)
    method.prepare(prior)
    both = views(prior, negatives=1 if method.separate_negative else 0)
    given = both.conditioning
    first = type(given)(
        given.cond[:1],
        given.uncond[:1],
        given.pooled_cond[:1],
        given.pooled_uncond[:1],
        negatives=None if given.negatives is None else given.negatives[:, :1],
        pooled_negatives=None if given.pooled_negatives is None else given.pooled_negatives[:, :1],
    )
    whole = method(both)
    again = make_method(name)
    again.prepare(prior)
    one = again(Views(prior, both.image[:1], both.latents[:1], both.noise[:1], T[:1], first, guidance_scale=7.5, cfg="diffusers"))
    torch.testing.assert_close(one.latent[0], whole.latent[0], rtol=1e-6, atol=1e-9)
    if whole.image is not None:
        torch.testing.assert_close(one.image[0], whole.image[0], rtol=1e-6, atol=1e-9)


def test_perpendicular_negatives_reach_every_guided_method(prior):
    for name in ("sds", "ism", "sdi", "bgt", "vsd"):
        method = make_method(name)
        assert method.perpendicular
        results = []
        for weight in (0.0, 1.0):
            method.prepare(prior)
            v = views(prior, negatives=2)
            v.conditioning.negative_weights = torch.full((2, 2), weight)
            results.append(method(v).latent)
        assert not torch.allclose(*results), name
    assert not any(make_method(name).perpendicular for name in ("csd", "nfsd", "ssd"))


def test_published_guidance_scales():
    expected = {"sds": (100.0, "authors"), "nfsd": (7.5, "diffusers"), "ism": (7.5, "diffusers"), "sdi": (7.5, "diffusers")}
    expected |= {"vsd": (7.5, "diffusers"), "bgt": (100.0, "authors"), "csd": (None, "authors"), "ssd": (None, "authors")}
    assert {name: (method.guidance_scale, method.cfg) for name, method in METHODS.items()} == expected
    assert set(objectives.CFG_FORMS) == {"authors", "diffusers"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("csdd", {}, "objective: found 'csdd'.*did you mean 'csd'"),
        ("sds", {"lambda_rgb": 1.0}, "objective_options.lambda_rgb: sds has no such option; wanted nothing"),
        ("vsd", {"rank": 4}, "objective_options.rank: vsd has no such option; wanted one of lora_rank"),
        ("vsd", {"lora_rank": 0}, "lora_rank: found 0"),
        ("vsd", {"lora_rank": 2.5}, "lora_rank: found 2.5"),
        ("vsd", {"lora_lr": 0}, "lora_lr: found 0"),
        ("vsd", {"camera": 1}, "camera: found 1, wanted a value like True"),
        ("nfsd", {"boundary": 200}, "boundary: found 200"),
        ("ism", {"interval": "wide"}, "interval: found 'wide'"),
    ],
)
def test_unknown_methods_and_options_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, options)
