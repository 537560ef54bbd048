"""Distilling a picture or a texture, interrupted and not; and what is asked of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from launch_scripts.lab.image import distil_image, mean_numbers, read_picture
from launch_scripts.lab.routes import Objective
from launch_scripts.lab.runs import Interrupted, Monitor
from launch_scripts.lab.teacher import Model, Prompts
from launch_scripts.lab.texture import EVAL_VIEWS, TexturedObject, distil_texture, eval_cameras, eval_masks
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


@pytest.mark.parametrize("route", ["latent", "vae", "linear", "pgc-n-adaptive"])
def test_an_interrupted_image_is_the_uninterrupted_one_bit_for_bit(model, prompts, tmp_path, route):
    def distil(name, monitor=None):
        (tmp_path / name).mkdir(exist_ok=True)
        linear = PAPER_ENCODER if route == "linear" else None
        return distil_image(model, prompts, route, OBJECTIVE, steps=7, linear=linear, seed=3, folder=tmp_path / name, monitor=monitor)

    whole, log, last = distil("whole")
    with pytest.raises(Interrupted):
        distil("parts", StopAfter(4))
    assert (tmp_path / "parts" / "now.png").is_file(), "a picture of how far it is"
    again, again_log, again_last = distil("parts")
    assert torch.equal(whole, again) and log == again_log and torch.equal(last.raw, again_last.raw)
    assert whole.shape == (1, 32, 32, 3) and 0 <= whole.min() and whole.max() <= 1 and whole.std() > 0
    assert [entry["step"] for entry in log] == [0, 5] and mean_numbers(log)["norm_p50"] > 0


@pytest.mark.parametrize("route", ["latent", "pgc-n-adaptive"])
def test_an_interrupted_texture_is_the_uninterrupted_one_bit_for_bit(model, prompts, tmp_path, route):
    mesh = normalize(load_mesh("builtin:vase"))

    def distil(name, monitor=None):
        (tmp_path / name).mkdir(exist_ok=True)
        return distil_texture(
            model, prompts, mesh, route, OBJECTIVE, steps=5, views=2, preset="pocket", seed=3, folder=tmp_path / name, monitor=monitor
        )

    whole, _, _ = distil("whole")
    with pytest.raises(Interrupted):
        distil("parts", StopAfter(2))
    again, _, _ = distil("parts")
    for one, other in zip(whole.field.parameters(), again.field.parameters()):
        assert torch.equal(one, other)
    untouched = TexturedObject(mesh, model, _route(route), "pocket", seed=3)
    assert any(not torch.equal(one, other) for one, other in zip(whole.field.parameters(), untouched.field.parameters()))
    pictures = whole.look_at(eval_cameras(model))
    assert pictures.shape == (EVAL_VIEWS, 32, 32, 3) and 0 <= pictures.min() and pictures.max() <= 1


def _route(name):
    from launch_scripts.lab.routes import ROUTES

    return ROUTES[name]


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
