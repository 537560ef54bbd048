"""PGC around a guidance that knows nothing of it: off, it is not there; on, each view's pixels obey the rule and nothing else changes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import OmegaConf

import threestudio_pgc.modules  # noqa: F401  registers the parts
from threestudio_pgc.host import BaseModule, BaseObject, register
from threestudio_pgc.modules.wrapped_guidance import WrappedGuidance, _backward_leaves
from threestudio_pgc.pixelgrad import pixel_norm
from threestudio_pgc.standalone import launcher, registry

SHIPPED = OmegaConf.load(Path(__file__).resolve().parents[2] / "configs" / "fantasia3d-pocket-pgc.yaml")
SIZE = 32
C = 0.1


class Quadratic(BaseObject):
    """loss = 0.5 sum (gain rgb - target)^2 / B: gradient gain (gain rgb - target) / B, gains from 1e-3 to 1e3 over the columns."""

    @dataclass
    class Config:
        target: float = 0.3
        average: bool = True

    def configure(self):
        self.steps, self.told = [], None

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.steps.append(global_step)

    def gain(self, rgb):
        return torch.logspace(-3, 3, rgb.shape[2], dtype=rgb.dtype)[None, None, :, None]

    def view_gradient(self, rgb):
        return self.gain(rgb) * (self.gain(rgb) * rgb - self.cfg.target)

    def __call__(self, rgb, *args, **kwargs):
        self.told, self.dtype = (args, kwargs), rgb.dtype
        self.loss = 0.5 * (self.gain(rgb) * rgb - self.cfg.target).square().sum() / (len(rgb) if self.cfg.average else 1)
        return {"loss_sds": self.loss, "grad_norm": 7.0, "norm_p50": "its own", "eval": {"levels": [1, 2]}}


class Training(BaseModule):
    """As VSD does: "loss_vsd" reaches image and parameter, "loss_lora" the parameter alone. "loss_tint" reaches the image alone."""

    def configure(self):
        self.scale = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, rgb, **kwargs):
        shared = rgb.exp()  # one graph under two losses
        return {
            "loss_vsd": 0.5 * (self.scale * shared - self.bias).square().sum() / len(rgb),
            "loss_tint": shared.pow(3).sum() / len(rgb),
            "loss_lora": self.scale * self.bias.square(),
            "loss_zero": 0.0,
        }


class Blind(BaseObject):
    def __call__(self, rgb, **kwargs):
        return {"loss_sds": torch.tensor(1.0), "loss_lora": torch.ones((), requires_grad=True) * 2}


class Poisoned(BaseObject):
    """An infinite derivative at one pixel of every view, or at all of them, as an overflowing half-precision encoder has."""

    @dataclass
    class Config:
        everywhere: bool = False

    def __call__(self, rgb, **kwargs):
        poisoned = torch.sqrt((rgb if self.cfg.everywhere else rgb[:, 3, 4]) * 0)
        return {"loss_sds": (rgb.square().sum() + poisoned.sum()) / len(rgb)}


class PlainSDS(BaseObject):
    """SDS on latents as threestudio writes it, 0.5 mse(latents, (latents - grad).detach(), sum) / B, with a real VAE and U-Net."""

    @dataclass
    class Config:
        folder: str = ""

    def configure(self):
        self.vae = AutoencoderKL.from_pretrained(self.cfg.folder, subfolder="vae").requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(self.cfg.folder, subfolder="unet").requires_grad_(False)
        self.step = 0

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.step = global_step

    def __call__(self, rgb, prompt, rgb_as_latents=False, **kwargs):
        generator = torch.Generator().manual_seed(self.step)
        batch = len(rgb)
        latents = self.vae.encode(rgb.movedim(-1, 1) * 2 - 1).latent_dist.mode() * self.vae.config.scaling_factor
        with torch.no_grad():
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = torch.randint(20, 500, (batch,), generator=generator)
            extra = {"text_embeds": torch.ones(batch, 12), "time_ids": torch.ones(batch, 6)}
            predicted = self.unet(0.8 * latents + 0.6 * noise, timesteps, prompt.expand(batch, -1, -1), added_cond_kwargs=extra).sample
            grad = 0.36 * (predicted - noise)
        loss = 0.5 * F.mse_loss(latents, (latents - grad).detach(), reduction="sum") / batch
        return {"loss_sds": loss, "grad_norm": grad.norm(), "min_step": 20, "max_step": 499}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The toys under their names, for the length of a test."""
    monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    for cls in (Quadratic, Training, Blind, Poisoned, PlainSDS):
        register(f"toy-{cls.__name__.lower()}-guidance")(cls)


def wrap(inner_type, pgc=None, inner=None, **config):
    return WrappedGuidance({"inner_type": f"toy-{inner_type}-guidance", "inner": inner or {}, "pgc": pgc or {}, **config})


def views(batch, dtype=torch.float64, size=SIZE):
    return torch.rand(batch, size, size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).requires_grad_()


def image_gradient(guidance, rgb, *args, weight=1.0, **kwargs):
    rgb.grad = None
    (guidance(rgb, *args, **kwargs)["loss_sds"] * weight).backward()
    return rgb.grad


@pytest.fixture(scope="module")
def prompt():
    return torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(5))


def check_rule(gradient, raw, c):
    """`gradient` is `raw` clipped at c, pixel by pixel; both per view."""
    norms, raw_norms = pixel_norm(gradient), pixel_norm(raw)
    assert (raw_norms > c).any() and (raw_norms < c).any(), "a case in which the rule does something and leaves something"
    assert norms.max() <= c * (1 + 1e-5)
    torch.testing.assert_close(norms, raw_norms.clamp(max=c), rtol=1e-5, atol=0)
    assert (F.cosine_similarity(gradient.double(), raw.double(), dim=-1)[raw_norms > 0] > 1 - 1e-5).all()
    below = raw_norms < c * (1 - 1e-5)
    torch.testing.assert_close(gradient[below], raw[below], rtol=1e-5, atol=0)


def test_a_loss_without_slope_gives_a_zero_gradient_and_zero_numbers():
    guidance, rgb = wrap("quadratic", inner={"target": 0.0}), torch.zeros(2, SIZE, SIZE, 3, requires_grad=True)
    assert guidance.last_norms() is None
    out = guidance(rgb)
    out["loss_sds"].backward()
    assert out["loss_sds"] == 0 and not rgb.grad.any() and not guidance.last_norms().any()
    assert [out[key] for key in ("share_clipped", "norm_p99", "norm_max", "nonfinite_pixels", "all_nonfinite")] == [0.0] * 5


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_every_pixel_obeys_the_rule_whatever_batch_and_weight(batch, weight):
    guidance, rgb = wrap("quadratic", {"threshold": C}), views(batch)
    gradient = image_gradient(guidance, rgb, weight=weight)
    check_rule(gradient * batch / weight, guidance.inner.view_gradient(rgb.detach()), C)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_sds_through_a_vae_obeys_the_rule(tiny_sdxl, prompt, batch, weight):
    inner, rgb = {"folder": str(tiny_sdxl)}, views(batch, torch.float32)
    raw = image_gradient(PlainSDS(inner), rgb, prompt) * batch
    c = float(pixel_norm(raw).median())
    guidance = wrap("plainsds", {"threshold": c}, inner)
    check_rule(image_gradient(guidance, rgb, prompt, weight=weight) * batch / weight, raw, c)
    torch.testing.assert_close(guidance.last_norms(), pixel_norm(raw), rtol=1e-5, atol=0)


def test_off_is_the_inner_guidance_bit_for_bit(tiny_sdxl, prompt):
    inner, rgb = {"folder": str(tiny_sdxl)}, views(4, torch.float32)
    alone, off = PlainSDS(inner), wrap("plainsds", {"enabled": False}, inner)
    theirs, ours = alone(rgb, prompt), off(rgb, prompt)
    assert theirs.keys() == ours.keys() and all(torch.equal(torch.as_tensor(theirs[key]), torch.as_tensor(ours[key])) for key in theirs)
    assert torch.equal(image_gradient(alone, rgb, prompt), image_gradient(off, rgb, prompt))


def test_rule_none_gives_the_inner_gradient():
    guidance, rgb = wrap("quadratic", {"rule": "none"}), views(4)
    torch.testing.assert_close(image_gradient(guidance, rgb), guidance.inner.view_gradient(rgb.detach()) / 4, rtol=1e-12, atol=0)


def test_losses_that_are_sums_mean_the_same_threshold():
    rgb = views(4)
    summed = wrap("quadratic", inner={"average": False}, inner_divides_by_batch=False)
    averaged = wrap("quadratic")
    torch.testing.assert_close(image_gradient(summed, rgb), image_gradient(averaged, rgb), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("clip-value", lambda raw: raw.clamp(-C, C)),
        ("normalize", lambda raw: C * raw / (raw.norm(dim=-1, keepdim=True) + C)),
        ("view-rms", lambda raw: C * raw / raw.square().sum(-1).flatten(1).mean(1).sqrt().view(-1, 1, 1, 1)),
    ],
)
def test_every_rule_acts_on_one_views_own_gradient(rule, expected):
    guidance, rgb = wrap("quadratic", {"rule": rule, "threshold": C}), views(2)
    gradient = image_gradient(guidance, rgb) * 2
    torch.testing.assert_close(gradient, expected(guidance.inner.view_gradient(rgb.detach())), rtol=1e-9, atol=1e-15)


def test_the_largest_channel_can_be_clipped_instead():
    guidance, rgb = wrap("quadratic", {"norm": "linf", "threshold": C}), views(2)
    largest = pixel_norm(guidance.inner.view_gradient(rgb.detach()), norm="linf")
    torch.testing.assert_close(pixel_norm(image_gradient(guidance, rgb) * 2, norm="linf"), largest.clamp(max=C))
    torch.testing.assert_close(guidance.last_norms(), largest)


def test_the_inner_guidance_is_told_everything_and_its_outputs_come_back():
    guidance, rgb = wrap("quadratic"), views(2)
    cond = torch.zeros(2, SIZE, SIZE, 3)
    out = guidance(rgb, "prompt", rgb_as_latents=False, guidance_eval=True, cond_rgb=cond, height=SIZE)
    args, kwargs = guidance.inner.told
    assert args == ("prompt",) and kwargs["cond_rgb"] is cond
    assert {key: value for key, value in kwargs.items() if key != "cond_rgb"} == {
        "rgb_as_latents": False,
        "guidance_eval": True,
        "height": SIZE,
    }
    assert (out["grad_norm"], out["eval"], out["norm_p50"]) == (7.0, {"levels": [1, 2]}, "its own")
    assert {"threshold", "share_clipped", "nonfinite_pixels", "norm_p99", "norm_max", "all_nonfinite"} <= out.keys()


def test_the_numbers_are_those_of_the_raw_gradient():
    guidance, rgb = wrap("quadratic", {"threshold": C}), views(4)
    norms = pixel_norm(guidance.inner.view_gradient(rgb.detach()))
    out = guidance(rgb)
    assert out["threshold"] == C
    assert out["norm_max"] == pytest.approx(float(norms.max())) and out["norm_p99"] == pytest.approx(float(norms.quantile(0.99)), rel=0.05)
    assert out["share_clipped"] == pytest.approx(float((norms > C).double().mean()))


def test_the_image_keeps_its_precision_and_the_rule_gets_float32():
    guidance, rgb = wrap("quadratic", {"threshold": C}), views(2, torch.float16)
    gradient = image_gradient(guidance, rgb)
    assert guidance.inner.dtype == gradient.dtype == torch.float16 and guidance.last_norms().dtype == torch.float32
    assert pixel_norm(gradient.float()).max() * 2 == pytest.approx(C, rel=1e-3)


def test_it_works_where_no_gradient_is_recorded():
    with torch.no_grad():
        assert wrap("quadratic")(views(1))["share_clipped"] > 0


def test_every_call_on_one_image_regulates_once():
    guidance, rgb = wrap("quadratic", {"rule": "normalize"}), views(2)
    first = image_gradient(guidance, rgb).clone()
    for _ in range(5):
        assert torch.equal(image_gradient(guidance, rgb), first)
    assert not rgb._backward_hooks


def test_the_inner_graph_is_given_up_where_nothing_else_hangs_on_it():
    guidance, rgb = wrap("quadratic"), views(1)
    (leaf,) = _backward_leaves(guidance(rgb)["loss_sds"])
    assert leaf is rgb
    with pytest.raises(RuntimeError, match="second time"):
        guidance.inner.loss.backward()


def test_the_inner_guidance_still_trains_its_own_parameters():
    weights = {"loss_vsd": 0.3, "loss_tint": 2.0, "loss_lora": 5.0}

    def gradients(guidance, rgb):
        out = guidance(rgb)
        assert out["loss_zero"] == 0.0
        sum(weight * out[name] for name, weight in weights.items()).backward()
        return [parameter.grad for parameter in guidance.parameters()]

    alone, wrapped, rgb = Training(), wrap("training", {"threshold": 20.0}), views(2)
    expected = gradients(alone, rgb)
    rgb.grad = None
    for ours, theirs in zip(gradients(wrapped, rgb), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)

    shared = rgb.detach().exp()
    raw = {"loss_vsd": 3 * shared * (3 * shared - 0.5), "loss_tint": 3 * shared.pow(3)}
    assert all((pixel_norm(g) > 20).any() and (pixel_norm(g) < 20).any() for g in raw.values())
    regulated = sum(weights[name] * g * (20 / pixel_norm(g)).clamp(max=1)[..., None] / 2 for name, g in raw.items())
    torch.testing.assert_close(rgb.grad, regulated, rtol=1e-12, atol=0)


def test_losses_of_one_graph_are_both_regulated_where_nothing_trains():
    guidance, rgb = wrap("training", {"threshold": 20.0}).requires_grad_(False), views(2)
    out = guidance(rgb)
    for name in ("loss_vsd", "loss_tint"):
        rgb.grad = None
        out[name].backward()
        assert pixel_norm(rgb.grad).max() * 2 == pytest.approx(20.0)


def test_losses_share_one_threshold_and_are_counted_together():
    guidance, rgb = wrap("training", {"threshold": {"quantile": 0.5}}), views(2)
    out = guidance(rgb)
    assert guidance.last_norms().shape == (4, SIZE, SIZE) and out["share_clipped"] == pytest.approx(0.5, abs=0.01)
    assert guidance.run_state()["threshold"]["steps"] == 1
    assert float(guidance.run_state()["threshold"]["counts"].sum()) == 4 * SIZE * SIZE


def test_a_loss_that_does_not_reach_the_image_is_the_inner_guidances_own():
    guidance = wrap("training")
    lora = guidance(views(1))["loss_lora"]
    assert lora == 0.75 and {id(leaf) for leaf in _backward_leaves(lora)} == {id(parameter) for parameter in guidance.parameters()}


def test_parameters_and_state_are_found_under_inner():
    assert set(wrap("training").state_dict()) == {"inner.scale", "inner.bias"}
    assert not list(wrap("quadratic").parameters())


def test_no_loss_at_the_image_is_an_error_that_names_the_guidance():
    with pytest.raises(RuntimeError, match="inner_type: found 'toy-blind-guidance'.*loss_sds, loss_lora.*do not depend on the image"):
        wrap("blind")(views(1))
    assert set(wrap("blind", {"enabled": False})(views(1))) == {"loss_sds", "loss_lora"}


def test_nonfinite_gradients_are_zeroed_counted_and_reported():
    guidance, rgb = wrap("poisoned"), views(2)
    out = guidance(rgb)
    out["loss_sds"].backward()
    assert out["nonfinite_pixels"] == 2 and out["all_nonfinite"] == 0
    assert torch.isfinite(rgb.grad).all() and not rgb.grad[:, 3, 4].any() and rgb.grad[:, 0].all()
    rgb.grad = None
    out = wrap("poisoned", inner={"everywhere": True})(rgb)
    out["loss_sds"].backward()
    assert out["nonfinite_pixels"] == 2 * SIZE * SIZE and out["all_nonfinite"] == 1 and not rgb.grad.any()


def test_the_hosts_walk_tells_the_step_to_both_once():
    guidance, rgb = wrap("quadratic", {"threshold": [0, 0.5, 0.1, 100]}), views(1)
    found = []
    for step in (0, 50, 100):
        guidance.do_update_step(0, step)
        found.append(guidance(rgb)["threshold"])
        assert pixel_norm(image_gradient(guidance, rgb)).max() == pytest.approx(found[-1])
    assert found == [pytest.approx(0.5), pytest.approx(0.3), pytest.approx(0.1)]
    assert guidance.inner.steps == [0, 50, 100]


def test_an_adaptive_threshold_goes_on_from_the_runs_state():
    adaptive = {"threshold": {"quantile": 0.9}}

    def thresholds(guidance, batches):
        return [guidance(views(batch))["threshold"] for batch in batches]

    expected = thresholds(wrap("quadratic", adaptive), (1, 4, 2))
    begun, resumed = wrap("quadratic", adaptive), wrap("quadratic", adaptive)
    thresholds(begun, (1, 4))
    resumed.load_run_state(begun.run_state())
    assert thresholds(resumed, (2,)) == expected[2:] != thresholds(wrap("quadratic", adaptive), (2,))
    assert wrap("quadratic").run_state() == {}
    wrap("quadratic").load_run_state(begun.run_state())  # a fixed threshold has no use for it


def test_the_inner_guidances_state_is_kept_beside_it():
    @register("toy-remembering-guidance")
    class Remembering(Quadratic):
        memory = 0

        def run_state(self):
            return {"memory": self.memory}

        def load_run_state(self, state):
            self.memory = state["memory"]

    guidance, resumed = wrap("remembering"), wrap("remembering")
    guidance.inner.memory = 5
    assert guidance.run_state() == {"inner": {"memory": 5}}
    resumed.load_run_state(guidance.run_state())
    assert resumed.inner.memory == 5
    wrap("quadratic").load_run_state(guidance.run_state())  # another inner guidance than the checkpoint's


@pytest.mark.parametrize("batch", [1, 4])
def test_around_sdxl_without_pgc_it_is_sdxl_with_pgc(tiny_sdxl, tmp_path, batch):
    """Two ways to one gradient: the rule inside the split backward pass, and around the guidance as a whole."""
    model = {"pretrained_model_name_or_path": str(tiny_sdxl)}
    processor = registry.find(SHIPPED.system.prompt_processor_type)
    prompts = processor({"prompt": "a zebra vase", "cache_dir": str(tmp_path), **model})()
    cameras = {"elevation": torch.zeros(batch), "azimuth": torch.linspace(0, 300, batch), "camera_distances": torch.full((batch,), 2.2)}
    rgb, sdxl = views(batch, torch.float32), registry.find("pgc-sdxl-guidance")
    c = sdxl(model)(rgb, prompts, **cameras)["norm_p50"]
    inside = sdxl({**model, "pgc": {"threshold": c}})
    around = WrappedGuidance(
        {"inner_type": "pgc-sdxl-guidance", "inner": {**model, "pgc": {"enabled": False}}, "pgc": {"threshold": c}},
    )
    expected = image_gradient(inside, rgb, prompts, **cameras)
    torch.testing.assert_close(image_gradient(around, rgb, prompts, **cameras), expected, rtol=1e-4, atol=1e-9)


def config_file(folder, tiny_sdxl, **guidance):
    """The shipped texture run with a wrapped guidance in the place of its own."""
    config = SHIPPED.copy()
    config.system.guidance_type = "pgc-wrapped-guidance"
    config.system.guidance = guidance
    config.system.prompt_processor.pretrained_model_name_or_path = str(tiny_sdxl)
    config.system.prompt_processor.prompt = "a zebra vase"
    config.data.update(height=32, width=32, batch_size=2, eval_height=32, eval_width=32, n_test_views=2)
    OmegaConf.save(config, folder / "wrapped.yaml")
    return folder / "wrapped.yaml"


def train(config, folder, *overrides):
    run = (f"exp_root_dir={folder}", "use_timestamp=false", "tag=t", "name=n", f"system.prompt_processor.cache_dir={folder}/prompts")
    steps = ("trainer.max_steps=4", "checkpoint.every_n_train_steps=2", "trainer.log_every_n_steps=1", "system.exporter.texture_size=128")
    return launcher.main(["--config", str(config), "--train", "--gpu", "none", *run, *steps, *overrides])


def test_a_run_trains_and_resumes_around_a_guidance_without_pgc(tiny_sdxl, tmp_path):
    inner = {"pretrained_model_name_or_path": str(tiny_sdxl), "pgc": {"enabled": False}}
    config = config_file(tmp_path, tiny_sdxl, inner_type="pgc-sdxl-guidance", inner=inner, pgc={"threshold": {"quantile": 0.9}})
    assert train(config, tmp_path / "whole") == 0
    assert train(config, tmp_path / "parts", "trainer.max_steps=2") == 0
    last = "n/t/ckpts/last.ckpt"
    assert train(config, tmp_path / "parts", f"resume={tmp_path / 'parts' / last}") == 0
    whole, resumed = (torch.load(tmp_path / folder / last, weights_only=True) for folder in ("whole", "parts"))
    assert whole["pgc_guidance"]["threshold"]["steps"] == 4
    assert torch.equal(whole["pgc_guidance"]["threshold"]["counts"], resumed["pgc_guidance"]["threshold"]["counts"])
    assert not any("guidance" in key for key in whole["state_dict"]), "the frozen prior must not be saved"
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in whole["state_dict"].items())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("system.guidance.inner_type=toy-quadratc-guidance", ["system.guidance.inner_type", "toy-quadratic-guidance"]),
        ("system.guidance.inner.tarjet=1", ["system.guidance.inner.tarjet", "target"]),
        ("system.guidance.inner=target", ["system.guidance.inner"]),
    ],
)
def test_the_launcher_tells_bad_input_by_its_full_name(tiny_sdxl, tmp_path, capsys, override, told):
    config = config_file(tmp_path, tiny_sdxl, inner_type="toy-quadratic-guidance", inner={})
    assert train(config, tmp_path, override) != 0
    captured = capsys.readouterr()
    assert all(words in captured.out + captured.err for words in told)


def test_the_launcher_asks_for_the_inner_guidance(tiny_sdxl, tmp_path, capsys):
    assert train(config_file(tmp_path, tiny_sdxl, inner={}), tmp_path) != 0
    assert "system.guidance.inner_type: must be set" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "system.guidance.inner_type: found nothing"),
        ({"inner_type": "toy-quadratc-guidance"}, "did you mean 'toy-quadratic-guidance'"),
        ({"inner_type": "toy-quadratic-guidance", "inner": {"tarjet": 1.0}}, "tarjet.*target"),
        ({"inner_type": "toy-quadratic-guidance", "inner": "target"}, "inner.*str"),
        ({"inner_type": "toy-quadratic-guidance", "inner_divides": False}, "inner_divides.*inner_divides_by_batch"),
        ({"inner_type": "toy-quadratic-guidance", "pgc": {"rule": "clip"}}, "system.guidance.pgc.rule: found 'clip'"),
        ({"inner_type": "toy-quadratic-guidance", "pgc": {"pullback": "linear"}}, "pgc.pullback: found 'linear'.*own backward pass"),
        ({"inner_type": "toy-quadratic-guidance", "pgc": {"pullback": "none"}}, "pgc.pullback: found 'none', wanted 'vae'"),
        ({"inner_type": "toy-quadratic-guidance", "pgc": {"views_per_pullback": 2}}, "pgc.views_per_pullback: found 2.*own backward"),
        ({"inner_type": "toy-quadratic-guidance", "pgc": {"linear_map": "paper"}}, "system.guidance.pgc.linear_map"),
        ({"inner_type": "pgc-wrapped-guidance"}, "inner_type: found 'pgc-wrapped-guidance'.*wrapped already"),
        ({"inner_type": "pgc-sdxl-guidance"}, "system.guidance.inner.pgc.enabled: found True, wanted False"),
        ({"inner_type": "pgc-sdxl-guidance", "pgc": {"enabled": False}}, "system.guidance.inner.pgc.enabled: found True, wanted False"),
        ({"inner_type": "pgc-sdxl-guidance", "inner": {"pgc": {"rule": "none"}}}, "system.guidance.inner.pgc.enabled"),
    ],
)
def test_bad_config_is_refused_by_name(config, message):
    with pytest.raises(Exception, match=message):
        WrappedGuidance(config)


def test_a_second_wrapper_uses_the_first_ones_inner_guidance_where_it_is_the_same():
    first = wrap("quadratic")
    config = {"inner_type": "toy-quadratic-guidance", "inner": {}}
    assert WrappedGuidance(config, sharing=first, stream="normal-").inner is first.inner
    other = WrappedGuidance({**config, "inner": {"target": 0.7}}, sharing=first, stream="normal-")
    assert other.inner is not first.inner and other.inner.cfg.target == 0.7
