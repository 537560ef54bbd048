import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from threestudio_pgc.standalone import registry
from threestudio_pgc.standalone.launcher import main

toy_run = Path(__file__).with_name("toy_run.py")
spec = importlib.util.spec_from_file_location("toy_run", toy_run)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

toy_config = """
name: toy
tag: "${rmspace:${system.prompt_processor.prompt},_}"
use_timestamp: false
seed: 3
data_type: toy-data
data: {size: 4}
system_type: toy-system
system:
  geometry_type: toy-geometry
  geometry: {size: "${data.size}", options: {scale: 2}}
  material_type: toy-material
  background_type: toy-background
  renderer_type: toy-renderer
  guidance_type: toy-guidance
  guidance: {strength: 0.5}
  prompt_processor_type: toy-prompts
  prompt_processor: {prompt: a red cat}
  exporter_type: toy-exporter
  loss: {lambda_sds: [0, 1.0, 0.5, 6]}
  optimizer: {name: Adam, args: {lr: 0.1}, params: {geometry.colours: {lr: 0.05}}}
trainer: {max_steps: 6, log_every_n_steps: 1, val_check_interval: 2, check_val_every_n_epoch: null}
checkpoint: {save_last: true, save_top_k: -1, every_n_train_steps: 3}
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder to run in, and an environment that forgets what the launcher writes into it."""
    for name in ("CUDA_VISIBLE_DEVICES", "PGC_GPUS_CHOSEN", "PGC_TIMESTAMP", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(toy_config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def launch(*words, config="toy.yaml") -> int:
    former = registry._parts
    registry._parts = {}
    try:
        return main(["--config", str(config), *words], load_parts=toy.load_parts)
    finally:
        registry._parts = former


def start(*words, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(toy_run), "--config", "toy.yaml", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(trial: Path) -> dict[int, str]:
    """Logged loss of each step, as written, over all versions of the log."""
    found = {}
    for file in sorted(trial.glob("csv_logs/*/metrics.csv")):
        head, *lines = [line.split(",") for line in file.read_text().splitlines()]
        rows = [dict(zip(head, line)) for line in lines]
        found.update({int(row["step"]): row["train/loss"] for row in rows if row["train/loss"]})
    return found


def assert_same_run(first: Path, second: Path, rows_lost: int = 0) -> None:
    a, b = (torch.load(trial / "ckpts" / "last.ckpt", weights_only=True) for trial in (first, second))
    assert a["global_step"] == b["global_step"] == 6
    assert torch.equal(a["state_dict"]["geometry.colours"], b["state_dict"]["geometry.colours"])
    moments = [state["optimizer_states"][0]["state"][0] for state in (a, b)]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    expected, found = losses(first), losses(second)
    assert sorted(expected) == list(range(6)) and len(found) >= 6 - rows_lost
    assert found.items() <= expected.items()


def test_train_test_validate_export_and_the_folders(capsys, recwarn):
    assert launch("--train") == 0
    said = capsys.readouterr().err
    trial = Path("outputs/toy/a_red_cat")
    assert "step 6/6" in said and "it/s" in said and "left, clipped 0.25" in said
    assert said.rstrip().endswith(f"Results: {trial}/save")
    files = {str(path.relative_to(trial)) for path in trial.rglob("*") if path.is_file()}
    assert {"cmd.txt", "configs/raw.yaml", "configs/parsed.yaml", "csv_logs/version_0/metrics.csv"} <= files
    assert {"ckpts/last.ckpt", "ckpts/epoch=0-step=3.ckpt", "ckpts/epoch=0-step=6.ckpt"} <= files
    assert {"save/it2-val.png", "save/it6-val.png", "save/it6-test.mp4", "save/it6-test/2.png"} <= files
    assert "code/threestudio_pgc/standalone/launcher.py" in files
    assert any(file.startswith("tb_logs/version_0/events") for file in files)
    assert (trial / "configs/raw.yaml").read_text() == toy_config
    assert yaml.safe_load((trial / "configs/parsed.yaml").read_text())["tag"] == "a_red_cat"
    noise = [str(warning.message) for warning in recwarn if "lightning" in str(warning.filename)]
    assert noise == []

    resume = f"resume={trial}/ckpts/epoch=0-step=3.ckpt"
    for mode, result in (("validate", "it3-val.png"), ("test", "it3-test.mp4"), ("export", "it3-export/colours.json")):
        assert launch(f"--{mode}", resume, config=trial / "configs/parsed.yaml") == 0
        assert (trial / "save" / result).is_file()
    exported = yaml.safe_load((trial / "save/it3-export/colours.json").read_text())["colours"]
    stored = torch.load(trial / "ckpts/epoch=0-step=3.ckpt")["state_dict"]["geometry.colours"]
    assert torch.equal(torch.tensor(exported), stored)

    assert launch("--train") == 0
    assert "holds an earlier run, which is now overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [(), ("trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed")])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(extra):
    assert launch("--train", "tag=whole", *extra) == 0
    assert launch("--train", "tag=parts", "trainer.max_steps=3", *extra) == 0
    assert launch("--train", "tag=parts", "resume=outputs/toy/parts/ckpts/last.ckpt", *extra) == 0
    assert_same_run(Path("outputs/toy/whole"), Path("outputs/toy/parts"))


def test_killed_and_interrupted_runs_resumed_equal_the_uninterrupted():
    # Both processes start at once, since most of their time is importing.
    killed = start("--train", "tag=killed", TOY_KILL_AT="4")
    interrupted = start("--train", "tag=interrupted", "system.guidance.seconds=0.5")
    assert launch("--train", "tag=whole") == 0
    whole = Path("outputs/toy/whole")

    sign = Path("outputs/toy/interrupted/save/it4-val.png")  # step 4 is done and two remain
    deadline = time.monotonic() + 240
    while not sign.exists() and interrupted.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGINT)
    said = interrupted.communicate(timeout=120)[1]
    assert interrupted.returncode == 130 and "Traceback" not in said, said
    command = shlex.split(next(line for line in said.splitlines() if line.startswith("  python")))
    assert command[:2] == ["python", str(toy_run)]
    assert torch.load("outputs/toy/interrupted/ckpts/last.ckpt")["global_step"] in (4, 5)
    assert launch(*command[4:], "system.guidance.seconds=0", config=command[3]) == 0
    assert_same_run(whole, Path("outputs/toy/interrupted"), rows_lost=1)  # the row of the step after which it stopped

    killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL
    assert launch("--train", "tag=killed", "resume=outputs/toy/killed/ckpts/last.ckpt") == 0
    assert_same_run(whole, Path("outputs/toy/killed"), rows_lost=3)  # all before the checkpoint, not yet written when it died


@pytest.mark.parametrize(
    "words, message",
    [
        (["--train", "--export"], "not allowed with argument"),
        ([], "one of the arguments --train --validate --test --export is required"),
        (["--tarin"], "one of the arguments"),
        (["--train", "--gpus", "0"], "unknown option --gpus; did you mean --gpu?"),
        (["--train", "--system.x=1"], "unknown option --system.x=1; overrides are written key=value"),
        (["--train", "--gpu", "all"], "--gpu: found 'all', wanted a number"),
        (["--train", "--gpu", "0,0"], "--gpu: 0,0 names a GPU twice"),
    ],
)
def test_bad_command_line(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        launch(*words)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["system.guidance.strenght=1"], "system.guidance.strenght: no such key; did you mean 'strength'?"),
        (["system.geometry.options.scael=1"], "system.geometry.options.scael: no such key; did you mean 'scale'?"),
        (["system.prompt_processor={}", "tag=a", "system.prompt_processor_type=toy-promts"], "'toy-promts' is not registered"),
        (["resume=nowhere.ckpt"], "resume: no such checkpoint: nowhere.ckpt"),
        (["resume=toy.yaml"], "resume: toy.yaml is not a readable checkpoint"),
        (["trainer.max_steps=-1"], "trainer.max_steps: must be set"),
        (["trainer.precision=64-mixed"], "trainer or checkpoint: "),
        (["system.optimizer.params={geometry.colors: {lr: 1}}"], "system.optimizer.params.geometry.colors: no module"),
    ],
)
def test_refused_before_anything_is_made(capsys, words, message):
    assert launch("--train", *words) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not list(Path(".").glob("outputs/**/*.ckpt"))


@pytest.mark.parametrize("word", ["system.guidance.strenght=1", "data.size=x", "resume=nowhere.ckpt"])
def test_refused_run_leaves_no_folder(word):
    assert launch("--train", word) == 2
    assert not Path("outputs").exists()


def test_value_that_our_own_code_refuses_is_told_without_a_traceback(capsys):
    assert launch("--train", "system.loss.lambda_sds=[1,2]") == 1
    said = capsys.readouterr().err
    assert "error: a schedule is [v0, v1, end]" in said and "Traceback" not in said


def test_error_of_other_code_keeps_its_traceback():
    with pytest.raises(ValueError, match="sleep"):
        launch("--train", "system.guidance.seconds=-1")


def test_checkpoint_of_another_shape_is_refused(capsys):
    assert launch("--train", "trainer.max_steps=1", "checkpoint.every_n_train_steps=1") == 0
    assert launch("--test", "data.size=5", "resume=outputs/toy/a_red_cat/ckpts/last.ckpt") == 2
    assert "last.ckpt does not fit this configuration: size mismatch for geometry.colours" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_gpu_wanted_where_there_is_none_runs_on_the_cpu_and_says_so(capsys):
    assert launch("--validate", "--gpu", "0") == 0
    said = capsys.readouterr().err
    assert "warning: --gpu 0: no usable CUDA device here, running on the CPU" in said
    assert "--validate without resume=CHECKPOINT" in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk_at_the_second_checkpoint_keeps_the_first(capsys):
    assert launch("--train", "trainer.max_steps=3") == 0
    trial = Path("outputs/toy/a_red_cat")
    (trial / "ckpts/.epoch=0-step=6.part0.ckpt").symlink_to("/dev/full")
    assert launch("--train", f"resume={trial}/ckpts/last.ckpt") == 1
    said = capsys.readouterr().err
    assert "epoch=0-step=6.ckpt: no space left on the disk" in said and "Traceback" not in said
    assert f"The last checkpoint is {trial}/ckpts/last.ckpt. To resume:" in said
    assert torch.load(trial / "ckpts/last.ckpt")["global_step"] == 3
