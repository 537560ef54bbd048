"""The shipped experiments."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# What may differ between the paper's setting and the bundled model's: names and ids, sizes, step counts, guidance scale.
MAY_DIFFER = {
    "name",
    "data.batch_size",
    "data.height",
    "data.width",
    "data.eval_height",
    "data.eval_width",
    "data.n_test_views",
    "system.geometry.texture.preset",
    "system.guidance.pretrained_model_name_or_path",
    "system.guidance.vae_name_or_path",
    "system.guidance.controlnet_name_or_path",
    "system.guidance.guidance_scale",
    "trainer.max_steps",
    "trainer.val_check_interval",
    "checkpoint.every_n_train_steps",
}


def flat(config, prefix=""):
    result = {}
    for key, value in config.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def read(name):
    return flat(OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"), resolve=False))


def test_the_bundled_models_config_is_the_papers_in_small():
    sdxl, pocket = read("fantasia3d-sdxl-pgc"), read("fantasia3d-pocket-pgc")
    assert sdxl.keys() == pocket.keys()
    assert {key for key in sdxl if sdxl[key] != pocket[key]} <= MAY_DIFFER


def test_the_papers_numbers_stand():
    config = read("fantasia3d-sdxl-pgc")
    assert config["data.focal_range"] == [0.7, 1.35]
    assert config["data.camera_distance_range"] == [2.0, 2.5]
    assert config["data.elevation_range"] == [-10, 45]
    assert config["data.azimuth_range"] == [0, 360]
    assert config["system.geometry.extent"] == 0.8
    assert config["system.guidance.guidance_scale"] == 100.0
    assert (config["system.guidance.min_step_percent"], config["system.guidance.max_step_percent"]) == (0.02, 0.5)
    assert config["system.guidance.weighting_strategy"] == "sds"
    assert (config["system.guidance.pgc.rule"], config["system.guidance.pgc.norm"]) == ("clip-norm", "l2")
    assert config["system.guidance.pgc.threshold"] == 0.1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_is_known(path):
    """Each block of each config is taken by the class it is for."""
    import threestudio_pgc.modules  # noqa: F401
    from threestudio_pgc.host import find, parse_structured
    from threestudio_pgc.pixelgrad import PGCConfig, check_pgc
    from threestudio_pgc.standalone.config import load_config

    config = load_config(path, cli_args=["system.prompt_processor.prompt=a vase", "use_timestamp=false", "exp_root_dir=unused"])
    system = parse_structured(find(config.system_type).Config, config.system)
    for part in ("geometry", "material", "background", "renderer", "prompt_processor", "guidance", "exporter"):
        parse_structured(find(system[f"{part}_type"]).Config, system[part])
    check_pgc(parse_structured(PGCConfig, system.guidance.pgc))
