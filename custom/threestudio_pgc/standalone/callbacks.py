"""What the launcher hangs into Lightning's training loop."""

import math
import os
import signal
import sys
import threading
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ProgressBar
from tqdm import tqdm

from .log import info
from .misc import get_rank
from .seeding import seed_step


class StepSeeding(Callback):
    """Seeds the global generators before every training batch from (seed, step, batch within the step, process).

    So what a step draws does not depend on how the run got there: a resumed run is the uninterrupted one, bit for bit on a CPU,
    whatever was drawn in between by prefetching, validation or the loading of models.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._step, self._micro_batch = -1, 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._micro_batch = self._micro_batch + 1 if trainer.global_step == self._step else 0
        self._step = trainer.global_step
        seed_step(self.seed, self._step, self._micro_batch, get_rank())


class Interruption(BaseException):
    """Ctrl-C, answered: whatever was to be saved is saved."""


class StopOnInterrupt(Callback):
    """The first Ctrl-C lets the step finish and saves a checkpoint; the second stops at once.

    Use as a context manager around the Trainer's calls; leaving it restores the former handler.
    """

    def __init__(self, checkpoint_path: str) -> None:
        self.checkpoint_path = checkpoint_path
        self._requested = False
        self._training = False
        self._step_before = -1
        self._former: Any = None

    def __enter__(self) -> "StopOnInterrupt":
        self._is_main = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
        if self._is_main:
            self._former = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._former)

    def _on_signal(self, *_: Any) -> None:
        if self._requested or not self._training:
            raise Interruption
        self._requested = True
        # Past Python's buffers: the signal may have come in the middle of a message, which must not be entered twice.
        os.write(2, b"\nCtrl-C: saving a checkpoint after this step (again: stop at once)\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._training = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step != self._step_before:  # gradients half accumulated are in no checkpoint
            self._stop_if_requested(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self._training:
            self._stop_if_requested(trainer)

    def _stop_if_requested(self, trainer: pl.Trainer) -> None:
        # One process may have seen the signal a step before another; all must save together.
        if trainer.strategy.reduce_boolean_decision(self._requested, all=False):
            trainer.save_checkpoint(self.checkpoint_path)
            raise Interruption


class StepBar(ProgressBar):
    """Progress in optimiser steps: it/s, time left and the metrics logged with `prog_bar=True`.

    On a terminal a bar; into a file or a pipe a line now and then.
    """

    seconds_between_lines = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None
        self._total: int | None = None
        self._start_step = self._shown_step = 0
        self._start_time = self._line_time = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        tqdm.write(sep.join(str(arg) for arg in args), file=sys.stderr)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._total = _total_steps(trainer)
        self._start_step = self._shown_step = trainer.global_step
        self._start_time = self._line_time = time.monotonic()
        self._open("train", self._total, self._start_step, "step")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._shown_step:
            return
        metrics = {name.rsplit("/", 1)[-1]: _short(value) for name, value in self.get_metrics(trainer, pl_module).items()}
        metrics.pop("v_num", None)
        if self._bar is not None:
            self._bar.set_postfix(metrics, refresh=False)
            self._bar.update(step - self._shown_step)
        elif self._enabled and get_rank() == 0:
            self._print_line(step, metrics)
        self._shown_step = step

    def _print_line(self, step: int, metrics: dict[str, str]) -> None:
        now = time.monotonic()
        if now - self._line_time < self.seconds_between_lines and step != self._total:
            return
        self._line_time = now
        rate = (step - self._start_step) / max(now - self._start_time, 1e-9)
        words = [f"step {step}/{self._total or '?'}", f"{rate:.2f} it/s"]
        if self._total:
            words.append(f"{tqdm.format_interval((self._total - step) / rate)} left")
        info(", ".join(words + [f"{name} {value}" for name, value in metrics.items()]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open("test", _sum(trainer.num_test_batches), 0, "view")

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def _open(self, description: str, total: int | None, initial: int, unit: str) -> None:
        self._close()
        if self._enabled and get_rank() == 0 and sys.stderr.isatty():
            self._bar = tqdm(desc=description, total=total, initial=initial, unit=unit, dynamic_ncols=True, smoothing=0.1)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _sum(counts: Any) -> int | None:
    total = sum(counts) if isinstance(counts, (list, tuple)) else counts
    return int(total) if math.isfinite(total) else None


def _total_steps(trainer: pl.Trainer) -> int | None:
    if trainer.max_steps > 0:
        return trainer.max_steps
    total = (trainer.max_epochs or math.inf) * trainer.num_training_batches / trainer.accumulate_grad_batches
    return int(total) if math.isfinite(total) and total > 0 else None


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
