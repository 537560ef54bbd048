"""Distilling a picture or a texture, interrupted and not; and what is asked of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from launch_scripts.lab.image import distil_image, mean_numbers, read_picture
from launch_scripts.lab.routes import Objective
from launch_scripts.lab.runs import Interrupted, Monitor
from launch_scripts.lab.teacher import POCKET, POCKET_NEGATIVE, Model, Prompts, latent_channels, load_prior
from launch_scripts.lab.texture import EVAL_VIEWS, SECONDS, TexturedObject, distil_texture, eval_cameras, eval_masks
from threestudio_pgc.diffusion.model_files import local_folder
from threestudio_pgc.pixelgrad.linear_map import PAPER_ENCODER
from threestudio_pgc.scene.mesh import load_mesh, normalize


@pytest.fixture(scope="module")
def model(tiny_sdxl):
    return Model(prior=str(tiny_sdxl))


@pytest.fixture(scope="module")
def prompts(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Prompts(model, "a zebra vase")


class StopAfter(Monitor):
    def __init__(self, steps):
        self.left = steps
        super().__init__(self.count, lambda: self.left <= 0)

    def count(self, steps):
        self.left -= steps


OBJECTIVE = Objective(guidance_scale=7.0, quantile=0.9, window=3)
# At a rate at which a few steps of the adapter tell.
VSD = Objective(method="vsd", method_options=(("lora_lr", 0.1),), quantile=0.9, window=3)


@pytest.mark.parametrize(
    ("route", "objective"),
    [("latent", OBJECTIVE), ("vae", OBJECTIVE), ("linear", OBJECTIVE), ("pgc-n-adaptive", OBJECTIVE), ("vae", VSD)],
)
def test_an_interrupted_image_is_the_uninterrupted_one_bit_for_bit(model, prompts, tmp_path, route, objective):
    def distil(name, monitor=None):
        (tmp_path / name).mkdir(exist_ok=True)
        linear = PAPER_ENCODER if route == "linear" else None
        return distil_image(model, prompts, route, objective, steps=7, linear=linear, seed=3, folder=tmp_path / name, monitor=monitor)

    whole, log, last = distil("whole")
    with pytest.raises(Interrupted):
        distil("parts", StopAfter(4))
    assert (tmp_path / "parts" / "now.png").is_file(), "a picture of how far it is"
    again, again_log, again_last = distil("parts")
    assert torch.equal(whole, again) and log == again_log and torch.equal(last.raw, again_last.raw)
    assert whole.shape == (1, 32, 32, 3) and 0 <= whole.min() and whole.max() <= 1 and whole.std() > 0
    assert [entry["step"] for entry in log] == [0, 5] and mean_numbers(log)["norm_p50"] > 0


@pytest.mark.parametrize(("route", "objective"), [("latent", OBJECTIVE), ("pgc-n-adaptive", OBJECTIVE), ("pgc-n-adaptive", VSD)])
def test_an_interrupted_texture_is_the_uninterrupted_one_bit_for_bit(model, prompts, tmp_path, route, objective):
    mesh = normalize(load_mesh("builtin:vase"))

    def distil(name, monitor=None):
        (tmp_path / name).mkdir(exist_ok=True)
        return distil_texture(
            model, prompts, mesh, route, objective, steps=6, views=2, preset="pocket", seed=3, folder=tmp_path / name, monitor=monitor
        )

    whole, log, _ = distil("whole")
    with pytest.raises(Interrupted):
        distil("parts", StopAfter(2))
    again, again_log, _ = distil("parts")
    for one, other in zip(whole.field.parameters(), again.field.parameters()):
        assert torch.equal(one, other)
    assert all(entry.pop(SECONDS) > 0 for entry in log + again_log) and log == again_log
    assert ("lora_error" in log[-1]) == (objective is VSD)
    untouched = TexturedObject(mesh, model, _route(route), "pocket", seed=3)
    assert any(not torch.equal(one, other) for one, other in zip(whole.field.parameters(), untouched.field.parameters()))
    pictures = whole.look_at(eval_cameras(model))
    assert pictures.shape == (EVAL_VIEWS, 32, 32, 3) and 0 <= pictures.min() and pictures.max() <= 1


def _route(name):
    from launch_scripts.lab.routes import ROUTES

    return ROUTES[name]


def test_the_adapter_of_a_run_is_told_the_camera_and_leaves_the_next_run_a_clean_network(model, prompts, tmp_path):
    load_prior.cache_clear()
    before = load_prior(model)

    def distil(camera):
        options = (("lora_lr", 0.1), ("camera", camera))
        (tmp_path / str(camera)).mkdir()
        thing, _, _ = distil_texture(
            model,
            prompts,
            normalize(load_mesh("builtin:vase")),
            "vae",
            Objective(method="vsd", method_options=options),
            steps=3,
            views=1,
            preset="pocket",
            folder=tmp_path / str(camera),
        )
        return thing

    fields = [list(distil(camera).field.parameters()) for camera in (True, False)]
    assert any(not torch.equal(one, other) for one, other in zip(*fields))
    assert load_prior(model) is before
    assert not any(layer._forward_hooks for layer in before.network.modules())


@pytest.mark.parametrize("family", ["sd", "sd-v", "sd3"])
def test_any_family_that_takes_a_prompt_is_distilled(tiny_models, tmp_path, family, monkeypatch):
    monkeypatch.setenv("PGC_CACHE", str(tmp_path / "cache"))
    folder, controlnet = tiny_models[family]
    model = Model(prior=str(folder), controlnet=None if controlnet is None else str(controlnet))
    assert latent_channels(model) == load_prior(model).latent_channels == (16 if family == "sd3" else 4)
    prompts = Prompts(model, "a zebra vase")
    for name in ("image", "texture"):
        (tmp_path / name).mkdir()
    plain = Model(prior=str(folder))  # a picture has no depth for a ControlNet
    picture, _, last = distil_image(plain, prompts, "pgc-n", OBJECTIVE, steps=2, folder=tmp_path / "image")
    assert picture.shape == (1, 32, 32, 3) and last.raw.abs().sum() > 0
    mesh = normalize(load_mesh("builtin:vase"))
    thing, log, last = distil_texture(
        model, prompts, mesh, "pgc-n", OBJECTIVE, steps=2, views=1, preset="pocket", folder=tmp_path / "texture"
    )
    assert thing.look_at(eval_cameras(model)[:1]).shape == (1, 32, 32, 3) and last.raw.abs().sum() > 0 and log


def test_channels_are_known_before_a_flux_is_loaded(tiny_models):
    assert latent_channels(Model(prior=str(tiny_models["flux"][0]))) == 16


def test_a_negative_prompt_of_its_own_stands_beside_the_empty_prompt(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PGC_CACHE", str(tmp_path))
    prompts, plain = Prompts(model, "a zebra vase", "red"), Prompts(model, "a zebra vase")
    together, apart = prompts.plain(2), prompts.plain(2, separate_negative=True)
    assert together.negatives is None and apart.negatives.shape == (1, *apart.uncond.shape)
    assert torch.equal(apart.negatives[0], together.uncond) and torch.equal(apart.pooled_negatives[0], together.pooled_uncond)
    assert torch.equal(apart.uncond, plain.plain(2).uncond) and not torch.equal(apart.uncond, together.uncond)


def test_the_bundled_models_negative_prompt_is_in_its_vocabulary():
    known = (local_folder(POCKET) / "vocabulary.txt").read_text().split()
    assert set(POCKET_NEGATIVE.replace(",", "").split()) <= set(known)


def test_the_object_is_where_the_masks_say(model):
    mesh = normalize(load_mesh("builtin:bunny"))
    thing = TexturedObject(mesh, model, _route("vae"), "pocket", seed=0)
    masks = eval_masks("builtin:bunny", 32)
    pictures = thing.look_at(eval_cameras(model))
    assert masks.shape == (EVAL_VIEWS, 32, 32) and masks.any(dim=(1, 2)).all()
    assert (pictures[~masks] == 1).all() and (pictures[masks] < 1).all(), "white is background"


def test_a_latent_texture_is_seen_in_front_of_an_encoded_background(model):
    thing = TexturedObject(normalize(load_mesh("builtin:vase")), model, _route("latent"), "pocket", seed=0)
    cameras = eval_cameras(model)[:1]
    white = torch.ones(1, 32, 32, 3)
    latents = thing.render(cameras, white)
    behind = thing.prior.encode(white).movedim(1, -1)
    assert latents.shape == (1, 8, 8, 4) and torch.equal(latents[0, 0, 0], behind[0, 0, 0]) and not torch.equal(latents, behind)


def test_pictures_are_cut_to_a_square_and_bad_ones_named(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png").shape == (1, 10, 30, 3)
    assert read_picture(tmp_path / "wide.png", 8).min() > 0.9
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    for name in ("text.png", "cut.png", "nowhere.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a picture"):
            read_picture(tmp_path / name)
