"""Training loop of all stages: worker processes of one thread each that share the weights and do not wait for each other (Hogwild).

On a shared machine one process with several OpenMP threads stalls whenever any of its cores is taken away; independent workers
lose only the time they are not given. The price is that runs are seeded but not reproducible bit for bit with more than one worker.
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class Schedule:
    """Ends after `minutes` of training or `steps` steps (all workers together), whichever comes first."""

    minutes: float
    steps: int = 10**9
    workers: int = 2
    learning_rate: float = 1e-3
    warmup_steps: int = 60
    decay_from: float = 0.0  # share of the run after which the learning rate falls along a cosine to 2 %
    weight_decay: float = 0.0
    ema: float = 0.996
    seed: int = 0
    preview_seconds: float = 240.0
    log_seconds: float = 15.0


class Stage:
    """What is trained. `modules` are shared between the workers; `open` is called once in each, for data that is not shared."""

    name: str
    modules: dict[str, nn.Module]

    def open(self) -> None: ...

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        raise NotImplementedError

    def preview(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Writes a picture of the present quality of (averaged) `modules`."""


def rate_factor(schedule: Schedule, progress: float, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, plateau, cosine."""
    warm = min(1.0, (steps + 1) / schedule.warmup_steps)
    late = max(0.0, (progress - schedule.decay_from) / max(1e-9, 1.0 - schedule.decay_from))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, late))))


def checkpoint_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.ckpt"


def save_atomically(state: dict, path: Path) -> None:
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.rename(path)


def load_modules(folder: Path, name: str, modules: dict[str, nn.Module], averaged: bool = True) -> dict:
    """Loads a stage's checkpoint into `modules` (those it holds) and returns the rest of it."""
    state = torch.load(checkpoint_path(folder, name), map_location="cpu", weights_only=False)
    for key, weights in state["ema" if averaged else "modules"].items():
        if key in modules:
            modules[key].load_state_dict(weights)
    return state


def _work(rank: int, stage: Stage, averages, schedule: Schedule, folder: Path, start: dict, counter) -> None:
    torch.set_num_threads(1)
    stage.open()
    generator = torch.Generator().manual_seed(schedule.seed * 7919 + rank * 101 + start["steps"])
    torch.manual_seed(schedule.seed + 31 * rank + start["steps"])
    parameters = [p for module in stage.modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, schedule.learning_rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay, fused=True)
    if start["optimizer"] is not None:
        # What came to a worker is shared memory, but each needs moments of its own.
        optimizer.load_state_dict(copy.deepcopy(start["optimizer"]))
    began, last_log, last_save, last_preview, sums, count, mine = time.time(), time.time(), time.time(), time.time(), {}, 0, 0
    first_steps = counter.value
    log = (folder / f"{stage.name}.jsonl").open("a") if rank == 0 else None

    def save() -> None:
        state = {"steps": counter.value, "elapsed": start["elapsed"] + time.time() - began, "optimizer": optimizer.state_dict()}
        state["modules"] = {key: module.state_dict() for key, module in stage.modules.items()}
        state["ema"] = {key: module.state_dict() for key, module in averages.items()}
        save_atomically(state, checkpoint_path(folder, stage.name))

    while True:
        elapsed, steps = start["elapsed"] + time.time() - began, counter.value
        progress = max(elapsed / (60 * schedule.minutes), steps / schedule.steps)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * rate_factor(schedule, progress, steps)
        with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel's backward takes a quarter of the step at these sizes
            loss, figures = stage.loss(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        with counter.get_lock():
            counter.value += 1
        mine += 1
        if rank:
            continue
        decay = min(schedule.ema, (1 + steps / schedule.workers) / (10 + steps / schedule.workers))
        with torch.no_grad():
            for key, module in averages.items():
                torch._foreach_lerp_(list(module.parameters()), list(stage.modules[key].parameters()), 1 - decay)
        for key, value in {"loss": float(loss.detach()), **figures}.items():
            sums[key] = sums.get(key, 0.0) + value
        count += 1
        now = time.time()
        if now - last_log > schedule.log_seconds:
            means = {key: value / count for key, value in sums.items()}
            rate = (counter.value - first_steps) / (now - began)
            left = min(60 * schedule.minutes - elapsed, (schedule.steps - steps) / rate)
            log.write(json.dumps({"steps": steps, "elapsed": elapsed, **means}) + "\n")
            log.flush()
            text = " ".join(f"{key} {value:.4f}" for key, value in means.items())
            print(f"{stage.name}: step {steps} {text} grad {float(norm):.2f} {rate:.2f} it/s, {left:.0f} s left", flush=True)
            last_log, sums, count = now, {}, 0
        if now - last_save > 60:
            save()
            last_save = now
        if now - last_preview > schedule.preview_seconds:
            stage.preview(averages, folder)
            last_preview = now
    if rank == 0:
        if count:
            log.write(json.dumps({"steps": counter.value, "elapsed": elapsed, **{k: v / count for k, v in sums.items()}}) + "\n")
        save()
        stage.preview(averages, folder)


def train(stage: Stage, schedule: Schedule, folder: Path, resume: bool) -> dict[str, nn.Module]:
    """Trains `stage.modules` in place, checkpointing to `folder`/<stage.name>.ckpt each minute; returns the averaged modules.

    With `resume` an existing checkpoint is continued, its time and steps counting towards the schedule.
    """
    folder.mkdir(parents=True, exist_ok=True)
    averages = {key: copy.deepcopy(module).requires_grad_(False) for key, module in stage.modules.items()}
    start = {"steps": 0, "elapsed": 0.0, "optimizer": None}
    if resume and checkpoint_path(folder, stage.name).exists():
        state = load_modules(folder, stage.name, stage.modules, averaged=False)
        load_modules(folder, stage.name, averages)
        start = {key: state[key] for key in start}
        print(f"{stage.name}: resumed at step {start['steps']}, {start['elapsed']:.0f} s", flush=True)
    context = mp.get_context("spawn")
    counter = context.Value("l", start["steps"])
    if schedule.workers == 1:
        _work(0, stage, averages, schedule, folder, start, counter)
        return averages
    for module in [*stage.modules.values(), *averages.values()]:
        module.share_memory()
    processes = [
        context.Process(target=_work, args=(rank, stage, averages, schedule, folder, start, counter)) for rank in range(schedule.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{stage.name}: a training worker ended with exit code {process.exitcode}; run again with --resume")
    return averages
