"""The experiments for threestudio's own systems: what is ours in them is known to our classes, what is threestudio's to its own.

threestudio is not needed: the keys of its Config classes are listed here, as read from version 0.2.3.
"""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PATHS = sorted((CONFIGS / "threestudio").glob("*.yaml"))

EXPERIMENT = "name tag exp_root_dir seed data_type data system_type system trainer checkpoint"
RANDOM_CAMERAS = """
    height width batch_size resolution_milestones eval_height eval_width eval_batch_size n_val_views n_test_views elevation_range
    azimuth_range camera_distance_range fovy_range camera_perturb center_perturb up_perturb light_position_perturb light_distance_range
    eval_elevation_deg eval_camera_distance eval_fovy_deg light_sample_strategy batch_uniform_azimuth progressive_until rays_d_normalize
"""
SYSTEM = """
    geometry_type geometry material_type material background_type background renderer_type renderer guidance_type guidance
    prompt_processor_type prompt_processor exporter_type exporter loggers loss optimizer scheduler weights
"""
# Part of threestudio -> the keys it takes.
HOSTS = {
    "random-camera-datamodule": RANDOM_CAMERAS,
    "single-image-datamodule": """
        height width resolution_milestones default_elevation_deg default_azimuth_deg default_camera_distance default_fovy_deg image_path
        use_random_camera random_camera rays_noise_scale batch_size requires_depth requires_normal rays_d_normalize
    """,
    "dreamfusion-system": SYSTEM,
    "zero123-system": SYSTEM + "freq refinement ambient_ratio_min",
    "implicit-volume": """
        radius n_input_dims n_feature_dims density_activation density_bias density_blob_scale density_blob_std pos_encoding_config
        mlp_network_config normal_type finite_difference_normal_eps isosurface_threshold isosurface_resolution
    """,
    "diffuse-with-point-light-material": """
        ambient_light_color diffuse_light_color ambient_only_steps diffuse_prob textureless_prob albedo_activation soft_shading
    """,
    "neural-environment-map-background": "n_output_dims color_activation dir_encoding_config mlp_network_config random_aug eval_color",
    "solid-color-background": "n_output_dims color learned random_aug random_aug_prob",
    "nerf-volume-renderer": """
        radius num_samples_per_ray eval_chunk_size randomized near_plane far_plane return_comp_normal return_normal_perturb estimator
        grid_prune prune_alpha_threshold
    """,
}
# The losses each system reads, without which its step ends in an error.
LOSSES = {
    "dreamfusion-system": "sds orient sparsity opaque",
    "zero123-system": "sds rgb mask depth depth_rel normal normal_smooth 3d_normal_smooth orient sparsity opaque",
}


def read(path):
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def test_the_papers_other_pipelines_are_there():
    assert [path.stem for path in PATHS] == ["dreamfusion-sd21-pgc", "dreamfusion-sdxl-pgc", "zero123-sds-pgc"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_key_is_known(path):
    import threestudio_pgc.modules
    from threestudio_pgc.host import find, parse_structured
    from threestudio_pgc.pixelgrad import PGCConfig, check_pgc

    assert threestudio_pgc.modules
    config = OmegaConf.load(path)  # not resolved as a whole: some of its resolvers are threestudio's
    assert set(config) <= set(EXPERIMENT.split())
    system = config.system
    if "prompt_processor" in system:
        system.prompt_processor.prompt = "a vase"
    parts = [(config["data_type"], config["data"]), (config["system_type"], system)]
    parts += [(system[key], system.get(key.removesuffix("_type"), {})) for key in system if key.endswith("_type")]
    for name, block in parts:
        if name.startswith("pgc-"):
            parse_structured(find(name).Config, block)
        else:
            assert set(block) <= set(HOSTS[name].split()), name
    if "random_camera" in config["data"]:
        assert set(config["data"]["random_camera"]) <= set(RANDOM_CAMERAS.split())
    assert set(system["loss"]) == {f"lambda_{loss}" for loss in LOSSES[config["system_type"]].split()}
    check_pgc(parse_structured(PGCConfig, system["guidance"]["pgc"]))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_papers_clipping_is_on_and_the_guidance_is_ours(path):
    system = read(path)["system"]
    assert system["guidance"]["pgc"] == {
        "enabled": True,
        "rule": "clip-norm",
        "norm": "l2",
        "threshold": 0.1,
        "pullback": "vae",
        "views_per_pullback": "auto",
    }
    ours = {key for key in system if key.endswith("_type") and system[key].startswith("pgc-")}
    assert ours == {"guidance_type", "prompt_processor_type"} & set(system)


def test_models_are_those_of_the_other_experiments():
    def guidance(name):
        return read(CONFIGS / f"{name}.yaml")["system"]["guidance"]

    for name, other in (
        ("dreamfusion-sd21-pgc", "fantasia3d-geometry-sd21-pgc"),
        ("dreamfusion-sdxl-pgc", "fantasia3d-sdxl-pgc"),
        ("zero123-sds-pgc", "zero123-pgc"),
    ):
        ours, theirs = guidance(f"threestudio/{name}"), guidance(other)
        for key in ("pretrained_model_name_or_path", "vae_name_or_path"):
            assert ours.get(key) == theirs.get(key), (name, key)


def test_the_two_nerfs_differ_in_model_and_resolution():
    small, large = (read(CONFIGS / "threestudio" / f"dreamfusion-{model}-pgc.yaml") for model in ("sd21", "sdxl"))
    assert {key for key in small if small[key] != large[key]} == {"name", "data", "system"}
    assert {key for key in large["data"] if small["data"].get(key) != large["data"][key]} == {
        "batch_size",
        "height",
        "width",
        "resolution_milestones",
    }
    assert {key for key in small["system"] if small["system"][key] != large["system"][key]} == {"guidance_type", "guidance"}
    differ = {key for key in small["system"]["guidance"] if small["system"]["guidance"][key] != large["system"]["guidance"][key]}
    assert differ == {"pretrained_model_name_or_path", "vae_name_or_path"}
