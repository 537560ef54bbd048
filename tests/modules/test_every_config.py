"""Every shipped experiment, through the launcher, with tiny random models of the same families: two steps, a turntable, a checkpoint."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from threestudio_pgc.diffusion.model_files import FAMILIES

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
        f"system.guidance.pretrained_model_name_or_path={model}",
        *(("system.guidance.vae_name_or_path=null",) if "vae_name_or_path" in guidance else ()),
        "system.geometry.texture.preset=pocket",
    ]
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
    sdxl = {f"fantasia3d-sdxl{end}" for end in ("", "-pgc", "-pgc-normal", "-pgc-vsd", "-pgc-csd")}
    sd = {f"fantasia3d-sd15-depth{end}" for end in ("", "-pgc", "-normal-pgc")}
    assert shipped == sdxl | sd | {"zero123-pgc", "sd3-pgc", "fantasia3d-pocket-pgc"}
