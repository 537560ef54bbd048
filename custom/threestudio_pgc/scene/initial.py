"""Fitting fields to what a run starts from: a shape, and the colours of a mesh."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .fields import HashGridField, evaluate_in_chunks
from .mesh_colors import SurfaceColors
from .signed_distance import SignedDistance

SDF_STEPS = 500
TEXTURE_STEPS = 300
POINTS_PER_STEP = 4096
LEARNING_RATE = 1e-2  # of the grid, as the PGC authors'; the MLP's is a tenth of it
FINAL_LEARNING_RATE = 0.05  # at the end, as a share of that

# A batch of points is drawn from a pool, whose distances are computed once.
POOL_POINTS = 200_000
# Half of them lie near the surface, where the sign is decided, at two distances (standard deviation, in units of `bound`): within a cell
# of the grid, and over the cells around it. The rest fill the cube. The authors' 0.04 and 0.4 leave little for the first.
NEAR_SHARES = ((0.35, 0.01), (0.35, 0.05))

HELD_OUT_POINTS = 10_000
NEAR = 0.05  # what counts as near the surface in the report

# How far off the surface the texture is fitted as well (standard deviation): the shape that is fitted to a mesh runs up to a cell beside
# it, and moves. Larger would mix the colours of thin walls' two sides.
COLOR_OFFSET = 0.01
COLOR_MARGIN = 0.02  # colours keep this share of the range from its ends, where a sigmoid has no slope left


@dataclass(frozen=True)
class FitError:
    """Errors of a fitted distance on points that it was not fitted to."""

    mean: float  # of |error|
    max: float  # of |error|
    wrong_sign: float  # share of points on the wrong side, in [0, 1]

    def __str__(self) -> str:
        return f"mean {self.mean:.4f}, max {self.max:.4f}, wrong sign {100 * self.wrong_sign:.2f} %"


@dataclass(frozen=True)
class FitReport:
    """How well a field follows a signed distance."""

    near: FitError  # within 0.05 of the surface
    cube: FitError  # in the whole cube
    steps: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"distance fitted in {self.steps} steps, {self.seconds:.1f} s; error within {NEAR} of the surface: {self.near}; "
            f"in the whole cube: {self.cube}"
        )


def fit_sdf(
    field: HashGridField,
    distance: SignedDistance,
    *,
    steps: int = SDF_STEPS,
    points_per_step: int = POINTS_PER_STEP,
    lr: float = LEARNING_RATE,
    seed: int,
    bound: float = 1.0,
    progress: bool = True,
) -> FitReport:
    """Train channel 0 of a field towards a signed distance, and channels 1 to 3, the deformation, towards 0.

    The loss is mean |s(x) - d(x)| + mean |deformation(x)|^2, by Adam. Its state goes with the call. The same seed and field give the
    same fit; the global random state is left alone.

    Args:
        field: (N, 3) points -> (N, 4), with `parameter_groups()` as HashGridField's.
        lr: of the grid's features; the MLP learns at a tenth of it. Both fall to 5 % along a cosine.
        bound: the field is fitted in [-bound, bound]^3.
        progress: show bars.

    Raises:
        ValueError: an argument out of range; the field's result is not (N, 4).
    """
    _check_options(steps, points_per_step, lr)
    _require(bound > 0, "bound", bound, "a positive number")
    device = next(field.parameters()).device
    shape = tuple(field(torch.zeros(1, 3, device=device)).shape)
    _require(shape == (1, 4), "result", f"{shape} for one point", "(1, 4): a distance and a deformation")
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)

    near = [(round(share * POOL_POINTS), width * bound) for share, width in NEAR_SHARES]
    pool = [_around_surface(distance, count, width, bound, generator) for count, width in near]
    pool = torch.cat([*pool, _in_cube(POOL_POINTS - sum(count for count, _ in near), bound, generator)]).to(device)
    with tqdm(total=len(pool), desc="Distances", unit="point", unit_scale=True, disable=not progress, leave=False) as bar:
        targets = distance(pool, progress=lambda done, total: bar.update(done - bar.n))

    def loss_of_batch() -> Tensor:
        batch = torch.randint(len(pool), (points_per_step,), generator=generator).to(device)
        output = field(pool[batch])
        return (output[:, 0] - targets[batch]).abs().mean() + output[:, 1:].square().mean()

    _train(field, loss_of_batch, steps=steps, lr=lr, label="Fitting the shape", progress=progress)

    # from a box twice as wide, so that the layer around the surface is filled evenly
    around = distance.surface_points(2 * HELD_OUT_POINTS, generator) + _in_cube(2 * HELD_OUT_POINTS, 2 * NEAR, generator)
    around = around.clamp(-bound, bound).to(device)
    at_random = _in_cube(HELD_OUT_POINTS, bound, generator).to(device)
    expected = distance(around)
    around, expected = around[expected.abs() <= NEAR], expected[expected.abs() <= NEAR]
    near_error = _errors(field, around, expected)
    return FitReport(near_error, _errors(field, at_random, distance(at_random)), steps, time.perf_counter() - begin)


def fit_texture(
    field: HashGridField,
    to_color: Callable[[Tensor], Tensor],
    colors: SurfaceColors,
    *,
    steps: int = TEXTURE_STEPS,
    points_per_step: int = POINTS_PER_STEP,
    lr: float = LEARNING_RATE,
    seed: int,
    progress: bool = True,
) -> float:
    """Train a texture field towards the colours of a mesh, on its surface and slightly beside it.

    The loss is the mean square of to_color(field(x)) - color(x), by Adam, whose state goes with the call. The same seed and field give
    the same fit; the global random state is left alone.

    Args:
        to_color: the material: (N, C) raw features -> (N, 3) display RGB, rising in each feature. Its range is read off at both ends;
            colours outside are replaced by the nearest inside.
        lr: as in `fit_sdf`.
    Returns:
        Root mean square error of a channel on points of the surface that were not fitted to, against the colours within the range.

    Raises:
        ValueError: an argument out of range.
    """
    _check_options(steps, points_per_step, lr)
    device = next(field.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        features = field(torch.zeros(1, 3, device=device))
        low, high = to_color(torch.full_like(features, -100.0)), to_color(torch.full_like(features, 100.0))
    margin = COLOR_MARGIN * (high - low)

    pool, targets = (tensor.to(device) for tensor in colors.sample(POOL_POINTS, generator))
    targets = targets.clamp(low + margin, high - margin)

    def loss_of_batch() -> Tensor:
        batch = torch.randint(len(pool), (points_per_step,), generator=generator).to(device)
        offsets = COLOR_OFFSET * torch.randn(points_per_step, 3, generator=generator)
        offsets[::2] = 0
        return (to_color(field(pool[batch] + offsets.to(device))) - targets[batch]).square().mean()

    _train(field, loss_of_batch, steps=steps, lr=lr, label="Fitting the texture", progress=progress)
    points, expected = (tensor.to(device) for tensor in colors.sample(HELD_OUT_POINTS, generator))
    found = evaluate_in_chunks(lambda chunk: to_color(field(chunk)), points)
    return (found - expected.clamp(low, high)).square().mean().sqrt().item()


def _check_options(steps: int, points_per_step: int, lr: float) -> None:
    _require(steps >= 1, "steps", steps, "at least 1")
    _require(points_per_step >= 1, "points_per_step", points_per_step, "at least 1")
    _require(lr > 0, "lr", lr, "a positive number")


def _train(field: HashGridField, loss_of_batch: Callable[[], Tensor], *, steps: int, lr: float, label: str, progress: bool) -> None:
    groups = field.parameter_groups()
    optimizer = torch.optim.Adam([{"params": groups["encoding"], "lr": lr}, {"params": groups["mlp"], "lr": lr / 10}], foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / steps))
    with torch.enable_grad(), tqdm(range(steps), desc=label, unit="it", disable=not progress) as bar:
        for step in bar:
            optimizer.zero_grad()
            loss = loss_of_batch()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 49:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    optimizer.zero_grad()


def _cosine(share: float) -> float:
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * share))


def _errors(field: HashGridField, points: Tensor, expected: Tensor) -> FitError:
    found = evaluate_in_chunks(field, points)[:, 0]
    error = (found - expected).abs()
    wrong = (found < 0) != (expected < 0)
    return FitError(error.mean().item(), error.max().item(), wrong.float().mean().item())


def _around_surface(distance: SignedDistance, count: int, width: float, bound: float, generator: torch.Generator) -> Tensor:
    points = distance.surface_points(count, generator)
    return (points + width * torch.randn(count, 3, generator=generator)).clamp(-bound, bound)


def _in_cube(count: int, bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, 3, generator=generator) * 2 - 1) * bound


def _require(condition: bool, key: str, found, wanted: str) -> None:
    if not condition:
        raise ValueError(f"fit {key}: found {found!r}, wanted {wanted}")
