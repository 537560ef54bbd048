"""Means over prompt-mesh pairs and seeds, with intervals that know which runs belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval; NaN where there is nothing to average, ends equal to the mean for a single value."""

    mean: float
    low: float
    high: float


def interval(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Mean of group means, with a two-stage bootstrap: groups are drawn with replacement, then values within each group.

    A group is the runs of one prompt-mesh pair, a value is one seed. Pairs differ far more than seeds do, so resampling runs as if they
    were independent would give intervals that are too narrow.
    """
    groups = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not groups:
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    # (group, resample): means of resampled values; which group is drawn is chosen per resample.
    inner = np.stack([group[rng.integers(len(group), size=(RESAMPLES, len(groups), len(group)))].mean(-1) for group in groups])
    chosen = rng.integers(len(groups), size=(RESAMPLES, len(groups)))
    means = inner[chosen, np.arange(RESAMPLES)[:, None], np.arange(len(groups))[None]].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean([group.mean() for group in groups])), float(low), float(high))


def difference(values: Mapping[tuple, float], reference: Mapping[tuple, float]) -> Interval:
    """Interval of the mean difference of runs that share a key (pair, seed): same cameras, noise and timesteps, another rule."""
    return interval(grouped({key: values[key] - reference[key] for key in values.keys() & reference.keys()}))


def grouped(values: Mapping[tuple, float]) -> list[list[float]]:
    """Values by key (pair, seed) as groups for `interval`."""
    groups: dict = {}
    for key in sorted(values, key=str):
        groups.setdefault(key[0], []).append(values[key])
    return list(groups.values())


def spelled(found: Interval, digits: int = 3) -> str:
    """ "0.712 [0.650, 0.770]", or "-" for nothing."""
    if np.isnan(found.mean):
        return "-"
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"
