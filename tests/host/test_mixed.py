"""Parts of this package in threestudio's own systems, and parts of threestudio in this package's system: what goes together."""

from dataclasses import dataclass, field

import pytest
from PIL import Image

from tests.host.conftest import SMALL_DATA, SMALL_RUN

OURS = "configs/threestudio_pgc/fantasia3d-sdxl-pgc.yaml"
GRID = {
    "otype": "HashGrid",
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 12,
    "base_resolution": 16,
    "per_level_scale": 1.5,
}
TETRAHEDRA = {"isosurface_resolution": 32, "shape_init": "sphere", "shape_init_params": 0.5, "pos_encoding_config": GRID}
ADAM = {"name": "Adam", "args": {"lr": 0.01}}
HOST_GUIDANCE = {"pretrained_model_name_or_path": "{sd}", "half_precision_weights": False}
HOST_PROMPTS = {"pretrained_model_name_or_path": "{sd}", "prompt": "a vase", "spawn": False, "use_cache": False}
WRAPPED = {"inner_type": "stable-diffusion-guidance", "inner": HOST_GUIDANCE}

SMALL = ("data.batch_size=1", "trainer.max_steps=1", "trainer.val_check_interval=1", "data.n_val_views=1", "trainer.num_sanity_val_steps=0")
SMALL_GRID = ("system.geometry.pos_encoding_config.n_levels=4", "system.geometry.pos_encoding_config.log2_hashmap_size=12")
SMALL_NERF = (*SMALL_GRID, "system.renderer.num_samples_per_ray=16")
SMALL_TETRAHEDRA = (*SMALL_GRID, "system.geometry.isosurface_resolution=32")


def guidance(family, processor="pgc-prompt-processor"):
    """Overrides of one of the host's configurations: types and models alone."""
    name = {"sd": "pgc-stable-diffusion-guidance", "sdxl": "pgc-sdxl-guidance", "zero123": "pgc-zero123-guidance"}[family]
    chosen = [f"system.guidance_type={name}", f"system.guidance.pretrained_model_name_or_path={{{family}}}"]
    if family == "zero123":
        return tuple(chosen)
    chosen += [f"system.prompt_processor.pretrained_model_name_or_path={{{family}}}", "system.prompt_processor.prompt=a vase"]
    chosen.append(f"system.prompt_processor_type={processor}")
    chosen += ["system.prompt_processor.cache_dir={prompts}"] if processor.startswith("pgc") else []
    chosen += ["system.prompt_processor.spawn=false", "system.prompt_processor.use_cache=false"] if not processor.startswith("pgc") else []
    return tuple(chosen)


@dataclass
class Case:
    """A configuration, blocks of it replaced as if by hand, overrides, how it is run; and what it says where it is refused."""

    config: str
    blocks: dict = field(default_factory=dict)
    overrides: tuple = ()
    mode: str = "train"
    refusal: str = ""


def nerf(family, processor="pgc-prompt-processor", **kwargs):
    coarse = ("system.geometry.pos_encoding_config.start_level=2",)
    return Case("configs/dreamfusion-sd.yaml", overrides=(*SMALL_NERF, *coarse, *guidance(family, processor)), **kwargs)


def ours(changed, to, blocks=None, overrides=(), **kwargs):
    """This package's configuration with another part."""
    model = ("system.guidance.pretrained_model_name_or_path={sdxl}", "system.prompt_processor.cache_dir={prompts}")
    none = ("system.guidance.vae_name_or_path=null", "system.guidance.controlnet_name_or_path=null")
    chosen = ("system.prompt_processor.prompt=a vase", f"system.{changed}_type={to}")
    blocks = {f"system.{changed}": {}} if blocks is None else blocks
    return Case(OURS, blocks, (*model, *none, *chosen, *overrides), **kwargs)


def around(config, guidance_type, block, overrides=()):
    types = (f"system.guidance_type={guidance_type}", "system.prompt_processor_type=stable-diffusion-prompt-processor")
    return Case(config, {"system.guidance": block, "system.prompt_processor": HOST_PROMPTS}, (*types, *overrides))


HOST_PROCESSOR = "stable-diffusion-prompt-processor"
OURS_IN_HOST = {
    "system.geometry": {},
    "system.renderer": {"backend": "auto"},
    "system.material": {},
    "system.background": {},
}
OUR_TYPES = (
    *("system.geometry_type=pgc-textured-mesh", "system.renderer_type=pgc-mesh-rasterizer", "system.geometry_convert_from=null"),
    *("system.material_type=pgc-albedo-material", "system.background_type=pgc-background"),
)
SMALL_ZERO123 = tuple(
    f"data.{key}={value}"
    for key, value in {
        **{"height": 32, "width": 32, "resolution_milestones": "[]"},
        **{f"random_camera.{key}": 32 for key in ("height", "width", "eval_height", "eval_width")},
        **{"random_camera.batch_size": 1, "random_camera.resolution_milestones": "[]"},
        **{"random_camera.n_val_views": 2, "random_camera.n_test_views": 2},
    }.items()
)

CASES = {
    # this package's guidance in threestudio's systems
    "dreamfusion-system, SD": nerf("sd"),
    "dreamfusion-system, SDXL": nerf("sdxl"),
    "dreamfusion-system, SD, the host's prompts": nerf("sd", HOST_PROCESSOR),
    "dreamfusion-system, SDXL, the host's prompts": nerf(
        "sdxl", HOST_PROCESSOR, refusal="prompt_processor_type: found one of threestudio's"
    ),
    "dreamfusion-system, wrapped": around("configs/dreamfusion-sd.yaml", "pgc-wrapped-guidance", WRAPPED, SMALL_NERF),
    "zero123-system": Case("configs/zero123.yaml", overrides=(*SMALL_NERF, *SMALL_ZERO123, *guidance("zero123"))),
    "zero123-system, our configuration": Case(
        "configs/threestudio_pgc/threestudio/zero123-sds-pgc.yaml",
        overrides=(*SMALL_NERF, *SMALL_ZERO123, "system.guidance.pretrained_model_name_or_path={zero123}"),
    ),
    # threestudio's parts in this package's system
    "no-material": ours("material", "no-material"),
    "diffuse-with-point-light-material": ours("material", "diffuse-with-point-light-material"),
    "pbr-material": ours(
        *("material", "pbr-material", {"system.material": {"use_bump": False}}), overrides=("system.geometry.texture.n_output=5",)
    ),
    "pbr-material, bump": ours("material", "pbr-material", overrides=("system.geometry.texture.n_output=8",), refusal="AssertionError"),
    "solid-color-background": ours("background", "solid-color-background"),
    "neural-environment-map-background": ours("background", "neural-environment-map-background"),
    "random-camera-datamodule": ours("background", "pgc-background", {"data": {}}, overrides=("data_type=random-camera-datamodule",)),
    "nvdiff-rasterizer": ours("renderer", "nvdiff-rasterizer"),
    "nvdiff-rasterizer, depth control": ours(
        *("renderer", "nvdiff-rasterizer"),
        overrides=("system.guidance.controlnet_name_or_path={controlnet}",),
        refusal="control kind 'depth': found the buffers opacity, wanted depth too",
    ),
    "tetrahedra-sdf-grid, nvdiff-rasterizer": ours(
        *("geometry", "tetrahedra-sdf-grid"),
        {"system.geometry": TETRAHEDRA, "system.renderer": {}, "system.optimizer": ADAM},
        overrides=("system.renderer_type=nvdiff-rasterizer",),
    ),
    "tetrahedra-sdf-grid": ours("geometry", "tetrahedra-sdf-grid", {"system.geometry": TETRAHEDRA, "system.optimizer": ADAM}),
    "tetrahedra-sdf-grid, depth control": ours(
        *("geometry", "tetrahedra-sdf-grid"),
        {"system.geometry": TETRAHEDRA, "system.optimizer": ADAM},
        overrides=("system.guidance.controlnet_name_or_path={controlnet}",),
    ),
    "tetrahedra-sdf-grid, our exporter": ours(
        *("geometry", "tetrahedra-sdf-grid", {"system.geometry": TETRAHEDRA, "system.optimizer": ADAM}),
        overrides=("system.export_after_training=true", "system.exporter.texture_size=64"),
    ),
    "mesh-exporter": ours("exporter", "mesh-exporter", {"system.exporter": {"texture_size": 64}}, mode="export"),
    "wrapped": around(OURS, "pgc-wrapped-guidance", WRAPPED),
    # this package's other parts in threestudio's systems
    "fantasia3d-system, our scene": Case("configs/fantasia3d-texture.yaml", OURS_IN_HOST, (*OUR_TYPES, *guidance("sdxl"))),
    "fantasia3d-system, our mesh, the host's renderer": Case(
        "configs/fantasia3d-texture.yaml",
        {key: value for key, value in OURS_IN_HOST.items() if key != "system.renderer"},
        (*OUR_TYPES, *guidance("sdxl"), "system.renderer_type=nvdiff-rasterizer"),
    ),
    "fantasia3d-system, our exporter": Case(
        *("configs/fantasia3d-texture.yaml", OURS_IN_HOST),
        (*OUR_TYPES, *guidance("sdxl"), "system.exporter_type=pgc-mesh-exporter"),
        mode="export",
        refusal="save_textured_mesh not supported",
    ),
}


@pytest.fixture(scope="module")
def filled(tiny_models, tmp_path_factory):
    """filled(value) -> the same with {sd}, {sdxl}, {zero123}, {controlnet} and {prompts} replaced by paths."""
    paths = {family: str(tiny_models[family][0]) for family in ("sd", "sdxl", "zero123")}
    paths |= {"controlnet": str(tiny_models["sdxl"][1]), "prompts": str(tmp_path_factory.mktemp("prompts"))}

    def fill(value):
        if isinstance(value, dict):
            return {key: fill(part) for key, part in value.items()}
        for name, path in paths.items() if isinstance(value, str) else ():
            value = value.replace(f"{{{name}}}", path)
        return value

    return fill


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_goes_together(case, host, edited, filled):
    config = edited(case.config, filled(case.blocks)) if case.blocks else case.config
    sizes = SMALL_RUN if "zero123" in case.config else (*SMALL_DATA, *SMALL_RUN, *SMALL)
    run = host(case.mode, config, *sizes, "trainer.max_steps=1", *map(filled, case.overrides))
    if case.refusal:
        assert run.code != 0 and case.refusal in run.log, run.log[-2000:]
    else:
        assert run.code == 0, run.log[-3000:]
        if case.mode == "train":
            (name,) = {"train/loss_sds", "train/loss_zero123_sds"} & set(run.numbers())
            assert run.numbers()[name][0] != 0 and run.files("save/it1-test.mp4")
            if case.config == OURS:  # there is something to be seen
                assert len(set(Image.open(run.folder / "save/it1-test/0.png").convert("RGB").getdata())) > 1
        if any("export" in override for override in case.overrides) or case.mode == "export":
            assert run.files("save/it*-export/*.glb") or run.files("save/it*-export/*.obj")


def test_the_hosts_geometry_stage_texture_stage_and_magic3d(host, filled):
    """Normals as latents first; then fantasia3d-system takes the shape over, and magic3d-system its weights."""
    sizes = (*SMALL_DATA, *SMALL_RUN, *SMALL, *SMALL_TETRAHEDRA)
    start = ("system.texture=false", "system.geometry_convert_from=null", "system.geometry.fix_geometry=false", "system.latent_steps=1")
    sphere = ("system.geometry.shape_init=sphere", "system.geometry.shape_init_params=0.5", "system.geometry.n_feature_dims=3")
    fantasia3d = "configs/fantasia3d-texture.yaml"
    run = host("train", fantasia3d, *sizes, *start, *sphere, *map(filled, guidance("sd")), "trainer.max_steps=2")
    assert run.code == 0 and len(run.numbers()["train/loss_sds"]) == 2, run.log[-3000:]
    for family, processor in (("sd", HOST_PROCESSOR), ("sdxl", "pgc-prompt-processor")):
        chosen = [filled(override) for override in guidance(family, processor)]
        texture = host("train", fantasia3d, *sizes, *chosen, f"system.geometry_convert_from={run.last}")
        assert texture.code == 0, texture.log[-3000:]
        weights = ("system.geometry_convert_from=null", f"system.weights={run.last}")
        refined = host("train", "configs/magic3d-refine-sd.yaml", *sizes, *chosen, *weights)
        assert refined.code == 0, refined.log[-3000:]
