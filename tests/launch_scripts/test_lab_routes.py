"""The laboratory's step is the library's, and its routes, objectives and outliers are what they say."""

import json
from dataclasses import replace

import pytest
import torch

from launch_scripts.lab.routes import (
    FIGURE_2,
    ROUTES,
    Objective,
    adaptive_threshold,
    check_objective,
    inject_outliers,
    parse_objectives,
    parse_routes,
    take_step,
)
from tests.diffusion.tiny import random_conditioning
from threestudio_pgc.diffusion.distillation import distill
from threestudio_pgc.diffusion.methods import METHODS
from threestudio_pgc.diffusion.sdxl import SDXLPrior
from threestudio_pgc.diffusion.timesteps import sample_timesteps
from threestudio_pgc.pixelgrad import RULES, pixel_norm
from threestudio_pgc.pixelgrad.linear_map import PAPER_ENCODER
from threestudio_pgc.standalone.seeding import step_generator


@pytest.fixture(scope="module")
def prior(tiny_sdxl):
    return SDXLPrior.from_pretrained(tiny_sdxl)


def image(batch=2, seed=0):
    return torch.rand(batch, 32, 32, 3, generator=torch.Generator().manual_seed(seed))


def test_routes_by_name():
    assert [route.name for route in parse_routes(["all"])] == list(ROUTES)
    assert [route.name for route in parse_routes(["figure2"])] == list(FIGURE_2) and len(FIGURE_2) == 6
    assert [route.name for route in parse_routes(["vae", "latent", "vae"])] == ["latent", "vae"]
    with pytest.raises(ValueError, match=r"--routes: found 'pgcn'.*did you mean 'pgc-n'"):
        parse_routes(["vae", "pgcn"])


def test_objectives_by_name():
    assert parse_objectives(["all"]) == list(METHODS) and parse_objectives(["csd", "sds", "csd"]) == ["sds", "csd"]
    with pytest.raises(ValueError, match=r"--objectives: found 'vsds', wanted all or some of sds, .*did you mean"):
        parse_objectives(["sds", "vsds"])
    with pytest.raises(ValueError, match=r"--objective: found 'all', wanted one of sds, csd"):
        check_objective("all")


def test_runs_of_sds_keep_the_settings_that_they_were_first_known_by():
    assert Objective(guidance_scale=30.0, cfg="authors").as_settings() == {
        "guidance_scale": 30.0,
        "cfg": "authors",
        "weighting": "sds",
        "t_range": [0.02, 0.5],
        "threshold": 0.1,
        "quantile": 0.99,
        "window": 100,
        "inject": "none",
        "inject_share": 0.001,
        "inject_factor": 1000.0,
    }


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(t_range=(0.1, 0.9)),
        Objective(method="vsd", method_options=(("lora_rank", 2), ("camera", False)), rescale=0.5),
    ],
)
def test_settings_come_back_from_json(objective):
    assert Objective.from_settings(json.loads(json.dumps(objective.as_settings()))) == objective
    assert hash(objective) == hash(replace(objective))


def conditioning_for(method):
    """Random conditioning of two views, with a negative of its own where the method wants one."""
    found = random_conditioning(2)
    if method.separate_negative:
        other = random_conditioning(2, seed=7)
        found = replace(found, negatives=other.cond[None], pooled_negatives=other.pooled_cond[None])
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_distill_with_the_objective(prior, name):
    objective = Objective(method=name, threshold=1e-3)
    camera = torch.eye(4).repeat(2, 1, 1)

    def own(method):
        scale = method.guidance_scale
        return {"method": method, "guidance_scale": 0.0 if scale is None else scale, "cfg": method.cfg}

    method = objective.start(prior)
    found = take_step(image(), prior, conditioning_for(method), ROUTES["pgc-n"], objective, seed=5, step=3, method=method, camera=camera)
    again = objective.start(prior)
    expected = distill(
        image(),
        prior,
        conditioning_for(again),
        timesteps=sample_timesteps(2, (0.02, 0.5), generator=step_generator(5, 3, stream="timesteps")),
        noise=torch.randn(2, 4, 8, 8, generator=step_generator(5, 3, stream="noise")),
        generator=step_generator(5, 3, stream="method"),
        camera=camera,
        rule=RULES["clip-norm"],
        threshold=1e-3,
        **own(again),
    )
    assert torch.equal(found.raw, expected.raw) and torch.equal(found.regulated, expected.regulated)
    assert found.numbers == expected.numbers and found.raw.abs().sum() > 0


def test_what_bgt_wants_of_the_image_itself_is_in_the_raw_gradient(prior):
    with_image, without = Objective(method="bgt"), Objective(method="bgt", method_options=(("lambda_rgb", 0.0),))
    steps = [take_step(image(), prior, random_conditioning(2), ROUTES["vae"], one, seed=1, step=0) for one in (with_image, without)]
    assert torch.equal(steps[0].latent_gradient, steps[1].latent_gradient) and not torch.equal(steps[0].raw, steps[1].raw)


def test_unknown_options_are_refused_by_name(prior):
    with pytest.raises(ValueError, match=r"gradient_lab.objective_options.lora_rnk: vsd has no such option"):
        Objective(method="vsd", method_options=(("lora_rnk", 2),)).start(prior)


def test_a_distilled_checkpoint_is_not_guided(tiny_sdxl, tmp_path):
    (tmp_path / "tiny-turbo").symlink_to(tiny_sdxl)
    turbo = SDXLPrior.from_pretrained(tmp_path / "tiny-turbo")
    with pytest.raises(ValueError, match=r"--guidance-scale: found 100 in the authors form, wanted 0: the checkpoint is distilled"):
        Objective().start(turbo)
    with pytest.raises(ValueError, match=r"--guidance-scale: found 7.5 in the diffusers form, wanted 1"):
        Objective(method="vsd").start(turbo)
    with pytest.raises(ValueError, match=r"--objective: found csd, wanted sds, bgt or vsd"):
        Objective(method="csd").start(turbo)
    Objective(guidance_scale=0.0).start(turbo)


@pytest.mark.parametrize("name", [name for name in ROUTES if name != "latent"])
def test_a_step_is_distill_with_the_routes_rule(prior, name):
    route, objective = ROUTES[name], Objective(guidance_scale=7.0, threshold=1e-3, quantile=0.9)
    linear = PAPER_ENCODER if route.pullback == "linear" else None
    found = take_step(
        image(),
        prior,
        random_conditioning(2),
        route,
        objective,
        seed=5,
        step=3,
        linear=linear,
        adaptive=adaptive_threshold(route, objective),
    )
    timesteps = sample_timesteps(2, (0.02, 0.5), generator=step_generator(5, 3, stream="timesteps"))
    noise = torch.randn(2, 4, 8, 8, generator=step_generator(5, 3, stream="noise"))
    expected = distill(
        image(),
        prior,
        random_conditioning(2),
        timesteps=timesteps,
        noise=noise,
        guidance_scale=7.0,
        rule=RULES[route.rule],
        threshold=adaptive_threshold(route, objective) or 1e-3,
        norm=route.norm,
        encode=None if linear is None else lambda views: linear.encode(views, 8),
    )
    assert torch.equal(found.raw, expected.raw) and torch.equal(found.regulated, expected.regulated)
    assert found.threshold == expected.threshold and found.raw.abs().sum() > 0


def test_the_latent_route_is_the_latent_gradient_itself(prior):
    latents = torch.randn(2, 8, 8, 4)
    found = take_step(latents, prior, random_conditioning(2), ROUTES["latent"], Objective(), seed=0, step=0)
    assert torch.equal(found.raw, found.latent_gradient.movedim(1, -1)) and torch.equal(found.raw, found.regulated)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_outliers_or_all(share):
    gradient = torch.randn(2, 3, 8, 8)
    found = inject_outliers(gradient, share, 1000.0, torch.Generator().manual_seed(0), dim=1)
    assert torch.equal(found, gradient * 1000.0 if share else gradient)


@pytest.mark.parametrize("dim", [1, -1])
def test_outliers_hit_whole_pixels_at_the_share_asked_for(dim):
    gradient = torch.ones(4, 3, 100, 100).movedim(1, dim)
    found = inject_outliers(gradient, 0.01, 1000.0, torch.Generator().manual_seed(0), dim=dim).movedim(dim, 1)
    hit = (found == 1000.0).all(1)
    assert ((found == 1000.0).any(1) == hit).all() and float(hit.float().mean()) == pytest.approx(0.01, abs=0.002)


def test_injected_outliers_reach_the_raw_gradient_and_a_pixel_clip_removes_them(prior):
    clean, spoilt = (Objective(threshold=1e-2, inject=where, inject_share=0.02) for where in ("none", "image"))
    steps = [take_step(image(), prior, random_conditioning(2), ROUTES["pgc-n"], one, seed=1, step=0) for one in (clean, spoilt)]
    changed = (steps[0].raw != steps[1].raw).any(-1)
    assert 0 < changed.float().mean() < 0.06
    ratio = pixel_norm(steps[1].raw)[changed] / pixel_norm(steps[0].raw)[changed]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1000.0), rtol=1e-4, atol=0)
    assert pixel_norm(steps[1].regulated).max() <= 1e-2 * (1 + 1e-5)
    assert torch.equal(steps[0].regulated[~changed], steps[1].regulated[~changed])
    at_latent = take_step(
        image(), prior, random_conditioning(2), ROUTES["vae"], Objective(inject="latent", inject_share=0.02), seed=1, step=0
    )
    assert 0 < (at_latent.latent_gradient != steps[0].latent_gradient).any(1).float().mean() < 0.1


def test_outliers_are_put_into_the_gradient_of_any_objective(prior):
    clean = Objective(method="bgt")
    spoilt = replace(clean, inject="latent", inject_share=1.0)
    steps = [take_step(image(), prior, random_conditioning(2), ROUTES["vae"], one, seed=1, step=0) for one in (clean, spoilt)]
    assert torch.equal(steps[1].latent_gradient, 1000.0 * steps[0].latent_gradient)
