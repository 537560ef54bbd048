"""Cameras for training and evaluation, with the paper's ranges."""

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..host import get_device, parse_structured, register
from ..scene.cameras import CameraRanges, Cameras, orbit_cameras, sample_cameras
from .randomness import step_generator


@dataclass
class RandomCameraConfig:
    """Ranges are [low, high]; focal length in units of the image height; angles in degrees."""

    height: int = 1024
    width: int = 1024
    batch_size: int = 2
    focal_range: Any = field(default_factory=lambda: [0.7, 1.35])
    camera_distance_range: Any = field(default_factory=lambda: [2.0, 2.5])
    elevation_range: Any = field(default_factory=lambda: [-10, 45])
    azimuth_range: Any = field(default_factory=lambda: [0, 360])
    eval_height: int = 1024
    eval_width: int = 1024
    eval_batch_size: int = 1
    n_val_views: int = 1
    n_test_views: int = 120
    eval_focal: float = 1.0
    eval_camera_distance: float = 2.25
    eval_elevation_deg: float = 15.0


def camera_batch(cameras: Cameras, height: int, width: int) -> dict[str, Any]:
    """Cameras in the host's batch layout: matrices (B, 4, 4), positions (B, 3), elevation and azimuth in degrees, fovy in radians."""
    return {
        "mvp_mtx": cameras.mvp,
        "proj_mtx": cameras.proj,
        "c2w": cameras.c2w,
        "camera_positions": cameras.positions,
        # A head light: the paper's albedo shading ignores it, a lit material sees the side the camera sees.
        "light_positions": cameras.positions,
        "elevation": cameras.elevation_deg,
        "azimuth": cameras.azimuth_deg,
        "camera_distances": cameras.distance,
        "fovy": cameras.fovy,
        "height": height,
        "width": width,
    }


class _Steps(IterableDataset):
    """Endless empty items: the cameras of a step are drawn when the step takes its batch (see `on_after_batch_transfer`)."""

    def __iter__(self):
        while True:
            yield {}


class _OrbitViews(Dataset):
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


@register("pgc-random-camera-datamodule")
class RandomCameraDataModule(pl.LightningDataModule):
    """Random views for training, an orbit for validation and test.

    Training cameras are drawn in the transfer hook rather than by the loader: loaders run ahead of the step, and a resumed run would
    then see other cameras than the uninterrupted one.
    """

    Config = RandomCameraConfig  # lets the launcher refuse a wrong key before anything is built

    def __init__(self, cfg: Any = None):
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)  # a subclass has more fields
        self.ranges = CameraRanges(
            focal=tuple(self.cfg.focal_range),
            distance=tuple(self.cfg.camera_distance_range),
            elevation_deg=tuple(self.cfg.elevation_range),
            azimuth_deg=tuple(self.cfg.azimuth_range),
        )
        for key, low in (("batch_size", 1), ("height", 16), ("width", 16), ("n_val_views", 1), ("n_test_views", 1)):
            if self.cfg[key] < low:
                raise ValueError(f"data.{key}: found {self.cfg[key]}, wanted at least {low}")
        for key in ("focal_range", "camera_distance_range", "elevation_range", "azimuth_range"):
            low, high = self.cfg[key]
            if low > high:
                raise ValueError(f"data.{key}: found [{low}, {high}], wanted [low, high]")
        if self.cfg.camera_distance_range[0] <= 0 or self.cfg.focal_range[0] <= 0:
            raise ValueError("data.camera_distance_range and data.focal_range: wanted values greater than 0")

    def setup(self, stage: str | None = None) -> None:
        self._steps, self._val, self._test = _Steps(), _OrbitViews(self.cfg.n_val_views), _OrbitViews(self.cfg.n_test_views)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self._steps, batch_size=None, num_workers=0)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self._val, batch_size=self.cfg.eval_batch_size, num_workers=0)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self._test, batch_size=self.cfg.eval_batch_size, num_workers=0)

    predict_dataloader = test_dataloader

    def training_cameras(self, step: int) -> Cameras:
        return sample_cameras(self.cfg.batch_size, self.ranges, step_generator("cameras", step))

    def eval_cameras(self, count: int) -> Cameras:
        return orbit_cameras(
            count, elevation_deg=self.cfg.eval_elevation_deg, distance=self.cfg.eval_camera_distance, focal=self.cfg.eval_focal
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        device = get_device()
        if "index" not in batch:
            step = self.trainer.fit_loop.total_batch_idx + 1  # counts batches, so gradient accumulation sees new views too
            return camera_batch(self.training_cameras(step).to(device), self.cfg.height, self.cfg.width)
        index = torch.as_tensor(batch["index"]).reshape(-1)
        count = len(self._val) if self.trainer.validating or self.trainer.sanity_checking or self.trainer.training else len(self._test)
        cameras = self.eval_cameras(count)[index.cpu()].to(device)
        return {**camera_batch(cameras, self.cfg.eval_height, self.cfg.eval_width), "index": index}
