"""The real threestudio from THREESTUDIO_ROOT: a copy, this package installed into it, run on a CPU by `driver.py`."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
ROOT = os.environ.get("THREESTUDIO_ROOT", "")
NOT_RUN = "THREESTUDIO_ROOT is not set: the real threestudio was not exercised"

TETS = "load/tets/32_tets.npz"

SMALL_DATA = ("data.height=32", "data.width=32", "data.batch_size=2", "data.eval_height=32", "data.eval_width=32", "data.n_test_views=2")
SMALL_RUN = (
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "trainer.precision=32"),
    *("checkpoint.every_n_train_steps=2", "checkpoint.save_last=true", "seed=0"),
)


@dataclass
class Run:
    """One command of the host's launcher: its exit code, what it printed, and the folder of the trial."""

    code: int
    log: str
    folder: Path

    @property
    def last(self) -> Path:
        """The newest checkpoint. A second training in the same folder writes a file of its own beside last.ckpt."""
        return max((self.folder / "ckpts").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)

    def checkpoint(self) -> dict:
        import torch

        return torch.load(self.last, map_location="cpu", weights_only=False)

    def files(self, pattern: str) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(pattern))

    def numbers(self, *, version: int = 0) -> dict[str, list[float]]:
        """Column of the csv log -> its values in the order of the steps."""
        return read_numbers(self.folder / f"csv_logs/version_{version}/metrics.csv")


def read_numbers(path: Path) -> dict[str, list[float]]:
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def copy_checkout(source: Path, target: Path) -> Path:
    """A copy of a checkout with nothing of a user's in it, and this package installed into it."""
    if not (source / "launch.py").is_file() or not (source / "threestudio" / "__init__.py").is_file():
        pytest.fail(f"THREESTUDIO_ROOT: found {source}, wanted a checkout of threestudio: a folder with launch.py and threestudio/")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "__pycache__", "outputs", ".threestudio_cache", "custom"))
    (target / "custom").mkdir()
    install = ["bash", str(REPOSITORY / "launch_scripts/install.sh"), str(target), "--python", sys.executable]
    installed = subprocess.run(install, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    (target / "custom/probe.py").symlink_to(HERE / "probe.py")
    if not (target / TETS).exists():  # large files are left out of some checkouts
        import numpy as np

        from threestudio_pgc.scene.tetrahedra import make_grid

        grid = make_grid(32)
        np.savez(target / TETS, vertices=(grid.vertices.numpy() + 1) / 2, indices=grid.tets.numpy())
    return target


class Host:
    """The host in one process, which forks for each command."""

    def __init__(self, root: Path, outputs: Path):
        self.root, self.outputs, self.count = root, outputs, 0
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "driver.py"), str(root), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(outputs / "driver.log", "w"),
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def __call__(self, mode: str, config: str, *overrides: str, name: str = "") -> Run:
        """`python launch.py --config CONFIG --MODE overrides`: a configuration of this package, or a path in the checkout.

        Runs with the same `name` have the same folder.
        """
        self.count += 1
        name = name or f"run{self.count}"
        log = self.outputs / f"{self.count:02d}-{name}-{mode}.log"
        path = config if config.endswith(".yaml") else f"configs/threestudio_pgc/{config}.yaml"
        folder = (f"exp_root_dir={self.outputs}", f"name={name}", "tag=t", "use_timestamp=false")
        arguments = ["--config", path, f"--{mode}", "--gpu", "0", *folder, *overrides]
        self.process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            pytest.fail((self.outputs / "driver.log").read_text()[-4000:])
        return Run(int(answer), log.read_text(errors="replace"), self.outputs / name / "t")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """host(mode, config, *overrides, name=...) -> Run."""
    if not ROOT:
        pytest.skip(NOT_RUN)
    folder = tmp_path_factory.mktemp("threestudio")
    host = Host(copy_checkout(Path(ROOT), folder / "host"), folder)
    yield host
    host.close()


@pytest.fixture
def edited(host, tmp_path):
    """edited(config, {key: value, ...}) -> path of the configuration with these in place of what it had there, as if edited by hand."""
    from omegaconf import OmegaConf

    def edit(config: str, blocks: dict) -> str:
        settings = OmegaConf.load(host.root / config)
        for key, value in blocks.items():
            OmegaConf.update(settings, key, value, merge=False)
        OmegaConf.save(settings, tmp_path / "edited.yaml")
        return str(tmp_path / "edited.yaml")

    return edit


@pytest.fixture(scope="session")
def small(tiny_models, tmp_path_factory):
    """small(family, control=True) -> overrides that make one of this package's configurations run in seconds, with tiny models."""
    prompts = tmp_path_factory.mktemp("prompts")

    def overrides(family: str, control: bool = True) -> tuple[str, ...]:
        model, controlnet = tiny_models[family]
        chosen = [f"system.guidance.pretrained_model_name_or_path={model}", "system.guidance.vae_name_or_path=null"]
        if control:
            chosen.append(f"system.guidance.controlnet_name_or_path={controlnet}")
        if family != "zero123":
            chosen += [f"system.prompt_processor.cache_dir={prompts}", "system.prompt_processor.prompt=a zebra vase"]
        return (*chosen, *SMALL_DATA, *SMALL_RUN, "system.exporter.texture_size=128")

    return overrides
