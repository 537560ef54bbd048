"""Units of work that can be interrupted, resumed and shared among processes, with one progress bar over all."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threestudio_pgc.export.files import atomic_path, write_bytes

SAVE_EVERY_S = 60.0
STATE = "state.pt"  # of an unfinished unit, in its folder


class Interrupted(Exception):
    """The user asked to stop; what was done is saved, and the same command goes on from there."""


class UnitFailed(RuntimeError):
    """One unit raised an error; those that had finished are kept."""


@dataclass(frozen=True)
class Unit:
    """name: its folder. settings: all that its result depends on, as JSON. steps: its length on the progress bar."""

    name: str
    settings: dict[str, Any]
    steps: int


class Monitor:
    """What a unit sees of the run around it: `tick` moves the bar, `stopped` says that the user wants to stop."""

    def __init__(self, tick: Callable[[int], None] = lambda count: None, stopped: Callable[[], bool] = lambda: False):
        self.tick, self.stopped = tick, stopped


# work(settings, folder, monitor) -> what is found, as JSON; it may write files into folder
Work = Callable[[dict[str, Any], Path, Monitor], dict[str, Any]]


def run_units(units: Sequence[Unit], work: Work, folder: Path, *, workers: int = 1, label: str = "") -> list[dict[str, Any]]:
    """Do every unit that is not done yet, and return what each found, in the order given.

    A unit is done when `folder`/NAME/record.json holds its very settings; one with other settings is done again. With one worker all is
    done in this process; with more, in spawned ones of one thread each, which serve two cores better than one process of two threads.

    Raises:
        Interrupted: after Ctrl-C; units in progress have saved their state where `work` does so.
        UnitFailed: a unit failed; names it.
    """
    from tqdm import tqdm

    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        record = read_record(folder / unit.name, unit.settings)
        if record is not None:
            found[unit.name] = record
    todo = [unit for unit in units if unit.name not in found]
    total = sum(unit.steps for unit in units)
    done = total - sum(unit.steps for unit in todo)
    if done and todo:
        print(f"{label}: {len(found)} of {len(units)} runs are there already")
    with _sigint_to_event() as stop, tqdm(total=total, initial=done, desc=label, unit="step", disable=not todo, mininterval=1.0) as bar:
        pick = _in_processes if workers > 1 and len(todo) > 1 else _in_this_process
        for unit, record in pick(todo, work, folder, min(workers, len(todo)), bar.update, stop):
            found[unit.name] = record
    return [found[unit.name] for unit in units]


def read_record(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished unit with these settings found, or None."""
    try:
        record = json.loads((folder / "record.json").read_text())
    except (OSError, ValueError):
        return None
    return record["found"] if isinstance(record, dict) and record.get("settings") == _as_json(settings) else None


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _do(unit: Unit, work: Work, folder: Path, monitor: Monitor) -> dict[str, Any]:
    target = folder / unit.name
    mark = target / "settings.json"
    if not mark.is_file() or json.loads(mark.read_text()) != _as_json(unit.settings):
        (target / STATE).unlink(missing_ok=True)  # the state of another run
        write_bytes(mark, json.dumps(unit.settings, indent=1).encode())
    begun = time.perf_counter()
    try:
        found = work(unit.settings, target, monitor)
    except Interrupted:
        raise
    except Exception as error:
        raise UnitFailed(f"{unit.name}: {type(error).__name__}: {error}") from error
    found = _as_json(found | {"seconds": time.perf_counter() - begun})
    write_bytes(target / "record.json", json.dumps({"settings": unit.settings, "found": found}, indent=1).encode())
    (target / STATE).unlink(missing_ok=True)
    return found


def _in_this_process(todo, work, folder, workers, tick, stop):
    monitor = Monitor(tick, stop.is_set)
    for unit in todo:
        if stop.is_set():
            raise Interrupted
        yield unit, _do(unit, work, folder, monitor)


def _in_processes(todo, work, folder, workers, tick, stop):
    context = mp.get_context("spawn")
    ticks, stopping = context.Queue(), context.Event()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(ticks, stopping)) as pool:
        with _sigint_ignored():
            futures = {pool.submit(_do_in_worker, unit, work, folder): unit for unit in todo}
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                tick(_drain(ticks))
                if stop.is_set():
                    raise Interrupted
                for future in finished:
                    yield futures[future], future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _drain(ticks) -> int:
    count = 0
    while True:
        try:
            count += ticks.get_nowait()
        except queue.Empty:
            return count


_worker_monitor = Monitor()


def _start_worker(ticks, stopping) -> None:
    global _worker_monitor
    torch.set_num_threads(1)
    os.environ.setdefault("TQDM_DISABLE", "1")
    _worker_monitor = Monitor(ticks.put, stopping.is_set)


def _do_in_worker(unit: Unit, work: Work, folder: Path) -> dict[str, Any]:
    return _do(unit, work, folder, _worker_monitor)


@contextmanager
def _sigint_ignored():
    """Processes started inside ignore Ctrl-C, which a terminal sends to all of a group, from their first instruction on: the process that
    started them tells them when to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _sigint_to_event():
    """Ctrl-C sets the event instead of raising in the middle of a step; a second Ctrl-C raises as ever."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        # Past Python's buffers: the signal may have come in the middle of a print, which must not be entered twice.
        os.write(1, b"\nstopping after this step; again to stop at once\n")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def optimise(
    step: Callable[[int], dict[str, float] | None],
    *,
    steps: int,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    checkpoint: Path,
    monitor: Monitor,
    stateful: Mapping[str, Any] | None = None,
    snapshot: Callable[[], Any] = lambda: None,
) -> list[dict[str, float]]:
    """Call `step(i)`, which leaves gradients on `parameters` and may return numbers, then the optimiser, `steps` times.

    The state is saved to `checkpoint` once a minute and when the user stops, and read from there at the start; steps must depend on i
    and the parameters alone, so that a resumed run is the uninterrupted one.

    Args:
        stateful: by name, what belongs to the state too, with `state_dict` and `load_state_dict`: an adaptive threshold, a method.
        snapshot: called whenever the state is saved, to write a picture of how far it is.

    Returns:
        the numbers that steps returned, each with its "step".
    """
    log: list[dict[str, float]] = []
    begin, stateful = 0, stateful or {}
    state = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else None
    if state is not None and (state["stateful"] or {}).keys() == stateful.keys():  # else it is an older version's
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        for name, one in stateful.items():
            one.load_state_dict(state["stateful"][name])
        log, begin = state["log"], state["done"]
        monitor.tick(begin)
    saved = time.monotonic()
    for i in range(begin, steps):
        optimizer.zero_grad(set_to_none=True)
        numbers = step(i)
        if numbers is not None:
            log.append({"step": i} | numbers)
        optimizer.step()
        monitor.tick(1)
        stopping = monitor.stopped()
        if (stopping and i + 1 < steps) or time.monotonic() - saved > SAVE_EVERY_S:
            state = {
                "parameters": [parameter.detach() for parameter in parameters],
                "optimizer": optimizer.state_dict(),
                "stateful": {name: one.state_dict() for name, one in stateful.items()},
                "log": log,
                "done": i + 1,
            }
            with atomic_path(checkpoint) as temporary:
                torch.save(state, temporary)
            snapshot()
            saved = time.monotonic()
            if stopping:
                raise Interrupted
    return log
