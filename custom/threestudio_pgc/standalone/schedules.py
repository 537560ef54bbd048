"""Numbers that change while training: `value` or `[start, v0, v1, end]`."""

import math
from collections.abc import Sequence
from typing import Literal


def C(value, epoch: int, global_step: int, interpolation: Literal["linear", "exp"] = "linear") -> float:
    """Value of a scheduled number now.

    Args:
        value: a number (constant), or a list
            `[start, v0, v1, end]`: v0 until `start`, then towards v1, which it keeps from `end` on;
            `[v0, v1, end]`: the same with start = 0;
            `[s0, v0, v1, s1, v2, s2, ...]`: piecewise, v0 at s0, v1 at s1, v2 at s2, ...
            Positions are steps; a piece whose end is written as a float (`2.0`) counts in epochs.
        epoch: current epoch, from 0.
        global_step: optimiser steps done, from 0.
        interpolation: `linear`, or `exp` (linear in the logarithm; both values must be positive).

    Raises:
        ValueError: not a number and not a list of numbers, a list of another length, or `exp` between values that are not positive.
    """
    if _is_number(value):
        return value
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(_is_number(item) for item in value):
        raise ValueError(f"a schedule is a number or a list of numbers such as [start, v0, v1, end], found {value!r}")
    items = list(value)
    if len(items) == 3:
        items.insert(0, 0)
    if len(items) < 4 or len(items) % 2:
        raise ValueError(f"a schedule is [v0, v1, end], [start, v0, v1, end] or [s0, v0, v1, s1, v2, s2, ...], found {items}")
    # Pieces as (start, v0, v1, end): the first as written, each further pair (v, s) goes on from the one before.
    start, v0, v1, end = items[:4]
    for next_value, next_end in zip(items[4::2], items[5::2]):
        if _clock(end, epoch, global_step) < end:
            break
        start, v0, v1, end = end, v1, next_value, next_end
    now = _clock(end, epoch, global_step)
    share = min(max((now - start) / (end - start), 0.0), 1.0) if end != start else float(now >= end)
    if interpolation == "linear":
        return v0 + (v1 - v0) * share
    if interpolation == "exp":
        if v0 <= 0 or v1 <= 0:
            raise ValueError(f"exp interpolation needs positive values, found {v0} and {v1}")
        return math.exp(math.log(v0) + (math.log(v1) - math.log(v0)) * share)
    raise ValueError(f"interpolation is 'linear' or 'exp', found {interpolation!r}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _clock(position, epoch: int, global_step: int) -> int:
    return global_step if isinstance(position, int) else epoch
