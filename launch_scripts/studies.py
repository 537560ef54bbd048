"""Runs of the launcher that a study compares: each an ordinary run in outputs/, kept, so that a study can be stopped and called again."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One run: its folder is outputs/<study>/<label>. `overrides` are the launcher's, beside those that a study has for all."""

    study: str
    label: str
    config: str  # stem of a file in configs/
    prompt: str
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return ROOT / "outputs" / self.study / self.label.replace(" ", "_")


def run(job: Job, overrides: Sequence[str] = ()) -> dict:
    """Train, unless it is done already. Returns {"label", "seconds"} or {"label", "error"}."""
    record = job.folder / "record.json"
    if record.is_file():
        return json.loads(record.read_text())
    command = [sys.executable, "launch_scripts/launch.py", "--config", f"configs/{job.config}.yaml", "--gpu", "none", "--train"]
    command += ["exp_root_dir=outputs", f"name={job.study}", f"tag={job.folder.name}", "use_timestamp=false"]
    command += [f'system.prompt_processor.prompt="{job.prompt}"', *job.overrides, *overrides]
    begun = time.perf_counter()
    # One thread each: the runs share the cores better than torch's thread pools would.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"label": job.label, "error": (done.stderr or done.stdout)[-400:]}
    found = {"label": job.label, "seconds": time.perf_counter() - begun}
    record.write_text(json.dumps(found))
    return found


def run_all(jobs: Sequence[Job], workers: int, overrides: Sequence[str] = ()) -> set[str]:
    """Run `workers` at a time, saying how each went; returns the labels of those that failed."""
    failed = set()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, job, overrides) for job in jobs]
        for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
            record = future.result()
            if "error" in record:
                failed.add(record["label"])
            outcome = f"failed: {record['error']}" if "error" in record else f"{record['seconds']:.0f} s"
            print(f"[{count}/{len(jobs)}] {record['label']}: {outcome}", flush=True)
    return failed


def views(job: Job, count: int) -> list[np.ndarray]:
    """The run's `count` evaluation pictures (H, W, 3) in [0, 1], in the order of azimuth."""
    from PIL import Image

    (folder,) = (job.folder / "save").glob("it*-test")
    return [np.asarray(Image.open(folder / f"{index}.png").convert("RGB"), dtype=np.float32) / 255 for index in range(count)]
