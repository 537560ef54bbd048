"""What reaches the renderer: the regulated gradient of each view, divided by the batch size, times the loss weight, and nothing else."""

import shutil

import pytest
import torch

from threestudio_pgc.modules.guidance import SDXLGuidance
from threestudio_pgc.modules.prompt_processor import PromptProcessor
from threestudio_pgc.pixelgrad import pixel_norm

SIZE = 32


@pytest.fixture(scope="module")
def prompts(tiny_sdxl, tmp_path_factory):
    processor = PromptProcessor(
        {
            "prompt": "a zebra vase",
            "pretrained_model_name_or_path": str(tiny_sdxl),
            "cache_dir": str(tmp_path_factory.mktemp("prompts")),
        }
    )
    return processor()


@pytest.fixture(scope="module")
def build(tiny_sdxl):
    def make(pgc=None, beside=None, **config):
        """beside: the arguments that are no configuration."""
        return SDXLGuidance({"pretrained_model_name_or_path": str(tiny_sdxl), "pgc": pgc or {}, **config}, **(beside or {}))

    return make


def views(batch, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(batch, SIZE, SIZE, 3, generator=generator).to(dtype).requires_grad_(True)
    cameras = {
        "elevation": torch.linspace(-10, 45, batch),
        "azimuth": torch.linspace(0, 300, batch),
        "camera_distances": torch.full((batch,), 2.2),
        "height": SIZE,  # the host splats its whole batch into the call
        "width": SIZE,
    }
    return rgb, cameras


def image_gradient(guidance, prompts, batch, *, weight=1.0, dtype=torch.float32, autocast=False):
    rgb, cameras = views(batch, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = guidance(rgb, prompts, **cameras)["loss_sds"] * weight
    loss.backward()
    return rgb.grad


@pytest.fixture(scope="module")
def threshold(build, prompts):
    """A threshold that some pixels exceed and others do not, at any batch size tested."""
    rgb, cameras = views(4)
    return build({"enabled": False})(rgb, prompts, **cameras)["norm_p50"]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("autocast", [False, True], ids=["32", "bf16"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_pixel_obeys_the_rule(build, prompts, threshold, batch, weight, autocast, norm):
    gradient = image_gradient(build({"threshold": threshold, "norm": norm}), prompts, batch, weight=weight, autocast=autocast)
    raw = image_gradient(build({"enabled": False}), prompts, batch, weight=weight, autocast=autocast)
    norms = pixel_norm(gradient, norm=norm) * batch / weight  # what a view's own pixel was given
    raw_norms = pixel_norm(raw, norm=norm) * batch / weight
    assert norms.max() <= threshold * (1 + 1e-5)
    assert (raw_norms > threshold).any() and (raw_norms < threshold).any()
    torch.testing.assert_close(norms, raw_norms.clamp(max=threshold), rtol=1e-4, atol=0)
    cosine = torch.nn.functional.cosine_similarity(gradient, raw, dim=-1)
    assert (cosine[raw_norms > 0] > 1 - 1e-5).all()


def test_a_view_gets_the_same_gradient_alone_and_in_a_batch(build, prompts):
    """Threshold semantics do not depend on the batch: pull the first of four views back alone, with the same noise and timestep."""
    from threestudio_pgc.diffusion.distillation import distill
    from threestudio_pgc.pixelgrad import clip_norm

    guidance = build()
    rgb, cameras = views(4)
    conditioning = prompts.conditioning(cameras["elevation"], cameras["azimuth"], cameras["camera_distances"])
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([30, 100, 300, 480])
    whole = distill(rgb, guidance._prior, conditioning, timesteps=timesteps, noise=noise, rule=clip_norm, threshold=0.1)
    one = prompts.conditioning(*(cameras[key][:1] for key in ("elevation", "azimuth", "camera_distances")))
    alone = distill(rgb[:1], guidance._prior, one, timesteps=timesteps[:1], noise=noise[:1], rule=clip_norm, threshold=0.1)
    torch.testing.assert_close(alone.regulated[0], whole.regulated[0], rtol=1e-4, atol=1e-7)


def test_the_raw_gradient_is_end_to_end_autograd_of_the_plain_formula(build, prompts):
    """Rule off: the split backward equals differentiating sum(latents * gradient) through the VAE in one piece, in float64."""
    from threestudio_pgc.diffusion.distillation import distill
    from threestudio_pgc.pixelgrad import none

    prior = build()._prior.to(dtype=torch.float64)
    rgb, cameras = views(2, dtype=torch.float64)
    conditioning = prompts.conditioning(cameras["elevation"], cameras["azimuth"], cameras["camera_distances"])
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timesteps = torch.tensor([100, 400])
    step = distill(rgb, prior, conditioning, timesteps=timesteps, noise=noise, rule=none, threshold=1.0, guidance_scale=7.0)

    latents = prior.encode(rgb)
    abar = prior.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    with torch.no_grad():
        predicted = prior.predict_noise(abar.sqrt() * latents + (1 - abar).sqrt() * noise, timesteps, conditioning)
        estimate = predicted.cond + 7.0 * (predicted.cond - predicted.uncond)
        latent_gradient = (1 - abar) * (estimate - noise)
    (latents * latent_gradient).sum().backward()
    torch.testing.assert_close(step.latent_gradient, latent_gradient, rtol=1e-9, atol=1e-12)
    assert (step.raw - rgb.grad).norm() < 1e-9 * rgb.grad.norm()


def test_switching_pgc_off_changes_the_gradient_and_nothing_else(build, prompts, threshold):
    rgb, cameras = views(2)
    on = build({"threshold": threshold})(rgb, prompts, **cameras)
    off = build({"threshold": threshold, "enabled": False})(rgb, prompts, **cameras)
    assert {key: value for key, value in on.items() if key != "loss_sds"} == {key: value for key, value in off.items() if key != "loss_sds"}
    assert not torch.equal(
        image_gradient(build({"threshold": threshold}), prompts, 2),
        image_gradient(build({"threshold": threshold, "enabled": False}), prompts, 2),
    )


def test_control_needs_depth_and_changes_the_gradient(build, prompts, tiny_controlnet):
    guidance = build(controlnet_name_or_path=str(tiny_controlnet))
    rgb, cameras = views(2)
    with pytest.raises(ValueError, match="control kind 'depth': found the buffers none, wanted depth too"):
        guidance(rgb, prompts, **cameras)
    opacity = torch.zeros(2, SIZE, SIZE, 1)
    opacity[:, 8:24, 8:24] = 1
    guidance(rgb, prompts, depth=opacity * 2.0, opacity=opacity, **cameras)["loss_sds"].backward()
    assert torch.isfinite(rgb.grad).all() and rgb.grad.abs().sum() > 0


def test_same_step_same_draws_another_step_others(build, prompts):
    guidance = build()
    first = image_gradient(guidance, prompts, 2)
    torch.rand(7)  # the global generator must not matter
    assert torch.equal(first, image_gradient(guidance, prompts, 2))
    guidance.update_step(0, 1)
    assert not torch.equal(first, image_gradient(guidance, prompts, 2))


def test_schedules_follow_the_step(build, prompts):
    guidance = build({"threshold": [0, 0.5, 0.1, 100]}, max_step_percent=[0, 0.9, 0.5, 100])
    rgb, cameras = views(1)
    start = guidance(rgb, prompts, **cameras)
    guidance.update_step(0, 100)
    end = guidance(rgb, prompts, **cameras)
    assert (start["threshold"], end["threshold"]) == (pytest.approx(0.5), pytest.approx(0.1))
    assert (start["max_step"], end["max_step"]) == (900, 500)


def test_an_adaptive_threshold_clips_its_share_and_goes_into_the_log(build, prompts):
    guidance = build({"threshold": {"quantile": 0.9}})
    rgb, cameras = views(2)
    out = guidance(rgb, prompts, **cameras)
    assert out["share_clipped"] == pytest.approx(0.1, abs=0.01) and out["norm_p50"] < out["threshold"] < out["norm_max"]
    out["loss_sds"].backward()
    assert pixel_norm(rgb.grad).max() * 2 == pytest.approx(out["threshold"], rel=1e-4)


def test_an_adaptive_threshold_goes_on_from_the_runs_state(build, prompts):
    def steps(guidance, numbers):
        found = []
        for number in numbers:
            guidance.update_step(0, number)
            rgb, cameras = views(2, seed=number)
            found.append(guidance(rgb, prompts, **cameras)["threshold"])
        return found

    whole = build({"threshold": {"quantile": 0.9}})
    values = steps(whole, range(4))
    begun, resumed = build({"threshold": {"quantile": 0.9}}), build({"threshold": {"quantile": 0.9}})
    steps(begun, range(2))
    resumed.load_run_state(begun.run_state())
    assert steps(resumed, range(2, 4)) == values[2:] != steps(build({"threshold": {"quantile": 0.9}}), range(2, 4))
    assert build().run_state() == {}
    build().load_run_state(begun.run_state())  # a fixed threshold has no use for it


@pytest.mark.parametrize("rule", ["normalize", "clip-norm"])
def test_a_rule_cannot_be_applied_twice(build, prompts, rule):
    """The authors' 2D script registers its hook on the same leaf in every iteration, so that after k of them the rule acts k times. Here
    the rule acts inside the call: the tenth step on one leaf gives what the first does, and PNGD's gain is c / (|g| + c) once."""
    guidance, raw = build({"rule": rule}), image_gradient(build({"enabled": False}), prompts, 2)
    rgb, cameras = views(2)
    gradients = []
    for _ in range(10):
        rgb.grad = None
        guidance(rgb, prompts, **cameras)["loss_sds"].backward()
        gradients.append(rgb.grad)
    assert torch.equal(gradients[-1], gradients[0]) and not rgb._backward_hooks
    if rule == "normalize":
        norms = pixel_norm(raw) * 2
        torch.testing.assert_close(pixel_norm(rgb.grad) * 2, norms * 0.1 / (norms + 0.1), rtol=1e-4, atol=1e-9)


def test_nonfinite_gradients_are_zeroed_counted_and_reported(build, prompts):
    guidance = build()
    encode = guidance._prior.encode

    def overflowing(image):  # what a half-precision encoder does at a few pixels: an infinite derivative
        poisoned = image.clone()
        poisoned[:, 3, 4] = torch.sqrt(image[:, 3, 4] * 0)
        return encode(poisoned)

    guidance._encode = overflowing
    rgb, cameras = views(2)
    out = guidance(rgb, prompts, **cameras)
    out["loss_sds"].backward()
    assert out["nonfinite_pixels"] == 2 and out["all_nonfinite"] == 0
    assert torch.isfinite(rgb.grad).all() and (rgb.grad[:, 3, 4] == 0).all() and rgb.grad.abs().sum() > 0

    guidance._encode = lambda image: encode(torch.sqrt(image * 0))
    rgb, cameras = views(2)
    out = guidance(rgb, prompts, **cameras)
    out["loss_sds"].backward()
    assert out["all_nonfinite"] == 1 and (rgb.grad == 0).all()


def test_linear_pullback(build, prompts, tmp_path):
    gradient = image_gradient(build({"pullback": "linear"}), prompts, 1)
    assert gradient.abs().sum() > 0
    from safetensors.torch import save_file

    path = tmp_path / "map.safetensors"
    save_file({"weight": torch.ones(7, 3), "bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match="linear_map: found a map to 7 latent channels, wanted 4"):
        build({"pullback": "linear", "linear_map": str(path)})
    with pytest.raises(ValueError, match="nowhere.safetensors"):
        build({"pullback": "linear", "linear_map": str(tmp_path / "nowhere.safetensors")})


def test_latents_can_be_distilled_directly(build, prompts):
    _, cameras = views(2)
    latents = torch.randn(2, 8, 8, 4, requires_grad=True)
    build()(latents, prompts, **cameras, rgb_as_latents=True)["loss_sds"].backward()
    assert pixel_norm(latents.grad).max() * 2 <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pgc": {"rule": "clip"}}, "system.guidance.pgc.rule"),
        ({"pgc": {"treshold": 0.1}}, "treshold"),
        ({"guidance_scal": 3.0}, "guidance_scal"),
        ({"use_sjc": True}, "system.guidance.use_sjc"),
        ({"controlnet_name_or_path": "no/such/folder"}, "no/such/folder"),
        ({"unet_name_or_path": "builtin:nothing"}, "unet_name_or_path: no bundled model 'builtin:nothing'"),
    ],
)
def test_bad_config_is_refused_by_name(build, config, message):
    with pytest.raises(Exception, match=message):
        build(**config)


# ---------------------------------------------------------------------------------------------------- two guidances in one step


def networks(*guidances):
    return [network for guidance in guidances for network in guidance._prior.networks().values()]


def parameters(*guidances):
    """Numbers in memory, each counted once."""
    return sum(parameter.numel() for network in set(networks(*guidances)) for parameter in network.parameters())


def run(guidances, prompts, steps=3):
    """Image gradients of every step, the guidances one after the other on the same views, as the joint stage calls them."""
    gradients = []
    for number in range(steps):
        for guidance in guidances:
            guidance.update_step(0, number)
            rgb, cameras = views(2, seed=number)
            guidance(rgb, prompts, **cameras, c2w=torch.eye(4).expand(2, 4, 4))["loss_sds"].backward()
            gradients.append(rgb.grad)
    return gradients


def test_a_guidance_beside_none_loads_its_own(build, caplog):
    first, second = build(), build(beside={"sharing": None})
    assert not set(networks(first)) & set(networks(second)) and "shared" not in caplog.text
    assert parameters(first, second) == 2 * parameters(first)


def test_two_guidances_on_one_model_have_it_in_memory_once(build, caplog):
    caplog.set_level("INFO")
    first = build()
    second = build(beside={"sharing": first}, guidance_scale=30.0)
    assert networks(first) == networks(second) and parameters(first, second) == parameters(first)
    assert [line for line in caplog.messages if "shared" in line] == [
        "Of these, shared with the other guidance and in memory once: VAE, U-Net"
    ]


def test_what_is_not_the_same_is_not_shared(build, tiny_sdxl, tiny_controlnet, tmp_path, caplog):
    caplog.set_level("INFO")
    first = build(controlnet_name_or_path=str(tiny_controlnet))
    tuned = shutil.copytree(tiny_sdxl / "unet", tmp_path / "tuned")
    for config, expected in (
        ({}, "VAE, U-Net"),
        ({"controlnet_name_or_path": str(tiny_controlnet), "control_scale": 0.5}, "VAE, U-Net, ControlNet 1"),
        ({"unet_name_or_path": str(tuned)}, "VAE"),
        ({"dtype": "bf16"}, "none"),
        ({"half_precision_weights": False}, "VAE, U-Net"),  # on a CPU they are fp32 anyway
        ({"enable_attention_slicing": True}, "none"),
    ):
        caplog.clear()
        build(beside={"sharing": first}, **config)
        assert f"in memory once: {expected}" in caplog.messages[-2], config


@pytest.mark.parametrize("objectives", [("sds", "sds"), ("sds", "vsd"), ("vsd", "sds"), ("vsd", "vsd"), ("csd", "bgt")], ids="-".join)
def test_guidances_that_share_a_network_give_what_they_give_alone(build, prompts, objectives):
    """Also where one of them trains an adapter on it, or both do: bit for bit, step after step."""
    configs = [{"objective": name, "objective_options": {"lora_lr": 0.01} if name == "vsd" else {}} for name in objectives]
    first, apart = build(**configs[0]), [build(**config, beside={"stream": stream}) for config, stream in zip(configs, ("", "normal-"))]
    second = build(**configs[1], beside={"sharing": first, "stream": "normal-"})
    assert networks(first) == networks(second) and len(set(networks(*apart))) == 4
    for found, expected in zip(run((first, second), prompts), run(apart, prompts), strict=True):
        assert torch.equal(found, expected) and found.abs().max() > 0


def test_an_adapter_with_checkpointing_disturbs_no_other(build, prompts):
    options = {"objective": "vsd", "objective_options": {"lora_lr": 0.01, "checkpointing": True}}
    first = build(**options)
    shared = run((first, build(beside={"sharing": first})), prompts, steps=2)
    assert all(torch.equal(*pair) for pair in zip(shared, run((build(**options), build()), prompts, steps=2), strict=True))


def test_each_guidance_draws_from_its_own_stream(build, prompts):
    first = build()
    same, own = (build(beside={"sharing": first, "stream": stream}) for stream in ("", "normal-"))
    gradients = run((first, same, own), prompts, steps=1)
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_the_streams_are_named_after_what_they_are_for(build, prompts, monkeypatch):
    """The plain names are what earlier runs drew from."""
    from threestudio_pgc.modules import guidance as module

    for stream in ("", "normal-"):
        drawn, draw = [], module.step_generator
        with monkeypatch.context() as patch:
            patch.setattr(module, "step_generator", lambda name, *rest, drawn=drawn, draw=draw: drawn.append(name) or draw(name, *rest))
            run([build(beside={"stream": stream})], prompts, steps=1)
        assert drawn == [f"{stream}timesteps", f"{stream}noise", f"{stream}method"]
