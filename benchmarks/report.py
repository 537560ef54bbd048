"""What every benchmark shares: timing against a reference in the same run, a table, a JSON file."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "custom")]


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with `--output`, the JSON file (default outputs/benchmarks/<name>.json) and `--repeats`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks") / f"{name}.json")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def median_seconds(run: Callable[[], Any], repeats: int, *, synchronize: Callable[[], Any] = lambda: None) -> float:
    """Median wall time of `run`, after one call that is not counted (compilation, caches)."""
    run()
    synchronize()
    times = []
    for _ in range(max(1, repeats)):
        begun = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def report(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Print rows (dicts with the same keys) as a table and write them, with the machine, as JSON."""
    import torch

    shown = [{key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in shown)) for key in shown[0]}
    for line in [{key: key for key in widths}, *shown]:
        print("  ".join(line[key].rjust(width) for key, width in widths.items()))
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    machine["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    output.write_text(json.dumps({"machine": machine, "rows": list(rows)}, indent=2) + "\n")
    print(f"written to {output}")
