"""Runs that are finished, interrupted, resumed and shared among processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from launch_scripts.lab import runs
from launch_scripts.lab.runs import STATE, Interrupted, Monitor, Unit, UnitFailed, optimise, run_units

ROOT = Path(__file__).resolve().parents[2]


def work(settings, folder, monitor):
    """A unit that leaves its mark each time it is really done."""
    (folder / "calls").write_text((folder / "calls").read_text() + "x" if (folder / "calls").is_file() else "x")
    monitor.tick(settings["steps"])
    if settings.get("fail"):
        raise ValueError("as asked")
    return {"square": settings["number"] ** 2, "process": os.getpid()}


def units(count=3, **more):
    return [Unit(f"runs/{number}", {"number": number, "steps": 2, **more}, 2) for number in range(count)]


def test_no_units_no_work(tmp_path):
    assert run_units([], work, tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_every_unit_is_done_once_and_found_again(tmp_path, workers):
    first = run_units(units(), work, tmp_path, workers=workers)
    assert [record["square"] for record in first] == [0, 1, 4] and all(record["seconds"] >= 0 for record in first)
    assert all(record["process"] == os.getpid() for record in first) == (workers == 1)
    assert run_units(units(), work, tmp_path, workers=workers) == first
    assert [(tmp_path / f"runs/{number}/calls").read_text() for number in range(3)] == ["x"] * 3


def test_other_settings_are_another_run(tmp_path):
    run_units(units(), work, tmp_path)
    (tmp_path / "runs/1" / STATE).write_text("of the run before")
    run_units(units(lr=0.5), work, tmp_path)
    assert (tmp_path / "runs/1/calls").read_text() == "xx" and not (tmp_path / "runs/1" / STATE).exists()


def test_a_damaged_record_is_done_again(tmp_path):
    run_units(units(1), work, tmp_path)
    (tmp_path / "runs/0/record.json").write_text('{"settings": ')
    assert run_units(units(1), work, tmp_path)[0]["square"] == 0
    assert json.loads((tmp_path / "runs/0/record.json").read_text())["found"]["square"] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_unit_is_named_and_the_finished_are_kept(tmp_path, workers):
    listed = [*units(2), Unit("runs/bad", {"number": 9, "steps": 2, "fail": True}, 2)]
    with pytest.raises(UnitFailed, match="runs/bad: ValueError: as asked"):
        run_units(listed, work, tmp_path, workers=workers)
    assert (tmp_path / "runs/0/record.json").is_file() and not (tmp_path / "runs/bad/record.json").exists()


def descend(folder, steps, stop_after=None, clock=lambda: 0.0):
    """A few Adam steps on a quadratic whose target depends on the step."""
    target = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([target], lr=0.1)
    done = []

    def step(i):
        done.append(i)
        target.grad = target.detach() - torch.full((4,), float(i))
        return {"value": float(target.detach()[0])} if i % 2 == 0 else None

    monitor = Monitor(stopped=lambda: stop_after is not None and len(done) >= stop_after)
    log = optimise(step, steps=steps, parameters=[target], optimizer=optimizer, checkpoint=folder / STATE, monitor=monitor)
    return target.detach(), log, done


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    (tmp_path / "a").mkdir()
    whole, log, _ = descend(tmp_path / "a", 9)
    (tmp_path / "b").mkdir()
    with pytest.raises(Interrupted):
        descend(tmp_path / "b", 9, stop_after=4)
    resumed, resumed_log, done = descend(tmp_path / "b", 9)
    assert torch.equal(whole, resumed) and log == resumed_log and done == [4, 5, 6, 7, 8]


def test_state_and_picture_are_saved_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SAVE_EVERY_S", -1.0)
    pictures, target = [], torch.nn.Parameter(torch.zeros(1))

    def step(i):
        target.grad = torch.ones(1)

    optimise(
        step,
        steps=3,
        parameters=[target],
        optimizer=torch.optim.SGD([target], lr=1.0),
        checkpoint=tmp_path / STATE,
        monitor=Monitor(),
        snapshot=lambda: pictures.append(float(target.detach())),
    )
    assert pictures == [-1.0, -2.0, -3.0] and torch.load(tmp_path / STATE, weights_only=True)["done"] == 3


class Counter:
    """Something stateful beside the parameters."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_what_else_is_stateful_comes_back_and_a_state_without_it_is_not_used(tmp_path):
    def count(stop_after, name="counter"):
        target, counter, done = torch.nn.Parameter(torch.zeros(1)), Counter(), []

        def step(i):
            done.append(i)
            counter.count += 1
            target.grad = torch.ones(1)

        optimise(
            step,
            steps=6,
            parameters=[target],
            optimizer=torch.optim.SGD([target], lr=1.0),
            checkpoint=tmp_path / STATE,
            monitor=Monitor(stopped=lambda: len(done) >= stop_after),
            stateful={name: counter},
        )
        return float(target.detach()), counter.count, done

    with pytest.raises(Interrupted):
        count(stop_after=4)
    assert count(stop_after=9) == (-6.0, 6, [4, 5])
    assert count(stop_after=9, name="another") == (-6.0, 6, [0, 1, 2, 3, 4, 5])
    state = torch.load(tmp_path / STATE, weights_only=True)
    torch.save(state | {"stateful": None}, tmp_path / STATE)  # as the first version wrote it
    assert count(stop_after=9) == (-6.0, 6, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_stops_after_the_step_and_the_same_call_goes_on(tmp_path, workers):
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            sys.path.insert(0, {str(ROOT)!r})
            import torch
            from launch_scripts.lab.runs import Interrupted, STATE, Unit, optimise, run_units

            def work(settings, folder, monitor):
                target = torch.nn.Parameter(torch.zeros(1))
                def step(i):
                    print(f"unit {{settings['n']}} step {{i}}", flush=True)
                    time.sleep(settings["pause"])
                    target.grad = torch.ones(1)
                optimise(step, steps=20, parameters=[target], optimizer=torch.optim.SGD([target], lr=1.0),
                         checkpoint=folder / STATE, monitor=monitor)
                return {{"value": float(target)}}

            if __name__ == "__main__":
                from pathlib import Path
                listed = [Unit(str(n), {{"pause": 0.1, "n": n}}, 20) for n in range(2)]
                try:
                    print(run_units(listed, work, Path({str(tmp_path)!r}) / "out", workers={workers}))
                except Interrupted:
                    sys.exit(130)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    for line in process.stdout:
        if "unit 0 step 3" in line:  # the progress bar may stand before it
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 130, rest
    assert "Traceback" not in rest and (tmp_path / "out" / "0" / STATE).is_file()
    again = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("'value': -20.0") == 2
    assert "unit 0 step 19" in again.stdout and "unit 0 step 0\n" not in again.stdout, "it went on, not from the start"
