"""The lit material through the launcher, and what light does and does not do to its maps."""

import json

import numpy as np
import pytest
import torch

from tests.export.test_gltf import parse_glb
from threestudio_pgc.modules.material import PBR

CONFIG = "fantasia3d-pocket-pgc-pbr"


def settings(**changes):
    return {"light": "builtin:studio", **changes}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"light": "nowhere.hdr"}, "system.material.light: .*nowhere.hdr"),
        ({"light_intensity": 0.0}, "system.material.light_intensity: found 0.0"),
        ({"tone_mapping": "agx"}, "system.material.tone_mapping: found 'agx', wanted one of neutral"),
        ({"ranges": "mine"}, "system.material: material ranges: found 'mine'"),
        ({"roughness": [0.9, 0.1]}, "system.material: material roughness: found"),
        ({"roughness": 3}, "system.material: "),
        ({"low": 0.9, "high": 0.1}, "system.material: material base_color: found"),
    ],
)
def test_a_bad_setting_is_refused_by_its_key(change, message):
    with pytest.raises(ValueError, match=message):
        PBR(settings(**change))


def test_a_light_that_is_cut_short_is_refused_before_anything_is_built(launch, tmp_path, capsys):
    from threestudio_pgc.scene.hdr import LIGHTS_DIRECTORY

    whole = (LIGHTS_DIRECTORY / "studio.hdr").read_bytes()
    (tmp_path / "short.hdr").write_bytes(whole[: len(whole) // 2])
    assert launch("train", tmp_path / "run", f"system.material.light={tmp_path}/short.hdr", config=CONFIG) != 0
    assert "short.hdr" in capsys.readouterr().err
    assert not (tmp_path / "run" / "n").exists()


def test_a_field_with_too_few_features_is_refused_by_its_key(launch, tmp_path, capsys):
    assert launch("train", tmp_path, "system.geometry.texture.n_output=3", config=CONFIG) != 0
    assert "system.geometry.texture.n_output: found 3, wanted 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, change, message",
    [
        ("fantasia3d-pocket-pgc", "+lambda_material_smoothness", "lambda_material_smoothness: found 1.0, wanted 0"),
        (CONFIG, "+lambda_white_light", "lambda_white_light: found a weight, wanted 0, or system.material.trainable_light=true"),
    ],
)
def test_a_weight_that_nothing_answers_to_is_refused(launch, tmp_path, capsys, config, change, message):
    assert launch("train", tmp_path, f"system.loss.{change[1:]}=1.0", config=config) != 0
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    """Four steps with everything on: a trained light, both regularisers; and the export that follows."""
    folder = tmp_path_factory.mktemp("pbr")
    changes = ("system.material.trainable_light=true", "+system.optimizer.params.material.lr=0.01", "system.loss.lambda_white_light=1.0")
    changes = tuple(change.lstrip("+") for change in changes)
    changes += ("system.loss.lambda_material_smoothness=0.1", "system.export_after_training=true", "data.n_val_views=3")
    assert launch("train", folder, *changes, config=CONFIG) == 0
    return folder / "n" / "t"


def test_everything_that_is_optimised_moves(trained):
    first, last = (torch.load(next((trained / "ckpts").glob(f"*step={step}.ckpt")), weights_only=True)["state_dict"] for step in (2, 4))
    moved = {key.split(".")[0] for key in last if not torch.equal(first[key], last[key])}
    assert moved == {"geometry", "material"}
    assert any(key.startswith("material.light") for key in last)


def test_the_losses_of_maps_and_light_are_logged(trained):
    (log,) = trained.rglob("metrics.csv")
    header = log.read_text().splitlines()[0].split(",")
    assert {"train/loss_base_color_smoothness", "train/loss_material_smoothness", "train/loss_white_light"} <= set(header)


def test_validation_shows_the_maps_and_makes_a_turntable(trained):
    from PIL import Image

    with Image.open(trained / "save" / "it4-1.png") as picture:
        assert picture.size == (32 * 6, 32)  # lit, base colour, roughness, normal; then the mesh's normal and the mask
    assert (trained / "save" / "it4-val.mp4").is_file() and (trained / "save" / "it4-val-sheet.png").is_file()


def test_the_asset_has_a_material_and_a_normal_map(trained):
    (path,) = (trained / "save").glob("it4-export/*.glb")
    document, _ = parse_glb(path.read_bytes())
    (material,) = document["materials"]
    assert {"normalTexture", "occlusionTexture"} <= material.keys()
    assert {"baseColorTexture", "metallicRoughnessTexture"} <= material["pbrMetallicRoughness"].keys()
    assert "TANGENT" in json.dumps(document["meshes"])


def test_it_takes_the_place_of_a_colour_in_any_configuration(launch, tmp_path):
    """The joint stage too, where light falls on a shape that moves."""
    changes = ("system.material_type=pgc-pbr-material", "system.geometry.texture.n_output=9", "checkpoint.every_n_train_steps=1")
    assert launch("train", tmp_path, *changes, "trainer.max_steps=2", config="fantasia3d-joint-pocket-pgc") == 0
    first, last = (
        torch.load(next((tmp_path / "n" / "t" / "ckpts").glob(f"*step={step}.ckpt")), weights_only=True)["state_dict"] for step in (1, 2)
    )
    assert {key.split(".")[1] for key in last if not torch.equal(first[key], last[key])} == {"shape", "texture"}
    assert all(value.isfinite().all() for value in last.values())


def test_it_trains_in_mixed_precision(launch, tmp_path):
    assert launch("train", tmp_path, "trainer.precision=bf16-mixed", "trainer.max_steps=2", config=CONFIG) == 0
    state = torch.load(tmp_path / "n" / "t" / "ckpts" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_turning_the_light_depends_on_seed_and_step_alone():
    material = PBR(settings(turn_light=True, light_rotation=30.0))
    material.train()
    angles = []
    for step in (3, 4, 3):
        material.update_step(0, step)
        angles.append(float(material.light.rotation_deg))
    assert angles[0] == angles[2] != angles[1]
    material.eval()
    material.update_step(0, 5)
    assert material.light.rotation_deg == 30.0


# --- a scene whose base colour is known


def known_base_color(points):
    """(N, 3) points -> (N, 3) display RGB, smooth, of every hue."""
    return 0.45 + 0.3 * torch.sin(torch.stack([4 * points[:, 0], 4 * points[:, 1] + 1, 4 * points[:, 2] + 2], -1))


def fitted(color_of, observed, points, steps=150):
    """(N, 3) features per point, fitted by Adam to observed colours under every light in `observed`."""
    features = torch.zeros(len(points), 9, requires_grad=True)
    optimizer = torch.optim.Adam([features], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((color_of(features, light) - colors).square().mean() for light, colors in observed.items()).backward()
        optimizer.step()
    return features.detach()


def test_light_and_shadow_do_not_bake_into_the_base_colour():
    """One object of known base colour is seen under one light. The material, told of that light, recovers the base colour, and so its look
    under the other light; a colour without lighting takes the light for paint, and is wrong under both measures."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.nn.functional.normalize(torch.randn(600, 3, generator=generator), dim=-1)
    points, view = 0.8 * normal, normal
    studio, sky = (PBR(settings(light=name, normal=0.0, roughness=[0.8, 0.8])) for name in ("builtin:studio", "builtin:sky"))
    truth = known_base_color(points)
    in_range = (truth - 0.03) / 0.94
    true_features = torch.cat([torch.logit(in_range), torch.zeros(600, 6)], dim=-1)

    def look(features, light):
        return light(features, viewdirs=-view, shading_normal=normal)

    seen = {light: look(true_features, light) for light in (studio, sky)}
    recovered = fitted(look, {studio: seen[studio]}, points)
    found = studio.export(recovered)["albedo"]
    painted = seen[studio]  # what an albedo-only texture converges to: the picture itself

    def error(a, b):
        return float((a - b).square().mean().sqrt())

    visible = truth  # every point is seen here, none is fully dark in the studio
    assert error(found, visible) < 0.03 < error(painted, visible)
    assert error(look(recovered, sky), seen[sky]) < 0.03 < error(painted, seen[sky])
    assert np.isfinite(error(found, painted))
