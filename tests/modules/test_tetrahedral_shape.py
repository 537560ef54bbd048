"""Shapes that move, through the launcher: the geometry and the joint stage, their losses, resuming, export, and what is refused."""

import csv
import math

import pytest
import torch

MODEL = "system.guidance.pretrained_model_name_or_path"
GEOMETRY, JOINT = "fantasia3d-geometry-pocket-pgc", "fantasia3d-joint-pocket-pgc"


def logged(folder, name):
    (log,) = (folder / "n" / "t").rglob("metrics.csv")
    return [float(row[name]) for row in csv.DictReader(log.open()) if row.get(name)]


def state(folder):
    return torch.load(folder / "n" / "t" / "ckpts" / "last.ckpt", weights_only=True)["state_dict"]


def refused(launch, capsys, tmp_path, words, *overrides, config=GEOMETRY, mode="train"):
    assert launch(mode, tmp_path, *overrides, config=config) in (1, 2)
    message = capsys.readouterr().err
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "words, overrides",
    [
        (["geometry.resolution: found 1,"], ["system.geometry.resolution=1"]),
        (["geometry.resolution: found 4096", "GiB"], ["system.geometry.resolution=4096"]),
        (["representation: found 'mesh'"], ["system.geometry.representation=mesh"]),
        (["refresh_every: found 0"], ["system.geometry.refresh_every=0"]),
        (["shape_init", "'cube'"], ["system.geometry.shape_init=cube"]),
        (["nowhere.obj", "no such file"], ["system.geometry.shape_init=mesh:nowhere.obj"]),
        (["texture_init: found true"], ["system.geometry.texture_init=true"]),
        (["latent_steps: found 5", "latents have 8"], ["system.latent_steps=5", f"{MODEL}=builtin:pocket"]),
        (["system.stage: found 'shape'"], ["system.stage=shape"]),
        (["lambda_normal_sds: found nothing"], ["system.stage=joint"]),
        (["lambda_reference_rgb: found 1.0"], ["system.loss.lambda_reference_rgb=1.0"]),
        (["renderer.perturb: found 1.0"], ["system.renderer.perturb=1.0"]),
        (["renderer.normal_space: found 'view'"], ["system.renderer.normal_space=view"]),
        (["renderer.antialias: found 'msaa'"], ["system.renderer.antialias=msaa"]),
    ],
)
def test_what_is_refused_before_any_work(launch, capsys, tmp_path, words, overrides):
    refused(launch, capsys, tmp_path, words, *overrides)


def test_a_fixed_mesh_has_no_geometry_stage(launch, capsys, tmp_path):
    refused(launch, capsys, tmp_path, ["system.stage: found 'geometry'"], "system.stage=geometry", config="fantasia3d-pocket-pgc")
    refused(launch, capsys, tmp_path, ["lambda_eikonal"], "system.loss.lambda_eikonal=1.0", config="fantasia3d-pocket-pgc")
    refused(launch, capsys, tmp_path, ["normal_guidance: found"], "system.normal_guidance.guidance_scale=3", config="fantasia3d-pocket-pgc")


def test_the_geometry_stage_moves_the_shape_and_exports_it(launch, tmp_path):
    assert launch("train", tmp_path, config=GEOMETRY) == 0
    first = torch.load(next((tmp_path / "n" / "t" / "ckpts").glob("*step=2*.ckpt")), weights_only=True)["state_dict"]
    last = state(tmp_path)
    moved = [name for name in last if name.startswith("geometry.shape.") and not torch.equal(first[name], last[name])]
    assert {name.split(".")[2] for name in moved} == {"encoding", "mlp"}
    save = tmp_path / "n" / "t" / "save"
    assert (save / "it4-test.mp4").is_file() and (save / "it4-gradient.png").is_file()
    exported = save / "it4-export" / "model.glb"
    trained = exported.read_bytes()
    exported.unlink()
    assert launch("export", tmp_path, f"resume={tmp_path}/n/t/ckpts/last.ckpt", config=GEOMETRY) == 0
    assert exported.read_bytes() == trained


def test_the_joint_stage_distils_colours_and_normals(launch, tmp_path):
    assert launch("train", tmp_path, config=JOINT) == 0
    assert len(logged(tmp_path, "train/loss_sds")) == len(logged(tmp_path, "train/loss_normal_sds")) == 4
    assert logged(tmp_path, "train/grad_norm") != logged(tmp_path, "train/normal_grad_norm")
    assert (tmp_path / "n" / "t" / "save" / "it4-normal-gradient.png").is_file()


def test_no_weight_of_the_normals_is_no_guidance_of_them(launch, tmp_path):
    assert launch("train", tmp_path, "system.loss.lambda_normal_sds=0", config=JOINT) == 0
    assert not logged(tmp_path, "train/loss_normal_sds") and len(logged(tmp_path, "train/loss_sds")) == 4


def test_values_of_its_own_for_every_vertex(launch, tmp_path):
    away = "geometry.shape.encoding: null, geometry.shape.mlp: null"
    groups = f"{{{away}, geometry.shape.sdf: {{lr: 0.001}}, geometry.shape.deformation: {{lr: 0.001}}}}"
    assert launch("train", tmp_path, "system.geometry.representation=values", f"system.optimizer.params={groups}", config=GEOMETRY) == 0
    names = {name.removeprefix("geometry.shape.") for name in state(tmp_path) if name.startswith("geometry.shape.")}
    assert names == {"sdf", "deformation"}


REGULARIZERS = ("normal_consistency", "laplacian", "eikonal", "sdf_entropy")


def test_regularisers_are_logged_and_scheduled(launch, tmp_path):
    weights = [f"system.loss.lambda_{name}=1.0" for name in REGULARIZERS[:3]] + ["system.loss.lambda_sdf_entropy=[2,0.0,1.0,3]"]
    assert launch("train", tmp_path, *weights, config=GEOMETRY) == 0
    counts = {name: len(logged(tmp_path, f"train/loss_{name}")) for name in REGULARIZERS}
    assert counts == {"normal_consistency": 4, "laplacian": 4, "eikonal": 4, "sdf_entropy": 1}
    assert all(math.isfinite(value) and value >= 0 for name in REGULARIZERS for value in logged(tmp_path, f"train/loss_{name}"))


def test_a_resumed_run_is_the_uninterrupted_one(launch, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch("train", whole, config=JOINT) == 0
    assert launch("train", parts, "trainer.max_steps=2", config=JOINT) == 0
    assert launch("train", parts, f"resume={parts}/n/t/ckpts/last.ckpt", config=JOINT) == 0
    first, second = state(whole), state(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("change, words", [(1000.0, "found it positive everywhere"), (float("nan"), "values that are not finite")])
def test_a_shape_that_vanishes_names_the_last_good_checkpoint(launch, capsys, tmp_path, change, words):
    assert launch("train", tmp_path, config=GEOMETRY) == 0
    last = tmp_path / "n" / "t" / "ckpts" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    bias = next(name for name in reversed(checkpoint["state_dict"]) if name.endswith("bias") and ".shape." in name)
    checkpoint["state_dict"][bias] += change  # as a step too long does
    torch.save(checkpoint, last)
    (good,) = last.parent.glob("*step=4*.ckpt")
    capsys.readouterr()
    assert launch("train", tmp_path, f"resume={last}", "trainer.max_steps=6", config=GEOMETRY) == 1
    message = capsys.readouterr().err
    assert "step 4: sdf: found" in message and words in message and f"The last good checkpoint is {good}" in message
    assert launch("train", tmp_path, f"system.weights={good}", "trainer.max_steps=1", config=GEOMETRY) == 0


def test_latents_first(tiny_models, launch, tmp_path):
    sd = ["system.guidance_type=pgc-stable-diffusion-guidance", f"{MODEL}={tiny_models['sd'][0]}"]
    assert launch("train", tmp_path, *sd, "system.latent_steps=2", "system.guidance.guidance_scale=7.5", config=GEOMETRY) == 0
    assert len(logged(tmp_path, "train/loss_sds")) == 4


def test_perturbed_points_change_the_colours_and_only_in_training():
    from threestudio_pgc.modules.renderer import MeshRasterizer

    positions, vertices = torch.zeros(4000, 3), torch.tensor([[-0.5, -0.2, 0.0], [0.5, 0.2, 0.1]])
    renderer = MeshRasterizer({"perturb": 0.01}, geometry=None, material=None, background=None)
    moved = renderer.train()._perturbed(positions, vertices)
    assert moved.abs().max() <= 0.01 and moved.abs().max() > 0.0099 and abs(float(moved.mean())) < 3e-4, "two-sided, in units of the object"
    assert torch.equal(moved, renderer._perturbed(positions, vertices))
    renderer.update_step(0, 1)
    assert not torch.equal(moved, renderer._perturbed(positions, vertices))
    assert renderer.eval()._perturbed(positions, vertices) is positions


@pytest.fixture
def painted(tmp_path):
    """A tetrahedron-like body whose upper half is blue and whose lower half is red, by vertex colours."""
    import trimesh

    solid = trimesh.creation.icosphere(subdivisions=3, radius=0.8)
    colors = [[20, 40, 220, 255] if z > 0 else [220, 40, 20, 255] for z in solid.vertices[:, 2]]
    solid.visual = trimesh.visual.ColorVisuals(solid, vertex_colors=colors)
    solid.export(tmp_path / "painted.ply")
    return tmp_path / "painted.ply"


@pytest.mark.parametrize("kind", ["pgc-dmtet", "pgc-textured-mesh"])
def test_a_texture_starts_from_the_meshs_own_colours(kind, painted):
    import threestudio_pgc.modules  # noqa: F401
    from threestudio_pgc.host import find

    own = (
        {"shape_init": f"mesh:{painted}", "resolution": 16, "shape": {"preset": "pocket"}}
        if kind == "pgc-dmtet"
        else {"mesh": str(painted)}
    )
    geometry = find(kind)({**own, "texture": {"preset": "pocket"}, "texture_init": True})
    material = find("pgc-albedo-material")({})
    points = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=-1) * 0.8
    points = points[points[:, 2].abs() > 0.1]
    geometry.initialize_texture(lambda features: material.export(features=features)["albedo"])
    colors = material.export(**geometry.export(points))["albedo"]
    wanted = torch.tensor([[20.0, 40, 220], [220, 40, 20]])[(points[:, 2] < 0).long()] / 255
    assert (colors - wanted).abs().mean() < 0.05


@pytest.mark.parametrize("kind, key", [("pgc-dmtet", "shape_init"), ("pgc-textured-mesh", "mesh")])
def test_a_mesh_without_colours_gives_none(kind, key):
    import threestudio_pgc.modules  # noqa: F401
    from threestudio_pgc.host import find

    mesh = {"shape_init": "mesh:builtin:bunny", "resolution": 16} if key == "shape_init" else {"mesh": "builtin:bunny"}
    with pytest.raises(ValueError, match="texture_init: found true.*builtin:bunny has no colours"):
        find(kind)({**mesh, "texture_init": True}).initialize_texture(lambda features: features)


def test_a_trained_shape_needs_the_mesh_it_started_from_no_more(launch, painted, tmp_path):
    start = [f"system.geometry.shape_init=mesh:{painted}", "system.geometry.texture_init=true"]
    assert launch("train", tmp_path, *start, "trainer.max_steps=2", config=JOINT) == 0
    painted.unlink()
    last = tmp_path / "n" / "t" / "ckpts" / "last.ckpt"
    assert launch("train", tmp_path, *start, f"resume={last}", "trainer.max_steps=3", config=JOINT) == 0
    assert launch("export", tmp_path, *start, f"resume={last}", config=JOINT) == 0
