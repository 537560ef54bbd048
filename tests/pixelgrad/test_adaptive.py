"""The running quantile against exact quantiles of all pixels, and what a run of several processes or a resumed one makes of it."""

import numpy as np
import pytest
import torch

from threestudio_pgc.pixelgrad import QuantileThreshold, clip_norm, pixel_norm
from threestudio_pgc.pixelgrad.adaptive import N_BINS


def gradients(steps, *, scale=1.0, spread=1.0, seed=0, size=32):
    """`steps` gradients (2, size, size, 3) with log-normal pixel norms."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(steps, 2, size, size, 3, generator=generator)
    length = scale * torch.exp(spread * torch.randn(steps, 2, size, size, 1, generator=generator))
    return torch.nn.functional.normalize(direction, dim=-1) * length


def test_nothing_seen_clips_nothing():
    threshold = QuantileThreshold(0.99)
    for nothing in (torch.zeros(0, 4, 4, 3), torch.zeros(2, 4, 4, 3), torch.full((1, 4, 4, 3), float("nan"))):
        assert threshold(nothing) == 1.0


@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("scale", [1e-12, 0.1, 1e12])
def test_it_meets_a_known_quantile_within_two_per_cent(q, scale):
    threshold, seen = QuantileThreshold(q, window=100), gradients(20, scale=scale)
    for raw in seen:
        found = threshold(raw)
    assert found == pytest.approx(np.quantile(pixel_norm(seen).double().numpy(), q), rel=0.02)


def test_the_first_step_has_a_threshold_already():
    raw = gradients(1)[0]
    assert QuantileThreshold(0.9)(raw) == pytest.approx(np.quantile(pixel_norm(raw).numpy(), 0.9), rel=0.02)


def test_warm_up_averages_all_steps_and_then_the_window_moves_on():
    threshold = QuantileThreshold(0.9, window=10)
    before, after = gradients(10), gradients(80, scale=100.0, seed=1)
    for raw in before:
        threshold(raw)
    assert threshold.value == pytest.approx(np.quantile(pixel_norm(before).numpy(), 0.9), rel=0.02)
    for raw in after:
        threshold(raw)
    assert threshold.value == pytest.approx(np.quantile(pixel_norm(after).numpy(), 0.9), rel=0.02)
    assert threshold.counts.sum() == pytest.approx(10 * 2 * 32 * 32, rel=1e-3)  # it remembers a window's worth of pixels


def test_the_share_that_a_rule_clips_is_the_one_asked_for():
    threshold, clipped = QuantileThreshold(0.95), []
    for raw in gradients(60):
        c = threshold(raw)
        clipped.append(float((pixel_norm(raw) > c).float().mean()))
        assert pixel_norm(clip_norm(raw, c)).max() <= c * (1 + 1e-6)
    assert np.mean(clipped[20:]) == pytest.approx(0.05, abs=0.005)


def test_a_few_huge_pixels_do_not_move_it():
    clean, dirty = QuantileThreshold(0.99), QuantileThreshold(0.99)
    for raw in gradients(20):
        clean(raw)
        raw = raw.clone()
        raw[:, 0, 0] *= 1e6
        dirty(raw)
    assert dirty.value == pytest.approx(clean.value, rel=0.1)


def test_pixels_without_a_gradient_do_not_count():
    raw = gradients(1)[0]
    padded = torch.cat([raw, torch.zeros_like(raw), torch.full_like(raw, float("inf"))])
    assert QuantileThreshold(0.9)(padded) == QuantileThreshold(0.9)(raw)


def test_norm_is_the_rules_own():
    raw = gradients(1)[0]
    assert QuantileThreshold(0.9, norm="linf")(raw) == pytest.approx(np.quantile(raw.abs().amax(-1).numpy(), 0.9), rel=0.02)


def test_state_continues_as_if_nothing_had_happened():
    whole, begun = QuantileThreshold(0.99, window=5), QuantileThreshold(0.99, window=5)
    seen = gradients(12)
    values = [whole(raw) for raw in seen]
    for raw in seen[:7]:
        begun(raw)
    state = begun.state_dict()
    resumed = QuantileThreshold(0.99, window=5)
    resumed.load_state_dict(state)
    assert [resumed(raw) for raw in seen[7:]] == values[7:]
    assert state["steps"] == 7, "a state already taken must not move on"

    other = QuantileThreshold(0.99, norm="linf")
    other.load_state_dict(state)
    assert other.steps == 0
    with pytest.raises(ValueError, match="5 bins, wanted 8192"):
        resumed.load_state_dict(state | {"counts": torch.zeros(5)})


@pytest.mark.parametrize("quantile", [0, 1, -0.1, 1.5, float("nan"), "0.9", True, None])
def test_a_quantile_out_of_range_is_refused(quantile):
    with pytest.raises(ValueError, match="pgc.threshold.quantile"):
        QuantileThreshold(quantile)


@pytest.mark.parametrize("window", [0, -1, 1.5, "10", True])
def test_a_window_out_of_range_is_refused(window):
    with pytest.raises(ValueError, match="pgc.threshold.window"):
        QuantileThreshold(0.9, window=window)


def _process(rank, store, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    threshold = QuantileThreshold(0.97, window=4)
    # Each process sees one of the two views of a step.
    values = [threshold(raw[rank : rank + 1]) for raw in gradients(9)]
    torch.save({"values": values, "counts": threshold.counts}, f"{results}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_each_other_and_with_one_that_sees_all(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path / "store"), str(tmp_path / "result")), nprocs=2)
    first, second = (torch.load(tmp_path / f"result-{rank}.pt") for rank in range(2))
    alone = QuantileThreshold(0.97, window=4)
    assert first["values"] == second["values"] == [alone(raw) for raw in gradients(9)]
    assert torch.equal(first["counts"], second["counts"]) and torch.equal(first["counts"], alone.counts)
    assert alone.counts.shape == (N_BINS,)
