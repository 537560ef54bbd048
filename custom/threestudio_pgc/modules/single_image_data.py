"""Random cameras around an object of which one picture is known."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..diffusion.reference_image import BORDER, load_reference_depth, load_reference_image, load_reference_normal
from ..diffusion.zero123 import DISTANCE_UNIT, FIELD_OF_VIEW_DEG
from ..host import get_device, register
from ..scene.cameras import fovy_from_focal, look_at_cameras
from .data import RandomCameraConfig, RandomCameraDataModule, camera_batch

# Focal length, in image heights, of the pictures that Zero123 was trained on.
ZERO123_FOCAL = 0.5 / math.tan(math.radians(FIELD_OF_VIEW_DEG / 2))


@dataclass
class SingleImageConfig(RandomCameraConfig):
    """Fields of `RandomCameraConfig`, and those of the reference view.

    Zero123 has learnt one focal length and distances of 1.5 to 2.2 units of its own, 2.4 to 3.5 of an object that fills [-0.8, 0.8]^3:
    the random cameras keep to both.

    image_path: a picture of the object with a transparent background.
    depth_path, normal_path: of the same size, see `diffusion.reference_image`; null: none.
    border: share of the frame left free on either side of the object.
    reference_elevation_deg, reference_azimuth_deg: where the picture was taken from; azimuth 0 is +x.
    reference_focal: in image heights.
    reference_distance: world units; null: where an object 1.6 wide looks as large as the picture shows it, 1.6 focal / (1 - 2 border).
    """

    focal_range: Any = field(default_factory=lambda: [ZERO123_FOCAL, ZERO123_FOCAL])
    camera_distance_range: Any = field(default_factory=lambda: [2.4, 3.5])
    image_path: str = ""
    depth_path: Any = None
    normal_path: Any = None
    border: float = BORDER
    reference_elevation_deg: float = 0.0
    reference_azimuth_deg: float = 0.0
    reference_focal: float = ZERO123_FOCAL
    reference_distance: Any = None


@register("pgc-single-image-datamodule")
class SingleImageDataModule(RandomCameraDataModule):
    """Random views for training, each step with the reference view; evaluation as in `RandomCameraDataModule`.

    A training batch has one more entry, "reference": a batch of one camera as `camera_batch` makes it, with "rgb" (1, H, W, 3) on white,
    "mask" (1, H, W, 1), both in [0, 1], and where given "depth" (1, H, W, 1), "normal" (1, H, W, 3). Everything is read and checked when
    the module is made.
    """

    Config = SingleImageConfig

    def __init__(self, cfg: Any = None):
        super().__init__(cfg)
        if self.cfg.height != self.cfg.width:
            raise ValueError(f"data.width: found {self.cfg.width}, wanted data.height, {self.cfg.height}: the reference view is square")
        if not self.cfg.image_path:
            raise ValueError("data.image_path: found nothing, wanted a picture with a transparent background")
        if not abs(self.cfg.reference_elevation_deg) <= 90:
            raise ValueError(f"data.reference_elevation_deg: found {self.cfg.reference_elevation_deg}, wanted degrees in [-90, 90]")
        self._reference = self._load_reference()

    def _load_reference(self) -> dict[str, Any]:
        cfg, size = self.cfg, self.cfg.height
        picture = load_reference_image(cfg.image_path, size=size, border=cfg.border)
        distance = DISTANCE_UNIT * cfg.reference_focal / (1 - 2 * cfg.border) if cfg.reference_distance is None else cfg.reference_distance
        for key, value in (("reference_focal", cfg.reference_focal), ("reference_distance", distance)):
            if not value > 0:
                raise ValueError(f"data.{key}: found {value}, wanted more than 0")
        cameras = look_at_cameras(cfg.reference_elevation_deg, cfg.reference_azimuth_deg, distance, fovy_from_focal(cfg.reference_focal))
        reference = {**camera_batch(cameras, size, size), "rgb": picture.rgb[None], "mask": picture.mask[None]}
        if cfg.depth_path is not None:
            reference["depth"] = load_reference_depth(cfg.depth_path, picture.frame, size=size)[None]
        if cfg.normal_path is not None:
            reference["normal"] = load_reference_normal(cfg.normal_path, picture.frame, size=size)[None]
        return reference

    def reference(self) -> dict[str, Any]:
        """The reference view's entry of a training batch, on the device of this process."""
        device = get_device()
        self._reference = {key: value.to(device) if torch.is_tensor(value) else value for key, value in self._reference.items()}
        return dict(self._reference)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        cameras = super().on_after_batch_transfer(batch, dataloader_idx)
        return cameras if "index" in cameras else {**cameras, "reference": self.reference()}
