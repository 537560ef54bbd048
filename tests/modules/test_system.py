"""The texture stage through the launcher, from the shipped config: what a user's command does, on tiny random models."""

import csv
import json

import pytest
import torch


def checkpoint(folder, name="last.ckpt"):
    return folder / "n" / "t" / "ckpts" / name


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("run")
    assert launch("train", folder) == 0
    return folder


def test_training_leaves_what_the_host_would(trained):
    run = trained / "n" / "t"
    assert checkpoint(trained).is_file()
    assert (run / "configs" / "parsed.yaml").is_file()
    saved = {path.name for path in (run / "save").iterdir()}
    assert {"it2-0.png", "it4-0.png", "it2-gradient.png", "it4-control.png", "it4-test.mp4", "it4-test-sheet.png"} <= saved


def test_training_logs_what_the_rule_did(trained):
    (log,) = (trained / "n" / "t").rglob("metrics.csv")
    rows = list(csv.DictReader(log.open()))
    assert {"train/share_clipped", "train/norm_p99", "train/nonfinite_pixels", "train/threshold"} <= set(rows[0])


def test_texture_moves_and_geometry_does_not(trained, launch, tmp_path):
    state = torch.load(checkpoint(trained), weights_only=False)["state_dict"]
    assert launch("train", tmp_path, "trainer.max_steps=1", "checkpoint.every_n_train_steps=1") == 0
    early = torch.load(checkpoint(tmp_path), weights_only=False)["state_dict"]
    assert state.keys() == early.keys()
    assert not any("vae" in key or "unet" in key for key in state), "the frozen prior must not be saved"
    moved = [key for key in state if not torch.equal(state[key], early[key])]
    assert any("encoding" in key for key in moved) and any("mlp" in key for key in moved)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(trained, launch, tmp_path):
    assert launch("train", tmp_path, "trainer.max_steps=2") == 0
    torch.manual_seed(123)  # whatever the process drew in between must not matter
    assert launch("train", tmp_path, f"resume={checkpoint(tmp_path)}") == 0
    whole, resumed = (torch.load(checkpoint(folder), weights_only=False) for folder in (trained, tmp_path))
    assert whole["global_step"] == resumed["global_step"] == 4
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    for mine, other in zip(whole["optimizer_states"], resumed["optimizer_states"]):
        for index, state in mine["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][index][key])), (index, key)


def test_an_adaptive_threshold_survives_a_resume(launch, tmp_path):
    """In the checkpoint, and used from there: the resumed run ends with the uninterrupted one's histogram and parameters."""
    adaptive = "system.guidance.pgc.threshold={quantile: 0.9}"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch("train", whole, adaptive) == 0
    assert launch("train", parts, adaptive, "trainer.max_steps=2") == 0
    assert torch.load(checkpoint(parts), weights_only=True)["pgc_guidance"]["threshold"]["steps"] == 2
    assert launch("train", parts, adaptive, f"resume={checkpoint(parts)}") == 0
    one, other = (torch.load(checkpoint(folder), weights_only=True) for folder in (whole, parts))
    assert one["pgc_guidance"]["threshold"]["steps"] == other["pgc_guidance"]["threshold"]["steps"] == 4
    assert torch.equal(one["pgc_guidance"]["threshold"]["counts"], other["pgc_guidance"]["threshold"]["counts"])
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    assert launch("test", parts, adaptive, f"resume={checkpoint(parts)}") == 0  # evaluation has no guidance to give it to


def test_an_adapter_survives_a_resume_bit_for_bit(launch, tmp_path):
    """VSD's adapter and its optimiser are in the checkpoint, and the resumed run ends with the uninterrupted one's."""
    vsd = ("system.guidance.objective=vsd", "system.guidance.guidance_scale=7.5", "system.guidance.cfg=diffusers")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch("train", whole, *vsd) == 0
    assert launch("train", parts, *vsd, "trainer.max_steps=2") == 0
    half = torch.load(checkpoint(parts), weights_only=True)["pgc_guidance"]["method"]["adapter"]
    assert launch("train", parts, *vsd, f"resume={checkpoint(parts)}") == 0
    one, other = (torch.load(checkpoint(folder), weights_only=True) for folder in (whole, parts))
    adapters = [state["pgc_guidance"]["method"]["adapter"] for state in (one, other)]
    assert any(value.any() for name, value in adapters[0].items() if name.startswith("up."))
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert any(not torch.equal(value, half[name]) for name, value in adapters[0].items())
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    assert not any("adapter" in key or "lora" in key for key in one["state_dict"]), "it is the guidance's, not the object's"


def test_export_and_test_from_a_checkpoint(trained, launch):
    assert launch("export", trained, f"resume={checkpoint(trained)}") == 0
    (folder,) = (trained / "n" / "t" / "save").glob("*export*")
    assert {"model.glb", "model.obj", "model.mtl", "model.png"} <= {path.name for path in folder.iterdir()}
    film, sheet = (trained / "n" / "t" / "save" / name for name in ("it4-test.mp4", "it4-test-sheet.png"))
    for path in (film, sheet):
        path.unlink()
    assert launch("export", trained, f"resume={checkpoint(trained)}", "system.exporter.save_video=false") == 0
    assert not film.exists()
    assert launch("export", trained, f"resume={checkpoint(trained)}") == 0
    assert film.is_file() and sheet.is_file()
    assert launch("test", trained, f"resume={checkpoint(trained)}") == 0


def test_pgc_off_is_one_override_and_changes_the_result(trained, launch, tmp_path):
    assert launch("train", tmp_path, "system.guidance.pgc.enabled=false") == 0
    on, off = (torch.load(checkpoint(folder), weights_only=False)["state_dict"] for folder in (trained, tmp_path))
    assert any(not torch.equal(on[key], off[key]) for key in on)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("system.guidance.pgc.treshold=0.2", ["treshold", "threshold"]),
        ("system.guidance.pgc.threshold={quantile: 1.5}", ["pgc.threshold.quantile", "1.5"]),
        ("system.guidance.pgc.rule=clip", ["system.guidance.pgc.rule", "clip-norm"]),
        ("system.guidance.guidance_scal=3", ["guidance_scal", "guidance_scale"]),
        ("system.geometry.mesh=no/such.obj", ["no/such.obj"]),
        ("system.geometry.texture.preset=refernce", ["refernce", "reference"]),
        ("system.geometry.texture.levels=3", ["levels"]),
        ("system.background.kind=sky", ["system.background.kind", "solid"]),
        ("system.stage=geometry", ["system.stage", "texture"]),
        ("system.prompt_processor.prompt=", ["system.prompt_processor.prompt"]),
        ("system.guidance.pretrained_model_name_or_path=nobody/no-such-model", ["nobody/no-such-model"]),
        ("system.exporter.texture_size=7", ["system.exporter.texture_size"]),
        ("system.guidance_type=pgc-sdxl-guidence", ["pgc-sdxl-guidence", "pgc-sdxl-guidance"]),
        ("data.batch_size=0", ["data.batch_size"]),
        ("system.guidance.objective=csdd", ["system.guidance.objective", "csdd", "did you mean 'csd'"]),
        ("system.guidance.objective=csd", ["system.guidance.guidance_scale", "30.0", "null"]),
        ("system.guidance.dtype=fp16", ["fp16 on a CPU is refused"]),
        ("system.guidance.control_scale=[1.0, 0.5]", ["control_scale", "one for each"]),
        ("system.guidance.control_kind=[depth, normal]", ["control_kind", "one for each"]),
        ("system.loss.lambda_reference_mask=1.0", ["lambda_reference_mask", "fixed shape"]),
    ],
)
def test_bad_input_is_told_by_name_and_trains_nothing(launch, tmp_path, capsys, override, told):
    assert launch("train", tmp_path, override) != 0
    captured = capsys.readouterr()
    for words in told:
        assert words in captured.out + captured.err
    assert not checkpoint(tmp_path).exists()


def test_a_guidance_that_takes_a_prompt_is_not_built_without_one(tiny_sdxl, tmp_path, capsys):
    from pathlib import Path

    from omegaconf import OmegaConf

    import threestudio_pgc.modules  # noqa: F401  registers the parts once
    from threestudio_pgc.standalone.launcher import main

    config = OmegaConf.load(Path(__file__).resolve().parents[2] / "configs" / "fantasia3d-pocket-pgc.yaml")
    del config.system.prompt_processor_type, config.system.prompt_processor
    config.tag, config.exp_root_dir = "t", str(tmp_path)
    OmegaConf.save(config, tmp_path / "c.yaml")
    assert main(["--config", str(tmp_path / "c.yaml"), "--train", "--gpu", "none"]) != 0
    assert "system.prompt_processor_type: found nothing, wanted 'pgc-prompt-processor'" in capsys.readouterr().err


def test_a_step_without_one_finite_gradient_is_skipped_and_said(launch, tmp_path, monkeypatch, capsys):
    from threestudio_pgc.diffusion.sdxl import SDXLPrior

    predict = SDXLPrior.predict_noise
    calls = []

    def sometimes_nan(self, z_t, *args, **kwargs):
        calls.append(1)
        return predict(self, z_t * float("nan") if len(calls) == 2 else z_t, *args, **kwargs)

    monkeypatch.setattr(SDXLPrior, "predict_noise", sometimes_nan)
    assert launch("train", tmp_path, "trainer.max_steps=3", "checkpoint.every_n_train_steps=1") == 0
    captured = capsys.readouterr()
    assert "the step is skipped" in captured.out + captured.err
    state = torch.load(checkpoint(tmp_path), weights_only=False)
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    steps = {int(entry["step"]) for entry in state["optimizer_states"][0]["state"].values()}
    assert steps == {2}, f"three batches, one skipped; Adam counted {steps}"


def test_glb_of_a_run_holds_the_texture(trained):
    (glb,) = (trained / "n" / "t" / "save").glob("*export*/model.glb")
    content = glb.read_bytes()
    length = int.from_bytes(content[12:16], "little")
    scene = json.loads(content[20 : 20 + length])
    assert len(scene["images"]) == 1 and scene["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("weight", [0.1, 10.0])
def test_the_renderer_receives_the_regulated_gradient_through_the_trainer(launch, tmp_path, monkeypatch, precision, weight):
    """What arrives at the rendered image in a real training step, whatever the trainer's precision and the loss's weight."""
    from threestudio_pgc.modules.system import Fantasia3DSystem
    from threestudio_pgc.pixelgrad import pixel_norm

    forward, received = Fantasia3DSystem.forward, []

    def watched(self, batch, **kwargs):
        out = forward(self, batch, **kwargs)
        if out["comp_rgb"].requires_grad:
            out["comp_rgb"].register_hook(lambda gradient: received.append((gradient.dtype, gradient.clone())))
        return out

    monkeypatch.setattr(Fantasia3DSystem, "forward", watched)
    overrides = [f"trainer.precision={precision}", f"system.loss.lambda_sds={weight}", "trainer.max_steps=2"]
    assert launch("train", tmp_path, *overrides, "system.guidance.pgc.threshold=1e-3") == 0
    assert len(received) == 2
    for dtype, gradient in received:
        norms = pixel_norm(gradient) * len(gradient) / weight
        assert dtype == torch.float32
        assert norms.max() == pytest.approx(1e-3, rel=1e-4), "some pixel is at the threshold and none above it"
