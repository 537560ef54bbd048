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


SIZES = {"data.batch_size", "data.height", "data.width", "data.eval_height", "data.eval_width"}
MODEL = ("pretrained_model_name_or_path", "vae_name_or_path", "controlnet_name_or_path")
CONTROL = ("controlnet_name_or_path", "control_kind", "control_scale", "normal_convention")
VSD = ("objective", "objective_options.lora_rank", "objective_options.lora_lr")
PBR = {
    f"system.material.{key}"
    for key in ("low", "high", "ranges", "light", "light_intensity", "light_rotation", "turn_light", "tone_mapping")
}
ADAPTIVE = ("pgc.threshold", "pgc.threshold.quantile")


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


@pytest.mark.parametrize("variant", ["", "-pbr"])
def test_the_bundled_models_config_is_the_papers_in_small(variant):
    sdxl, pocket = read(f"fantasia3d-sdxl-pgc{variant}"), read(f"fantasia3d-pocket-pgc{variant}")
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


# Of every other experiment: what it is about, so that a comparison of two of them compares that and nothing else.
ABOUT = {
    "fantasia3d-sdxl": {"system.guidance.pgc.enabled"},
    "fantasia3d-sdxl-pgc-normal": {f"system.guidance.{key}" for key in CONTROL},
    "fantasia3d-sdxl-pgc-vsd": {"data.batch_size", *(f"system.guidance.{key}" for key in ("guidance_scale", "cfg", *VSD))},
    "fantasia3d-sdxl-pgc-csd": {f"system.guidance.{key}" for key in ("objective", "guidance_scale", "cfg", *ADAPTIVE)},
    "fantasia3d-sdxl-pgc-pbr": {
        "system.material_type",
        "system.geometry.texture.n_output",
        "system.loss.lambda_base_color_smoothness",
        *PBR,
    },
    "sd3-pgc": {"system.guidance_type", *(f"system.guidance.{key}" for key in MODEL)},
    "fantasia3d-sd15-depth-pgc": {"system.guidance_type", "trainer.max_steps", *SIZES, *(f"system.guidance.{key}" for key in MODEL)},
}


@pytest.mark.parametrize("name", ABOUT)
def test_an_experiment_differs_from_the_papers_in_what_it_is_about(name):
    sdxl, other = read("fantasia3d-sdxl-pgc"), read(name)
    differs = {key for key in sdxl.keys() | other.keys() if key != "name" and sdxl.get(key, KeyError) != other.get(key, KeyError)}
    assert differs == ABOUT[name]


SHAPE = {"resolution", "representation", "shape.preset", "deformable", "shape_init", "shape_init_params"}
JOINT = {
    "system.stage",
    "system.export_after_training",
    "system.geometry_type",
    *(f"system.geometry.{key}" for key in SHAPE | {"mesh", "extent"}),
    *(f"system.renderer.{key}" for key in ("perturb", "normal_space", "normal_background")),
    *(f"system.normal_guidance.{key}" for key in ("guidance_scale", "controlnet_name_or_path")),
    *(f"system.loss.lambda_{key}" for key in ("normal_sds", "normal_consistency", "laplacian", "eikonal", "sdf_entropy")),
    *(f"system.optimizer.params.geometry.shape.{key}.lr" for key in ("encoding", "mlp")),
    "system.exporter.min_fragment",
}


def differing(one, other):
    one, other = read(one), read(other)
    return {key for key in one.keys() | other.keys() if key != "name" and one.get(key, KeyError) != other.get(key, KeyError)}


@pytest.mark.parametrize("name", ["sdxl-pgc", "sd15-depth"])
def test_the_second_setting_differs_from_the_first_in_the_shape(name):
    assert differing(f"fantasia3d-{name}", f"fantasia3d-joint-{name}") == JOINT


def test_the_second_settings_numbers_stand():
    config = read("fantasia3d-joint-sdxl-pgc")
    assert config["system.optimizer.params.geometry.shape.mlp.lr"] == 1e-5  # the paper's; the grid's is ten times that, as the authors'
    assert config["system.optimizer.params.geometry.texture.mlp.lr"] == 1e-3
    assert config["system.geometry.shape_init_params"] == 0.8
    assert config["system.normal_guidance.guidance_scale"] == 50.0


def test_the_bundled_models_shapes_are_those_in_small():
    shape = {
        f"system.geometry.{key}"
        for key in ("radius", "resolution", "shape.preset", "shape.n_levels", "shape.max_resolution", "shape_init", "shape_init_params")
    }
    rates = {f"system.optimizer.params.geometry.shape.{key}.lr" for key in ("encoding", "mlp")}
    more = {"system.normal_guidance.unet_name_or_path", "system.normal_guidance.guidance_scale"}
    more |= {"system.loss.lambda_normal_consistency", "system.normal_guidance.max_step_percent"}
    assert differing("fantasia3d-joint-sdxl-pgc", "fantasia3d-joint-pocket-pgc") <= MAY_DIFFER | shape | rates | more
    texture = {"system.geometry.texture", "system.geometry.texture.preset", "system.loss.lambda_normal_sds"}
    texture |= {f"system.optimizer.params.geometry.texture.{key}.lr" for key in ("encoding", "mlp")}
    assert differing("fantasia3d-joint-pocket-pgc", "fantasia3d-geometry-pocket-pgc") == texture | {
        "system.stage",
        "trainer.max_steps",
        "checkpoint.every_n_train_steps",
    }


def test_the_baseline_and_its_variants_differ_in_clipping_and_control():
    clipped = read("fantasia3d-sd15-depth-pgc")
    baseline, held = read("fantasia3d-sd15-depth"), read("fantasia3d-sd15-depth-normal-pgc")
    assert {key for key in clipped if clipped[key] != baseline[key]} == {"name", "system.guidance.pgc.enabled"}
    assert {key for key in held if held[key] != clipped.get(key, KeyError)} == {"name", *(f"system.guidance.{key}" for key in CONTROL)}
    assert (baseline["system.guidance.guidance_scale"], baseline["data.batch_size"], baseline["data.height"]) == (100.0, 4, 512)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_is_known(path):
    """Each block of each config is taken by the class it is for."""
    import threestudio_pgc.modules  # noqa: F401
    from threestudio_pgc.host import find, parse_structured
    from threestudio_pgc.pixelgrad import PGCConfig, check_pgc
    from threestudio_pgc.standalone.config import load_config

    mandatory = {"system.prompt_processor.prompt": "a vase", "data.image_path": "a.png"}
    missing = [f"{key}={value}" for key, value in mandatory.items() if read(path.stem).get(key) == "???"]
    config = load_config(path, cli_args=[*missing, "use_timestamp=false", "exp_root_dir=unused"])
    system = parse_structured(find(config.system_type).Config, config.system)
    normals = {**system.guidance, **system.get("normal_guidance", {})}
    parse_structured(find(system.guidance_type).Config, normals)
    parts = ["geometry", "material", "background", "renderer", "guidance", "exporter"]
    for part in parts + (["prompt_processor"] if system.prompt_processor_type else []):
        parse_structured(find(system[f"{part}_type"]).Config, system[part])
    check_pgc(parse_structured(PGCConfig, system.guidance.pgc))
