"""The first command of the README, a few steps long, with the bundled model."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run([sys.executable, "launch_scripts/quickstart.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_quickstart_ends_by_saying_where_its_results_are(tmp_path):
    small = ["trainer.max_steps=3", "trainer.val_check_interval=3", "checkpoint.every_n_train_steps=3", "data.n_test_views=4"]
    small += ["data.batch_size=1", "system.exporter.texture_size=128"]
    done = run("a zebra teapot", "builtin:teapot", f"exp_root_dir={tmp_path}", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(line.split(":", 1) for line in done.stdout.splitlines()[-3:])
    assert set(told) == {"GLB", "Turntable", "Contact sheet"}
    for path in told.values():
        assert (ROOT / path.strip()).stat().st_size > 0


def test_quickstart_passes_a_refusal_on(tmp_path):
    done = run("a zebra teapot", "no/such/mesh.obj", f"exp_root_dir={tmp_path}")
    assert done.returncode != 0
    assert "no/such/mesh.obj" in done.stdout + done.stderr


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(tmp_path):
    arguments = ["a zebra teapot", "builtin:teapot", f"exp_root_dir={tmp_path}", "trainer.max_steps=10000", "data.batch_size=1"]
    process = subprocess.Popen(
        [sys.executable, "launch_scripts/quickstart.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    told = []
    for line in process.stdout:
        told.append(line)
        if line.startswith("step "):
            os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to the script and to the launcher it runs
            break
    told += process.stdout
    assert process.wait() == 130, "".join(told)
    assert "resume=" in "".join(told) and "Traceback" not in "".join(told)
    assert list(tmp_path.rglob("last.ckpt"))
