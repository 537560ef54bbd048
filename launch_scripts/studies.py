"""Runs of the launcher that are compared with each other. Each keeps its folder, so that a study can be stopped and called again."""

from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from threestudio_pgc.export.files import write_bytes
from threestudio_pgc.standalone.config import ConfigError, check_config, load_config, read_yaml

ROOT = Path(__file__).resolve().parents[1]
# Keys that say where and on what a run is done, not what it is.
PLACE = ("exp_root_dir", "exp_dir", "name", "tag", "trial_name", "trial_dir", "use_timestamp", "timestamp", "resume", "n_gpus")


class StudyError(ValueError):
    """A study that cannot be begun; the message names what was found and what is wanted."""


def shipped(name: str) -> Path:
    """The file of an experiment in configs/."""
    return ROOT / "configs" / f"{name}.yaml"


def assign(key: str, text: str | Path) -> str:
    """The override that gives `key` this very text, whatever characters are in it."""
    return f"{key}={json.dumps(str(text), ensure_ascii=False)}"  # a JSON string is a YAML string in double quotes


def prompt_override(prompt: str) -> str:
    return assign("system.prompt_processor.prompt", prompt)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; an empty part stays."""
    result = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return result


@dataclass(frozen=True)
class Job:
    """One run of the launcher, train to export.

    label: of the run among all of its study. folder: <exp_root_dir>/<name>/<tag>. config: a YAML file. overrides: the launcher's.
    about: further entries of the folder's record.json, {"label", "seconds"} and, of a run that is not finished, "error".
    """

    label: str
    folder: Path
    config: Path
    overrides: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "ckpts" / "last.ckpt"

    @property
    def log(self) -> Path:
        """All that the launcher said, of every attempt."""
        return self.folder / "log.txt"

    @property
    def record(self) -> dict[str, Any]:
        """Of the run in the folder; empty where none has ended."""
        try:
            return json.loads((self.folder / "record.json").read_text())
        except (OSError, ValueError):
            return {}

    @property
    def finished(self) -> bool:
        return "seconds" in self.record and "error" not in self.record

    def write_record(self, **found: Any) -> dict[str, Any]:
        record = {"label": self.label, **self.about, **found}
        write_bytes(self.folder / "record.json", json.dumps(record, indent=1).encode())
        return record

    @property
    def arguments(self) -> list[str]:
        """Of the launcher: the folder and the overrides."""
        study = self.folder.parent
        place = [assign("exp_root_dir", study.parent), assign("name", study.name), assign("tag", self.folder.name), "use_timestamp=false"]
        return [*place, *self.overrides]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as the launcher will read and check it, by full key, without `PLACE`. Raises StudyError."""
        import threestudio_pgc.modules  # noqa: F401  registers the parts, against which keys are checked

        try:
            config = load_config(self.config, cli_args=self.arguments)
            check_config(config)
        except ConfigError as error:
            raise StudyError(f"{self.label}: {error}") from error
        return _settings(config)

    def changes(self) -> list[str]:
        """How the run in the folder differs from this one, a line a key; nothing where there is none."""
        snapshot = self.folder / "configs" / "parsed.yaml"
        if not snapshot.is_file():
            return []
        before, now = _settings(read_yaml(snapshot, key=self.label)), self.settings
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key, KeyError) != now.get(key, KeyError))
        return [f"{key}: found {before.get(key, 'nothing')}, wanted {now.get(key, 'nothing')}" for key in keys]


def _settings(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return {key: value for key, value in flat(OmegaConf.to_container(config, resolve=True)).items() if key not in PLACE}


class Launchers:
    """The launchers at work. They are sheltered from the terminal's Ctrl-C, since a second signal would not let them save."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work: set[subprocess.Popen] = set()
        self.stopped = False

    def call(self, command: Sequence[str], **options: Any) -> int:
        """Exit code of the command; that of Ctrl-C if it is not begun any more."""
        with self._lock:
            if self.stopped:
                return 130
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True, **options)
            self._at_work.add(process)
        code = process.wait()
        with self._lock:
            self._at_work.remove(process)
        return code

    def interrupt(self) -> None:
        """Ctrl-C for all: the first saves a checkpoint, the second stops at once. None is begun any more."""
        with self._lock:
            self.stopped = True
            for process in self._at_work:
                process.send_signal(signal.SIGINT)


def run(job: Job, gpu: str, launchers: Launchers) -> dict[str, Any]:
    """Train and export, from the last checkpoint where there is one.

    gpu: the launcher's --gpu. Returns the record; its seconds are those of the attempts that led to the result.
    """
    command = [sys.executable, str(ROOT / "launch_scripts" / "launch.py"), "--config", str(job.config), "--gpu", gpu, "--train"]
    command += job.arguments
    seconds = 0.0
    if job.checkpoint.is_file():
        command.append(assign("resume", job.checkpoint))
        seconds = job.record.get("seconds", 0.0)
    # On the CPU one thread each: the runs share the cores better than torch's thread pools would.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if gpu == "none" else {})
    begun = time.perf_counter()
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            begin = log.tell()
            code = launchers.call(command, stdout=log, env=environment)
        found = {"seconds": seconds + time.perf_counter() - begun}
        if code:
            found["error"] = "interrupted" if launchers.stopped else _last_error(job.log.read_bytes()[begin:], code)
        return job.write_record(**found)
    except (OSError, ValueError) as error:  # a full disk, a folder that cannot be written: the other runs go on
        return {"label": job.label, "error": str(error)}


def _last_error(told: bytes, code: int) -> str:
    """What the launcher said last, its own error messages first."""
    lines = [line.strip() for line in told.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or [f"exit code {code}, and nothing said"])[-1].removeprefix("error: ")
    return f"killed by {signal.Signals(-code).name}; it said last: {last}" if code < 0 else last


def prepare(jobs: Sequence[Job], rerun: bool = False) -> None:
    """Check every job before any is run. What is in the way of one, a run with other settings, is removed with `rerun`.

    Raises:
        StudyError: a configuration that the launcher would refuse; without `rerun`, a run with other settings.
    """
    others = []
    for job in jobs:
        changes = job.changes() if job.settings else []
        if changes and (job.finished or job.checkpoint.is_file()):  # else there is nothing to lose
            if not rerun:
                told = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more keys" if len(changes) > 3 else "")
                raise StudyError(f"{job.label}: {job.folder} holds a run with other settings ({told}); --rerun replaces such runs")
            others.append(job)
    for job in others:
        shutil.rmtree(job.folder)


def run_all(jobs: Sequence[Job], gpus: Sequence[str], *, retries: int = 0, rerun: bool = False) -> list[dict[str, Any]]:
    """Do all jobs that are not done yet, one at a time on each of `gpus` ("none" is the CPU), saying how each went.

    A run that was stopped goes on from its last checkpoint. One that fails is tried again `retries` times.

    Returns:
        the record of every job, in order.
    Raises:
        StudyError: see `prepare`.
        SystemExit: 130 after Ctrl-C, when the runs have saved their checkpoints.
    """
    from tqdm import tqdm

    prepare(jobs, rerun)
    records = {job.label: job.record for job in jobs if job.finished}
    for job in jobs:  # the label or its place in the study may be new
        found = records.get(job.label)
        if found and found != found | {"label": job.label, **job.about}:
            records[job.label] = job.write_record(seconds=found["seconds"])
    todo = [job for job in jobs if job.label not in records]
    if records:
        print(f"{len(records)} of {len(jobs)} runs are there already", flush=True)
    launchers, free, failed = Launchers(), queue.SimpleQueue(), 0
    for gpu in gpus:
        free.put(gpu)

    def work(job: Job) -> dict[str, Any]:
        gpu = free.get()
        for _ in range(retries + 1):
            record = run(job, gpu, launchers)
            if "error" not in record or launchers.stopped:
                break
        free.put(gpu)
        return record

    bar = tqdm(total=len(jobs), initial=len(records), unit="run", smoothing=0, disable=None if todo else True)
    with ThreadPoolExecutor(len(gpus)) as pool, bar, _termination_as_interrupt():
        futures = {}
        try:
            futures = {pool.submit(work, job): job for job in todo}
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    job, record = futures[future], future.result()
                    records[job.label] = record
                    failed += "error" in record
                    bar.set_postfix(failed=failed, refresh=False)
                    bar.update()
                    outcome = f"failed: {record['error']} (log: {job.log})" if "error" in record else f"{record['seconds']:.0f} s"
                    tqdm.write(f"[{len(records)}/{len(jobs)}] {job.label}: {outcome}", file=sys.stdout)
                    sys.stdout.flush()
                bar.refresh()
        except KeyboardInterrupt:
            _stop(launchers, pool, futures)
            sys.exit(130)
    return [records[job.label] for job in jobs]


def _stop(launchers: Launchers, pool: ThreadPoolExecutor, futures: Mapping[Any, Job]) -> None:
    while True:  # a further Ctrl-C may come anywhere in it, and none may leave a launcher running
        try:
            launchers.interrupt()
            print("\nCtrl-C: runs stop after their step and save a checkpoint (again: at once)", file=sys.stderr, flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
            wait([future for future in futures if not future.cancelled()])
            break
        except KeyboardInterrupt:
            continue
    print("interrupted; to go on, call the same command again", file=sys.stderr, flush=True)


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """A closed terminal or `kill` would leave the launchers running; both stop them as Ctrl-C does."""
    names = [signal.SIGTERM, signal.SIGHUP]
    before = {name: signal.getsignal(name) for name in names if signal.getsignal(name) != signal.SIG_IGN}  # nohup's is ignored
    try:
        for name in before:
            signal.signal(name, signal.default_int_handler)
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def views(job: Job, count: int) -> list[np.ndarray]:
    """The run's `count` evaluation pictures (H, W, 3) in [0, 1], in the order of azimuth."""
    from PIL import Image

    (folder,) = (job.folder / "save").glob("it*-test")
    return [np.asarray(Image.open(folder / f"{index}.png").convert("RGB"), dtype=np.float32) / 255 for index in range(count)]
