"""Random cameras with a reference view: read and checked when the module is made, the same in every step."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from threestudio_pgc.modules.data import camera_batch
from threestudio_pgc.modules.single_image_data import SingleImageDataModule
from threestudio_pgc.scene.cameras import fovy_from_focal, look_at_cameras

SIZE = 32


@pytest.fixture
def image_path(tmp_path):
    array = np.zeros((40, 60, 4), np.uint8)
    array[10:30, 20:50] = (255, 128, 0, 255)
    Image.fromarray(array).save(tmp_path / "cup.png")
    return tmp_path / "cup.png"


@pytest.fixture
def build(image_path):
    def make(**changes):
        small = {"height": SIZE, "width": SIZE, "eval_height": SIZE, "eval_width": SIZE, "n_val_views": 2, "n_test_views": 4}
        return SingleImageDataModule({"image_path": str(image_path), **small, **changes})

    return make


def batches(data, monkeypatch):
    """(training batches, validation batches) as Lightning hands them to a system."""
    import pytorch_lightning as pl

    import threestudio_pgc.modules.data as module
    import threestudio_pgc.modules.single_image_data as single

    for part in (module, single):
        monkeypatch.setattr(part, "get_device", lambda: torch.device("cpu"))
    seen = [], []

    class System(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, index):
            seen[0].append(batch)
            return self.weight * 0

        def validation_step(self, batch, index):
            seen[1].append(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(System(), datamodule=data)
    trainer.validate(System(), datamodule=data)
    return seen


def test_a_training_batch_is_the_random_one_and_the_reference(build, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data = build(reference_elevation_deg=20, reference_azimuth_deg=30, reference_distance=2.5)
    training, validation = batches(data, monkeypatch)
    assert len(training) == 2 and all("reference" not in batch and "index" in batch for batch in validation)
    for step, batch in enumerate(training):
        reference = batch.pop("reference")
        expected = camera_batch(data.training_cameras(step), SIZE, SIZE)
        assert batch.keys() == expected.keys() and torch.equal(batch["c2w"], expected["c2w"])
        assert reference["rgb"].shape == (1, SIZE, SIZE, 3) and reference["mask"].shape == (1, SIZE, SIZE, 1)
        assert reference.keys() - expected.keys() == {"rgb", "mask"}
        camera = look_at_cameras(20, 30, 2.5, math.radians(49.1))
        torch.testing.assert_close(reference["c2w"], camera.c2w)
        torch.testing.assert_close(reference["mvp_mtx"], camera.mvp)


def test_depth_and_normals_come_along_where_they_are_given(build, tmp_path):
    np.save(tmp_path / "depth.npy", np.linspace(1, 2, 40 * 60, dtype=np.float32).reshape(40, 60))
    np.save(tmp_path / "normal.npy", np.broadcast_to(np.float32([0, 0, 1]), (40, 60, 3)))
    reference = build(depth_path=str(tmp_path / "depth.npy"), normal_path=str(tmp_path / "normal.npy")).reference()
    inside = reference["mask"][..., 0] > 0
    assert reference["depth"].shape == (1, SIZE, SIZE, 1) and (reference["depth"][inside] > 1).all()
    assert reference["normal"].shape == (1, SIZE, SIZE, 3)
    torch.testing.assert_close(reference["normal"][inside], torch.tensor([0.0, 0, 1]).expand(int(inside.sum()), 3))


@pytest.mark.parametrize("border", [0.1, 0.2])
def test_the_distance_left_open_shows_a_mesh_as_large_as_the_picture_shows_the_object(build, border):
    """A flat square 1.6 wide in the plane of the origin, seen from the reference camera, is 1 - 2 border of the frame wide."""
    reference = build(border=border).reference()
    corner = torch.tensor([0.0, 0.8, 0.8, 1.0])  # the camera looks along -x
    clip = reference["mvp_mtx"][0] @ corner
    assert (clip[:2].abs() / clip[3]).tolist() == pytest.approx([1 - 2 * border] * 2, abs=1e-5)
    columns = (reference["mask"][0, ..., 0] > 0.5).any(dim=0)
    assert int(columns.sum()) == pytest.approx(SIZE * (1 - 2 * border), abs=1.01)


def test_the_random_cameras_stay_where_zero123_was_trained(build):
    cameras = build(batch_size=8).training_cameras(0)
    torch.testing.assert_close(cameras.fovy, torch.full((8,), math.radians(49.1)))
    assert (cameras.distance / 1.6 >= 1.5 - 1e-5).all() and (cameras.distance / 1.6 <= 2.2).all()


def test_focal_lengths_are_the_users_where_given(build):
    reference = build(reference_focal=1.3, reference_distance=2.0).reference()
    assert reference["fovy"].item() == pytest.approx(fovy_from_focal(1.3)) and reference["camera_distances"].item() == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_path": ""}, "data.image_path: found nothing"),
        ({"image_path": "nowhere.png"}, "data.image_path: no file nowhere.png"),
        ({"depth_path": "nowhere.npy"}, "data.depth_path: no file nowhere.npy"),
        ({"width": 48}, "data.width: found 48, wanted data.height, 32"),
        ({"border": 0.5}, "data.border: found 0.5"),
        ({"reference_elevation_deg": 100}, "data.reference_elevation_deg: found 100"),
        ({"reference_distance": 0}, "data.reference_distance: found 0"),
        ({"reference_focal": -1.0}, "data.reference_focal: found -1"),
        ({"batch_size": 0}, "data.batch_size: found 0"),
        ({"image": "a.png"}, "image"),
    ],
)
def test_bad_settings_are_refused(build, config, message):
    with pytest.raises(Exception, match=message):
        build(**config)


def test_a_picture_without_alpha_is_refused_before_anything_is_built(build, tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="data.image_path: .*photo.png has no transparency"):
        build(image_path=str(tmp_path / "photo.png"))
