"""This package's own pipelines, launched by threestudio itself."""

import re

import pytest
import torch

from tests.host.conftest import REPOSITORY

SDXL, SD = ("fantasia3d-sdxl-pgc", "sdxl"), ("fantasia3d-sd15-depth-pgc", "sd")
EXPORTED = ["glb", "mtl", "obj", "png"]


def parameters(run):
    return {name: value for name, value in run.checkpoint()["state_dict"].items() if value.is_floating_point()}


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.fixture(scope="module", params=[SDXL, SD], ids=lambda pair: pair[0])
def trained(request, host, small):
    """(configuration, its overrides, a training of two steps)."""
    config, family = request.param
    run = host("train", config, *small(family), name=config)
    assert run.code == 0, run.log[-3000:]
    return config, small(family), run


def test_the_extension_is_loaded_whole(trained):
    _, _, run = trained
    assert re.search(r"seconds: custom/threestudio_pgc\n", run.log) and "IMPORT FAILED" not in run.log


def test_training_leaves_what_the_host_promises(trained):
    config, _, run = trained
    assert run.checkpoint()["global_step"] == 2
    assert run.files("save/*test.mp4") == ["save/it2-test.mp4"] and run.files("save/it2-*.png")
    assert run.files("configs/*.yaml") == ["configs/parsed.yaml", "configs/raw.yaml"]
    assert run.files("tb_logs/version_0/events*")
    numbers = run.numbers()
    assert len(numbers["train/loss_sds"]) == 2 and {"train/grad_norm", "train/share_clipped"} <= set(numbers)


def test_resume_goes_on_from_the_checkpoint_and_moves_the_parameters(trained, host):
    config, small, run = trained
    longer = host("train", config, *small, "trainer.max_steps=4", f"resume={run.last}", name=f"{config}-on")
    assert longer.code == 0, longer.log[-3000:]
    assert longer.checkpoint()["global_step"] == 4 and len(longer.numbers()["train/loss_sds"]) == 2
    assert {name.split(".")[2] for name in moved(parameters(run), parameters(longer))} == {"encoding", "mlp"}


def test_resumed_and_uninterrupted_training_are_the_same(trained, host):
    config, small, run = trained
    whole = host("train", config, *small, "trainer.max_steps=4", name=f"{config}-whole")
    halves = host("train", config, *small, "trainer.max_steps=4", f"resume={run.last}", name=f"{config}-halves")
    assert whole.code == halves.code == 0
    assert whole.numbers()["train/loss_sds"] == run.numbers()["train/loss_sds"] + halves.numbers()["train/loss_sds"]
    assert not moved(parameters(whole), parameters(halves))


@pytest.mark.parametrize("mode, made", [("validate", "save/it2-0.png"), ("test", "save/it2-test.mp4")])
def test_evaluation_shows_the_step_of_the_checkpoint(trained, host, mode, made):
    config, small, run = trained
    shown = host(mode, config, *small, f"resume={run.last}", name=f"{config}-{mode}")
    assert shown.code == 0 and made in shown.files("save/*"), (shown.files("save/*"), shown.log[-3000:])


def test_export_writes_glb_and_obj(trained, host):
    config, small, run = trained
    exported = host("export", config, *small, f"resume={run.last}", name=f"{config}-export")
    assert exported.code == 0, exported.log[-3000:]
    assert sorted({name.rsplit(".")[-1] for name in exported.files("save/it2-export/*")}) == EXPORTED


def test_weights_without_a_resume_start_a_new_run(trained, host):
    config, small, run = trained
    begun = host("train", config, *small, f"system.weights={run.last}", "trainer.max_steps=1", name=f"{config}-weights")
    assert begun.code == 0 and begun.checkpoint()["global_step"] == 1, begun.log[-3000:]
    fresh = host("train", config, *small, "trainer.max_steps=1", name=f"{config}-fresh")
    assert begun.numbers()["train/loss_sds"] != fresh.numbers()["train/loss_sds"]


def test_an_override_that_nobody_knows_is_refused(host, small):
    run = host("train", SDXL[0], *small("sdxl"), "system.guidance.pgc.treshold=0.2")
    assert run.code != 0 and "treshold" in run.log
    run = host("train", SDXL[0], *small("sdxl"), "system.guidance.clip=0.2")
    assert run.code != 0 and "clip" in run.log.splitlines()[-1]


def test_tag_and_timestamp_name_the_folder(host, small):
    run = host("validate", SDXL[0], *small("sdxl"), "tag=mine", "use_timestamp=true", name="tagged")
    assert run.code == 0, run.log[-3000:]
    (folder,) = run.folder.parent.iterdir()
    assert re.fullmatch(r"mine@\d{8}-\d{6}", folder.name)


def test_every_name_is_registered_once_and_is_ours(host):
    """The names in the source; a name of the host's would have raised in `register`, an import of ours too."""
    pattern = re.compile(r'^@register\("([^"]+)"\)', re.M)
    ours = {name for file in (REPOSITORY / "custom/threestudio_pgc/modules").glob("*.py") for name in pattern.findall(file.read_text())}
    theirs = {
        name
        for file in (host.root / "threestudio").rglob("*.py")
        for name in re.findall(r'^@threestudio.register\("([^"]+)"\)', file.read_text(), re.M)
    }
    assert len(ours) > 15 and len(theirs) >= 50
    assert not ours & theirs and all(name.startswith("pgc-") for name in ours)
    found = host("validate", "configs/dreamfusion-sd.yaml", "data_type=probe-names", "system.prompt_processor.prompt=a")
    names = set(re.search(r"registered: (.*)", found.log)[1].split())
    assert ours <= names and theirs <= names


def test_pgc_off_by_override_changes_the_gradient_and_nothing_else(host, small):
    """The same cameras, pictures and latent gradient, so the same noise and timesteps; the image gradient is the rule's of the raw one."""
    seen, norms = {}, {}
    for enabled in ("true", "false"):
        run = host(
            *("train", SDXL[0], *small("sdxl"), "system_type=pgc-fantasia3d-system:probe", "trainer.max_steps=1"),
            *(f"system.guidance.pgc.enabled={enabled}", "system.guidance.pgc.threshold=0.05"),
        )
        assert run.code == 0, run.log[-3000:]
        seen[enabled] = torch.load(run.folder / "save" / "probe.pt")
        norms[enabled] = {name: run.numbers()[f"train/{name}"] for name in ("grad_norm", "min_step", "max_step")}
    on, off = seen["true"], seen["false"]
    assert all(torch.equal(on["cameras"][name], off["cameras"][name]) for name in off["cameras"])
    assert torch.equal(on["picture"], off["picture"]) and norms["true"] == norms["false"]
    views = len(off["gradient"])
    raw = off["gradient"] * views
    size = raw.norm(dim=-1, keepdim=True)
    assert 0.1 < (size > 0.05).float().mean() < 0.999
    torch.testing.assert_close(on["gradient"] * views, raw * (0.05 / size).clamp_max(1), rtol=1e-4, atol=1e-7)


def test_the_standalone_host_takes_the_same_steps(host, small, tmp_path):
    import threestudio_pgc.modules  # noqa: F401
    from tests.host.conftest import read_numbers
    from threestudio_pgc.standalone.launcher import main

    overrides = [*small("sdxl"), "trainer.max_steps=3", "checkpoint.every_n_train_steps=3", "trainer.val_check_interval=3"]
    run = host("train", SDXL[0], *overrides)
    assert run.code == 0, run.log[-3000:]
    config = str(REPOSITORY / "configs" / f"{SDXL[0]}.yaml")
    folder = [f"exp_root_dir={tmp_path}", "name=n", "tag=t", "use_timestamp=false"]
    assert main(["--config", config, "--train", "--gpu", "none", *folder, *overrides]) == 0
    theirs, ours = run.numbers(), read_numbers(tmp_path / "n/t/csv_logs/version_0/metrics.csv")
    names = [name for name in ours if name.startswith("train/")]
    assert len(ours["train/loss_sds"]) == 3 and set(names) <= set(theirs)
    for name in names:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name
    alone = torch.load(tmp_path / "n/t/ckpts/last.ckpt", weights_only=False)["state_dict"]
    trained = {name: value for name, value in run.checkpoint()["state_dict"].items() if name.startswith("geometry.")}
    assert len(trained) > 2
    for name, value in trained.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)

    # and each goes on from the other's checkpoint
    onwards = [*overrides, "trainer.max_steps=4"]
    folder = [f"exp_root_dir={tmp_path}", "name=further", "tag=t", "use_timestamp=false"]
    assert main(["--config", config, "--train", "--gpu", "none", *folder, *onwards, f"resume={run.last}"]) == 0
    assert torch.load(tmp_path / "further/t/ckpts/last.ckpt", weights_only=False)["global_step"] == 4
    there = host("train", SDXL[0], *onwards, f"resume={tmp_path / 'n/t/ckpts/last.ckpt'}")
    assert there.code == 0 and there.checkpoint()["global_step"] == 4, there.log[-3000:]
