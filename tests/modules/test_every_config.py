"""Every shipped experiment, through the launcher, with tiny random models of the same families: two steps, a turntable, a checkpoint."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from threestudio_pgc.diffusion.model_files import FAMILIES

DOC = (Path(__file__).resolve().parents[2] / "docs" / "shapes.md").read_text()
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
FAMILY = {guidance: family for family, (_, guidance) in FAMILIES.items()}


def overrides(config, models, picture, folder):
    """What makes a config small: models, picture sizes, steps. Everything else stays as shipped."""
    guidance = config.system.guidance
    model, controlnet = models[FAMILY[config.system.guidance_type]]
    changes = [
        *(f"exp_root_dir={folder}", "use_timestamp=false", "name=n", "tag=t"),
        *("data.height=32", "data.width=32", "data.batch_size=2", "data.eval_height=32", "data.eval_width=32", "data.n_test_views=1"),
        *("trainer.max_steps=2", "trainer.val_check_interval=2", "checkpoint.every_n_train_steps=2", "trainer.log_every_n_steps=1"),
        "system.exporter.texture_size=128",
        f"system.guidance.pretrained_model_name_or_path={model}",
        *(("system.guidance.vae_name_or_path=null",) if "vae_name_or_path" in guidance else ()),
        *(("system.geometry.texture.preset=pocket",) if config.system.geometry.texture is not None else ()),
    ]
    if config.system.geometry_type == "pgc-dmtet":
        changes += ["system.geometry.resolution=16", "system.geometry.shape.preset=pocket", "system.geometry.shape_init_steps=40"]
    if "unet_name_or_path" in config.system.get("normal_guidance", {}):
        changes.append("system.normal_guidance.unet_name_or_path=null")
    if "prompt_processor" in config.system:
        changes += [f"system.prompt_processor.cache_dir={folder}/prompts", "system.prompt_processor.prompt=a zebra vase"]
    nets = guidance.get("controlnet_name_or_path")
    if nets is not None:
        single = isinstance(nets, str)
        changes.append(f"system.guidance.controlnet_name_or_path={controlnet if single else [str(controlnet)] * len(nets)}")
    if config.data_type == "pgc-single-image-datamodule":
        changes.append(f"data.image_path={picture}")
    return changes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains_two_steps(path, tiny_models, disc, tmp_path):
    import threestudio_pgc.modules  # noqa: F401  registers the parts once
    from threestudio_pgc.standalone.launcher import main

    config = OmegaConf.load(path)
    changes = overrides(config, tiny_models, disc, tmp_path)
    assert main(["--config", str(path), "--train", "--gpu", "none", *changes]) == 0
    run = tmp_path / "n" / "t"
    assert (run / "ckpts" / "last.ckpt").is_file() and (run / "save" / "it2-test" / "0.png").is_file()
    assert (run / "save" / "it2-control.png").is_file() == (config.system.guidance.get("controlnet_name_or_path") is not None)


def test_every_experiment_of_the_issue_is_shipped():
    shipped = {path.stem for path in CONFIGS}
    sdxl = {f"fantasia3d-sdxl{end}" for end in ("", "-pgc", "-pgc-normal", "-pgc-vsd", "-pgc-csd", "-pgc-pbr")}
    sd = {f"fantasia3d-sd15-depth{end}" for end in ("", "-pgc", "-normal-pgc")}
    shapes = {
        f"fantasia3d-{name}"
        for name in ("geometry-pocket-pgc", "geometry-sd21-pgc", "joint-pocket-pgc", "joint-sdxl-pgc", "joint-sd15-depth")
    }
    assert shipped == sdxl | sd | shapes | {"zero123-pgc", "sd3-pgc", "fantasia3d-pocket-pgc", "fantasia3d-pocket-pgc-pbr"}


# The paper's Figure 4: what differs from its own method, fantasia3d-joint-sdxl-pgc.yaml, or from the baseline.
FIGURE_4 = {
    "Fantasia3D": ("fantasia3d-joint-sd15-depth", []),
    "+SDXL": ("fantasia3d-joint-sdxl-pgc", ["system.guidance.pgc.enabled=false"]),
    "+PGC": ("fantasia3d-joint-sd15-depth", ["system.guidance.pgc.enabled=true"]),
    "+SDXL+PGC": ("fantasia3d-joint-sdxl-pgc", []),
    "without normal-SDS": ("fantasia3d-joint-sdxl-pgc", ["system.loss.lambda_normal_sds=0"]),
    "geometry only": ("fantasia3d-joint-sdxl-pgc", ["system.stage=geometry"]),
}


@pytest.mark.parametrize("name", FIGURE_4)
def test_every_method_of_figure_4_is_an_override(name, tiny_models, disc, tmp_path):
    import torch

    import threestudio_pgc.modules  # noqa: F401
    from threestudio_pgc.standalone.launcher import main

    stem, changes = FIGURE_4[name]
    path = CONFIGS[0].parent / f"{stem}.yaml"
    assert f"{stem}.yaml" in DOC and all(f"`{change}`" in DOC for change in changes), "docs/shapes.md says how"
    changes = [*overrides(OmegaConf.load(path), tiny_models, disc, tmp_path), "checkpoint.every_n_train_steps=1", *changes]
    assert main(["--config", str(path), "--train", "--gpu", "none", *changes]) == 0
    first, last = (
        torch.load(next((tmp_path / "n" / "t" / "ckpts").glob(f"*step={step}*.ckpt")), weights_only=True)["state_dict"] for step in (1, 2)
    )
    moved = {name.split(".")[1] for name in last if not torch.equal(first[name], last[name])}
    assert moved == ({"shape"} if name == "geometry only" else {"shape", "texture"})
