"""Objective x prior x pullback x rule from the configuration: what makes sense is reachable, what does not is refused with a reason."""

import json
import shutil

import pytest
import torch

from threestudio_pgc.host import find
from threestudio_pgc.modules.guidance import SDXLGuidance, StableDiffusionGuidance
from threestudio_pgc.modules.prompt_processor import PromptProcessor
from threestudio_pgc.modules.zero123_guidance import Zero123Guidance
from threestudio_pgc.pixelgrad import pixel_norm

SIZE = 32
TYPES = {
    "sd": "pgc-stable-diffusion-guidance",
    "sdxl": "pgc-sdxl-guidance",
    "sd3": "pgc-sd3-guidance",
    "flux": "pgc-flux-guidance",
    "zero123": "pgc-zero123-guidance",
}


@pytest.fixture(scope="module")
def build(tiny_models, disc):
    """build(family, **config) -> guidance with the tiny model of a family."""

    def make(family="sdxl", **config):
        own = {"zero123": {"cond_image_path": str(disc), "cond_camera_distance": 2.9}, "flux": {"image_size": 32}}.get(family, {})
        return find(TYPES[family])({"pretrained_model_name_or_path": str(tiny_models[family][0]), **own, **config})

    return make


@pytest.fixture(scope="module")
def prompts(tiny_models, tmp_path_factory):
    def make(family="sdxl", **config):
        folder = tmp_path_factory.mktemp("prompts")
        model = {"pretrained_model_name_or_path": str(tiny_models[family][0]), "cache_dir": str(folder)}
        return [] if family == "zero123" else [PromptProcessor({"prompt": "a zebra vase", **model, **config})()]

    return make


def batch(size=2, seed=0):
    """A rendered image that wants a gradient, and the rest of a batch with a slab in the middle of each view."""
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(size, SIZE, SIZE, 3, generator=generator).requires_grad_()
    opacity = torch.zeros(size, SIZE, SIZE, 1)
    opacity[:, 8:24, 8:24] = 1
    normal = torch.nn.functional.normalize(torch.tensor([0.6, 0.0, 0.8]), dim=0) * opacity
    return rgb, {
        "elevation": torch.linspace(0, 40, size),
        "azimuth": torch.linspace(10, 130, size),
        "camera_distances": torch.full((size,), 2.6),
        "c2w": torch.eye(4).expand(size, 4, 4),
        "depth": opacity * torch.linspace(2, 3, SIZE).view(1, SIZE, 1, 1),  # nearer at the top
        "opacity": opacity,
        "view_normal": normal,
    }


@pytest.mark.parametrize("objective", ["sds", "csd", "nfsd", "ssd", "ism", "sdi", "bgt", "vsd"])
@pytest.mark.parametrize("family", TYPES)
def test_every_objective_on_every_prior_from_the_configuration(build, prompts, family, objective):
    if (family, objective) == ("zero123", "nfsd"):
        with pytest.raises(ValueError, match="objective: found 'nfsd'.*Zero123 takes none"):
            build(family, objective=objective)
        return
    guidance = build(family, objective=objective, pgc={"threshold": 1e-3})
    rgb, rest = batch()
    out = guidance(rgb, *prompts(family, negative_prompt="a red cup"), **rest)
    out["loss_sds"].backward()
    assert pixel_norm(rgb.grad).max() * 2 <= 1e-3 * (1 + 1e-5) and rgb.grad.abs().max() > 0
    assert all(isinstance(value, (int, float)) for name, value in out.items() if name != "loss_sds")


@pytest.mark.parametrize("pullback", ["vae", "linear", "none"])
@pytest.mark.parametrize("rule", ["clip-norm", "clip-value", "normalize", "none", "clip-global", "view-rms"])
def test_every_rule_with_every_pullback(build, prompts, pullback, rule):
    guidance = build(objective="csd", pgc={"rule": rule, "pullback": pullback})
    rgb, rest = batch()
    image = torch.randn(2, 8, 8, 4, requires_grad=True) if pullback == "none" else rgb
    guidance(image, *prompts(), **rest)["loss_sds"].backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().max() > 0


def test_a_picture_is_not_taken_for_latents(build, prompts):
    rgb, rest = batch()
    with pytest.raises(ValueError, match=r"pgc.pullback none: found an image of shape \(2, 32, 32, 3\), wanted latents \(2, 8, 8, 4\)"):
        build(pgc={"pullback": "none"})(rgb, *prompts(), **rest)
    with pytest.raises(ValueError, match="rgb_as_latents: found an image"):
        build()(rgb, *prompts(), **rest, rgb_as_latents=True)


@pytest.mark.parametrize("family", ["sd", "sd3", "zero123", "flux"])
def test_the_papers_linear_map_is_sdxls_alone(build, family):
    with pytest.raises(ValueError, match="pgc.linear_map: found None, wanted a file.*of SDXL's VAE"):
        build(family, pgc={"pullback": "linear"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"objective": "sdss"}, "objective: found 'sdss'.*did you mean 'sds'"),
        ({"objective": "vsd", "objective_options": {"rank": 2}}, "objective_options.rank: vsd has no such option"),
        ({"objective": "csd", "guidance_scale": 30.0}, "guidance_scale: found 30.0, wanted null: csd"),
        ({"objective": "ssd", "cfg": "authors"}, "cfg: found 'authors', wanted null: ssd"),
        ({"objective": "nfsd", "cfg": "authors"}, "cfg: found 'authors', wanted null: nfsd has its own form"),
        ({"objective": "csd", "guidance_rescale": 0.5}, "guidance_rescale: found 0.5, wanted 0"),
        ({"objective": "bgt", "pgc": {"pullback": "none"}}, "objective: found 'bgt'.*there is none"),
        ({"cfg": "vanilla"}, "cfg: found 'vanilla', wanted null or one of authors, diffusers"),
        ({"guidance_scale": "high"}, "guidance_scale: found 'high'"),
        ({"guidance_rescale": 2.0}, "guidance_rescale: found 2.0"),
        ({"weighting_strategy": "sigma"}, "weighting_strategy: found 'sigma', wanted one of sds"),
        ({"timestep_sampling": "annealed"}, "timestep_sampling: found 'annealed', wanted one of uniform"),
        ({"timestep_sampling": "dreamtime", "sqrt_anneal": True}, "sqrt_anneal: found True, wanted false"),
        ({"dtype": "fp16"}, "fp16 on a CPU is refused"),
        ({"dtype": "half"}, "dtype: found 'half'"),
        ({"controlnet_name_or_path": "some/net"}, "control_kind: found None.*'some/net' does not say"),
        (
            {"controlnet_name_or_path": "a-depth", "control_kind": "canny"},
            "system.guidance.control_kind: found 'canny', wanted one of depth, normal",
        ),
        ({"controlnet_name_or_path": ["a-depth", "b-normal"], "control_scale": [1.0]}, r"control_scale: found \[1.0\].*2 entries"),
        ({"controlnet_name_or_path": ["a-depth"], "control_kind": ["depth", "normal"]}, "control_kind.*1 entries"),
        (
            {"controlnet_name_or_path": "a-normal", "normal_convention": "directx"},
            "system.guidance.normal_convention: found 'directx', wanted null or one of opengl",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(build, config, message, monkeypatch):
    from threestudio_pgc.diffusion import vae_prior

    def refuse(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(vae_prior, "load_module", refuse)
    with pytest.raises(Exception, match=message):
        build(**config)


def test_a_model_of_another_family_is_refused_naming_its_guidance(tiny_models):
    with pytest.raises(
        RuntimeError, match="is a StableDiffusionPipeline, wanted a StableDiffusionXLPipeline.*pgc-stable-diffusion-guidance"
    ):
        SDXLGuidance({"pretrained_model_name_or_path": str(tiny_models["sd"][0])})
    with pytest.raises(RuntimeError, match="use pgc-zero123-guidance"):
        StableDiffusionGuidance({"pretrained_model_name_or_path": str(tiny_models["zero123"][0])})


def test_a_controlnet_of_the_other_family_is_refused(build, tiny_models):
    with pytest.raises(RuntimeError, match="controlnet_name_or_path.*not made for each other"):
        build("sdxl", controlnet_name_or_path=str(tiny_models["sd"][1]))
    with pytest.raises(RuntimeError, match="controlnet_name_or_path.*not made for each other"):
        build("sd", controlnet_name_or_path=str(tiny_models["sdxl"][1]))
    for family in ("sd3", "zero123", "flux"):
        with pytest.raises(RuntimeError, match="controlnet_name_or_path"):
            build(family, controlnet_name_or_path=str(tiny_models["sdxl"][1]))


def test_two_controlnets_see_depth_and_normals_of_the_same_views(build, prompts, tiny_models):
    net = str(tiny_models["sd"][1])
    options = {"controlnet_name_or_path": [net, net], "control_kind": ["depth", "normal"], "control_scale": [0.7, 0.5]}
    guidance = build("sd", **options, normal_convention="opengl")
    rgb, rest = batch()
    guidance(rgb, *prompts("sd"), **rest)["loss_sds"].backward()
    depth, normal = guidance.last_controls()
    assert depth.shape == normal.shape == (2, SIZE, SIZE, 3)
    assert depth[0, 8, 12, 0] > depth[0, 23, 12, 0] > 0 == depth[0, 0, 0, 0]
    torch.testing.assert_close(normal[0, 12, 12], torch.tensor([0.8, 0.5, 0.9]))
    other = build("sd", **options, normal_convention="normalbae")
    mirrored, _ = batch()
    other(mirrored, *prompts("sd"), **rest)["loss_sds"].backward()
    torch.testing.assert_close(other.last_controls()[1][0, 12, 12], torch.tensor([0.2, 0.5, 0.9]))
    assert not torch.equal(mirrored.grad, rgb.grad)


def test_a_missing_buffer_is_named(build, prompts, tiny_models):
    guidance = build("sd", controlnet_name_or_path=str(tiny_models["sd"][1]), control_kind="normal")
    rgb, rest = batch()
    del rest["view_normal"]
    with pytest.raises(ValueError, match="view_normal"):
        guidance(rgb, *prompts("sd"), **rest)


# ------------------------------------------------------------------------------------------------------ distilled checkpoints


@pytest.fixture
def turbo(tiny_sdxl, tmp_path):
    """The tiny SDXL with the scheduler of a turbo checkpoint."""
    folder = tmp_path / "fast-model"
    shutil.copytree(tiny_sdxl, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": "trailing"}))
    return folder


def distilled(folder, **config):
    return SDXLGuidance({"pretrained_model_name_or_path": str(folder), **config})


def test_a_distilled_checkpoint_gets_no_guidance(turbo, prompts, caplog):
    guidance = distilled(turbo)
    assert "is distilled, its scheduler" in caplog.text and "guidance is off" in caplog.text
    assert (guidance._scale, guidance._form) == (0.0, "authors")
    for config in ({"guidance_scale": 0.0}, {"guidance_scale": 1.0, "cfg": "diffusers"}):
        distilled(turbo, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"guidance_scale": 100.0}, "guidance_scale: found 100.0, wanted 0.0 in the authors form, or null.*is distilled"),
        ({"guidance_scale": 7.5, "cfg": "diffusers"}, "wanted 1.0 in the diffusers form"),
        ({"objective": "csd"}, "objective: found 'csd'.*csd lives on that prediction"),
        ({"objective": "ism"}, "objective: found 'ism', wanted sds, bgt or vsd"),
        ({"objective": "sdi"}, "sdi lives on that prediction"),
    ],
)
def test_guidance_on_a_distilled_checkpoint_is_refused_with_the_reason(turbo, config, message):
    with pytest.raises(ValueError, match=message):
        distilled(turbo, **config)


def test_a_lightning_checkpoint_is_known_by_its_name_and_a_zero_snr_one_is_not_mistaken(tiny_sdxl, turbo, tmp_path):
    folder = tmp_path / "sdxl-lightning-4step"
    shutil.copytree(tiny_sdxl, folder)
    assert "its name says 'lightning'" in distilled(folder)._prior.guidance_distilled
    path = turbo / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    assert distilled(turbo)._prior.guidance_distilled is None


# ------------------------------------------------------------------------------------------------------------- prompts, time


def test_the_negative_prompt_stands_apart_where_the_method_wants_it(prompts):
    (given,) = prompts(negative_prompt="a cup")
    cameras = torch.zeros(2), torch.zeros(2), torch.ones(2)
    together, apart = given.conditioning(*cameras), given.conditioning(*cameras, separate_negative=True)
    assert together.negatives is None and apart.negatives.shape[:2] == (1, 2)
    assert torch.equal(apart.negatives[0], together.uncond) and not torch.equal(apart.uncond, together.uncond)


def test_a_method_that_lives_on_a_negative_prompt_wants_one(build, prompts):
    rgb, rest = batch()
    with pytest.raises(ValueError, match="system.prompt_processor.negative_prompt: found nothing.*nfsd needs it"):
        build(objective="nfsd")(rgb, *prompts(), **rest)
    build(objective="csd")(rgb, *prompts(), **rest)


def test_perpendicular_negatives_are_refused_where_nothing_is_guided(build, prompts):
    (given,) = prompts(use_perp_neg=True)
    rgb, rest = batch()
    build()(rgb, given, **rest)["loss_sds"].backward()
    assert rgb.grad.abs().max() > 0
    with pytest.raises(ValueError, match="use_perp_neg: found true, wanted false: csd"):
        build(objective="csd")(rgb, given, **rest)


@pytest.mark.parametrize(
    ("config", "early", "late"),
    [({"timestep_sampling": "dreamtime"}, 500, 100), ({"timestep_sampling": "sqrt-anneal"}, 500, 20), ({"sqrt_anneal": True}, 500, 20)],
)
def test_falling_timesteps_follow_the_run(build, prompts, monkeypatch, config, early, late):
    from threestudio_pgc.modules import guidance as module

    seen, distill = [], module.distill

    def watched(*args, timesteps, **options):
        seen.append(timesteps.tolist())
        return distill(*args, timesteps=timesteps, **options)

    monkeypatch.setattr(module, "distill", watched)
    guidance = build(trainer_max_steps=100, **config)
    rgb, rest = batch()
    for step in (0, 50, 100):
        guidance.update_step(0, step)
        guidance(rgb, *prompts(), **rest)
    assert all(len(set(views)) == 1 for views in seen)
    first, middle, last = (views[0] for views in seen)
    assert first == early and first > middle > last and last <= late


# ---------------------------------------------------------------------------------------------------------------- Zero123


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cond_image_path": ""}, "cond_image_path: found 'nothing'"),
        ({"cond_image_path": "no/such.png"}, "no/such.png"),
        ({"cond_camera_distance": None}, "cond_camera_distance: found None"),
        ({"pose": "stable"}, "pose: found 'stable'"),
    ],
)
def test_zero123_names_what_its_picture_lacks(build, config, message):
    with pytest.raises(Exception, match=message):
        build("zero123", **config)


def test_zero123_looks_where_the_camera_stands(build):
    """Another azimuth, another gradient; the host calls it without a prompt."""
    guidance = build("zero123")
    assert isinstance(guidance, Zero123Guidance) and not guidance.needs_prompt
    assert (guidance._scale, guidance._form) == (5.0, "diffusers")
    gradients = []
    for azimuth in (10.0, 10.0, 200.0):
        rgb, rest = batch()
        guidance(rgb, **(rest | {"azimuth": torch.full((2,), azimuth)}))["loss_sds"].backward()
        gradients.append(rgb.grad)
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


# --- what threestudio's own parts hand over


class HostPrompts:
    """What the host's prompt processors return, as far as a guidance reads it: embeddings (2B, L, D), the prompt's first."""

    use_perp_neg = False

    def __init__(self, ours):
        self.ours = ours

    def get_text_embeddings(self, elevation, azimuth, camera_distances, view_dependent_prompting=True):
        found = self.ours.conditioning(elevation, azimuth, camera_distances, view_dependent_prompting)
        return torch.cat([found.cond, found.uncond])


def test_the_hosts_prompts_give_stable_diffusion_the_same_gradient_as_ours(build, prompts):
    (ours,) = prompts("sd")
    gradients = []
    for given in (ours, HostPrompts(ours)):
        rgb, views = batch()
        build("sd")(rgb, given, **views)["loss_sds"].backward()
        gradients.append(rgb.grad)
    assert gradients[0].any() and torch.equal(*gradients)


@pytest.mark.parametrize(
    "family, config, perp_neg, message",
    [
        ("sdxl", {}, False, "system.prompt_processor_type: found one of threestudio's own, wanted pgc-prompt-processor: .* more than one"),
        ("sd", {"objective": "nfsd"}, False, "system.prompt_processor_type: .*: nfsd needs the negative prompt on its own"),
        ("sd", {}, True, "system.prompt_processor.use_perp_neg: found true with threestudio's own prompt processor"),
    ],
)
def test_what_the_hosts_prompts_cannot_give_is_refused(build, prompts, family, config, perp_neg, message):
    given = HostPrompts(*prompts(family))
    given.use_perp_neg = perp_neg
    rgb, views = batch()
    with pytest.raises(ValueError, match=message):
        build(family, **config)(rgb, given, **views)


def test_latents_of_any_size_are_resized_as_the_hosts_guidances_do(build, prompts):
    guidance = build("sd")
    rgb, views = batch()
    latents = torch.cat([rgb.detach(), rgb.detach()[..., :1]], dim=-1).requires_grad_()
    guidance(latents, *prompts("sd"), **views, rgb_as_latents=True)["loss_sds"].backward()
    assert latents.grad.shape == latents.shape and latents.grad.any()
