"""Shapes that move, pictures in place of prompts, and NeRF, in threestudio."""

import pytest
import torch

from tests.host.conftest import REPOSITORY, SMALL_DATA, SMALL_RUN

SMALL_SHAPE = ("system.geometry.resolution=16", "system.geometry.shape_init_steps=60", "system.geometry.shape.max_resolution=16")


def test_a_shape_is_made_and_handed_over_to_the_texture_stage(host, small):
    shape = host("train", "fantasia3d-geometry-sd21-pgc", *small("sd", control=False), *SMALL_SHAPE, "system.latent_steps=1")
    assert shape.code == 0, shape.log[-3000:]
    assert len(shape.numbers()["train/loss_sds"]) == 2 and shape.files("save/it2-export/model.glb")

    config, overrides = "fantasia3d-sdxl-pgc", [*small("sdxl"), f"system.geometry_convert_from={shape.last}"]
    texture = host("train", config, *overrides, name="handed-over")
    assert texture.code == 0, texture.log[-3000:]
    vertices = texture.checkpoint()["state_dict"]["geometry.mesh.vertices"]
    assert len(vertices) > 100 and float(vertices.norm(dim=-1).mean()) == pytest.approx(0.5, abs=0.1)

    (shape.last.parent.parent / "configs/parsed.yaml").unlink()  # nothing of the earlier stage is read again
    exported = host("export", config, *overrides, f"resume={texture.last}", name="handed-over-export")
    assert exported.code == 0 and exported.files("save/it2-export/model.glb"), exported.log[-3000:]


def test_a_shape_and_its_texture_move_together(host, small):
    run = host("train", "fantasia3d-joint-sd15-depth", *small("sd"), *SMALL_SHAPE, "system.geometry.texture.preset=pocket")
    assert run.code == 0, run.log[-3000:]
    assert {"train/loss_sds", "train/loss_normal_sds"} <= set(run.numbers())


def test_a_picture_in_place_of_a_prompt(host, small):
    picture = host.root / "load/images/hamburger_rgba.png"
    overrides = [*small("zero123", control=False), f"data.image_path={picture}"]
    run = host("train", "zero123-pgc", *overrides, name="picture")
    assert run.code == 0, run.log[-3000:]
    assert {"train/loss_sds", "train/loss_reference_rgb"} <= set(run.numbers())
    for mode, made in (("test", "save/it2-test.mp4"), ("export", "save/it2-export/model.glb")):
        shown = host(mode, "zero123-pgc", *overrides, f"resume={run.last}", name=f"picture-{mode}")
        assert shown.code == 0 and shown.files(made), shown.log[-3000:]


@pytest.mark.parametrize("name, family", [("dreamfusion-sd21-pgc", "sd"), ("dreamfusion-sdxl-pgc", "sdxl")])
def test_nerf_trains_with_stand_ins_for_its_cuda_packages(host, tiny_models, tmp_path, name, family):
    if not (REPOSITORY / "configs/threestudio" / f"{name}.yaml").exists():
        pytest.skip(f"configs/threestudio/{name}.yaml is not there")
    overrides = [
        *SMALL_DATA,
        *SMALL_RUN,
        *("data.batch_size=1", "system.renderer.num_samples_per_ray=32", f"system.prompt_processor.cache_dir={tmp_path}"),
        *("system.geometry.pos_encoding_config.n_levels=4", "system.geometry.pos_encoding_config.log2_hashmap_size=12"),
        *("system.geometry.pos_encoding_config.start_level=2", "system.prompt_processor.prompt=a vase"),
        f"system.guidance.pretrained_model_name_or_path={tiny_models[family][0]}",
        *(() if family == "sd" else ("system.guidance.vae_name_or_path=null",)),
    ]
    config = f"configs/threestudio_pgc/threestudio/{name}.yaml"
    run = host("train", config, *overrides, name=name)
    assert run.code == 0, run.log[-3000:]
    assert run.files("save/it2-test.mp4") and run.numbers()["train/grad_norm"][0] > 0
    longer = host("train", config, *overrides, "trainer.max_steps=4", f"resume={run.last}", name=f"{name}-on")
    assert longer.code == 0, longer.log[-3000:]
    before, after = run.checkpoint()["state_dict"], longer.checkpoint()["state_dict"]
    assert not torch.equal(before["geometry.encoding.encoding.encoding.params"], after["geometry.encoding.encoding.encoding.params"])
