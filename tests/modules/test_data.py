"""Training cameras: inside the ranges, drawn anew each step, the same for the same seed and step."""

import pytest
import torch

from threestudio_pgc.modules.data import RandomCameraDataModule, camera_batch


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    module = RandomCameraDataModule({"batch_size": 4, "height": 32, "width": 32, "n_val_views": 2, "n_test_views": 6})
    module.setup("fit")
    return module


def test_cameras_stay_in_the_papers_ranges(data):
    batches = [camera_batch(data.training_cameras(step), 32, 32) for step in range(50)]
    batch = {key: torch.cat([b[key] for b in batches]) for key in ("elevation", "azimuth", "camera_distances", "fovy")}
    focal = 0.5 / torch.tan(batch["fovy"] / 2)
    for values, low, high in (
        (batch["elevation"], -10, 45),
        (batch["azimuth"], 0, 360),
        (batch["camera_distances"], 2.0, 2.5),
        (focal, 0.7, 1.35),
    ):
        assert low - 1e-4 <= values.min() < low + 0.2 * (high - low) and high - 0.2 * (high - low) < values.max() <= high + 1e-4


def test_focal_length_is_drawn_per_view(data):
    assert len(set(data.training_cameras(0).fovy.tolist())) == 4


def test_step_and_seed_decide_the_cameras(data, monkeypatch):
    first = data.training_cameras(3).c2w
    torch.rand(11)
    assert torch.equal(first, data.training_cameras(3).c2w)
    assert not torch.equal(first, data.training_cameras(4).c2w)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert not torch.equal(first, data.training_cameras(3).c2w)


def test_every_process_sees_its_own_views(data, monkeypatch):
    first = data.training_cameras(0).c2w
    monkeypatch.setenv("RANK", "1")
    assert not torch.equal(first, data.training_cameras(0).c2w)


def test_loaders_have_one_item_per_evaluation_view(data):
    assert len(data.val_dataloader()) == 2 and len(data.test_dataloader()) == 6
    assert next(iter(data.train_dataloader())) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: found 0"),
        ({"elevation_range": [45, -10]}, "data.elevation_range"),
        ({"focal_range": [0.0, 1.0]}, "data.focal_range"),
        ({"batchsize": 2}, "batch_size"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(Exception, match=message):
        RandomCameraDataModule(config)
