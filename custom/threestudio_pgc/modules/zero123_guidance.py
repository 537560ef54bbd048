"""Score distillation from Zero123: one picture of the object instead of a prompt."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..diffusion.reference_image import BORDER, load_reference_image
from ..diffusion.zero123 import DISTANCE_UNIT, POSES, Zero123Prior, encode_reference
from ..host import get_device, register
from .guidance import DistillationGuidance, refuse


@register("pgc-zero123-guidance")
class Zero123Guidance(DistillationGuidance):
    """Zero123, Zero123-XL and Stable Zero123.

    Config, beside that of `DistillationGuidance`:
        cond_image_path: the picture, with a transparent background; the data's image_path.
        cond_elevation_deg, cond_azimuth_deg, cond_camera_distance: where it was taken from; the data's reference_elevation_deg and so on.
        border: share of the frame left free on either side of the object; the data's border.
        pose: "zero123" or "stable-zero123", which the model was trained with; "auto" goes by its name.
        distance_unit: world units per unit of the model, see `diffusion.zero123.DISTANCE_UNIT`.
        pretrained_config, vram_O: of the host's zero123-guidance, so that its configurations need no edit; they say nothing here.
    """

    PRIOR = Zero123Prior
    needs_prompt = False
    PRIOR_SCALE = (5.0, "diffusers")

    @dataclass
    class Config(DistillationGuidance.Config):
        pretrained_model_name_or_path: str = "ashawkey/zero123-xl-diffusers"
        cond_image_path: str = ""
        cond_elevation_deg: float = 0.0
        cond_azimuth_deg: float = 0.0
        cond_camera_distance: Any = None
        border: float = BORDER
        pose: str = "auto"
        distance_unit: float = DISTANCE_UNIT
        pretrained_config: Any = None
        vram_O: bool = True

    cfg: Config

    def configure(self, sharing: DistillationGuidance | None = None, stream: str = "") -> None:
        if not self.cfg.cond_image_path:
            refuse("cond_image_path", "nothing", "a picture with a transparent background, e.g. ${data.image_path}")
        if not isinstance(self.cfg.cond_camera_distance, (int, float)) or not self.cfg.cond_camera_distance > 0:
            refuse("cond_camera_distance", self.cfg.cond_camera_distance, "the distance the picture was taken from, in world units")
        if self.cfg.pose not in ("auto", *POSES):
            refuse("pose", self.cfg.pose, f"one of auto, {', '.join(POSES)}")
        super().configure(sharing, stream)
        if self._method.separate_negative:
            refuse("objective", self.cfg.objective, "another, or without its negative: it needs a negative prompt, and Zero123 takes none")
        name, size = self.cfg.pretrained_model_name_or_path, self._prior.image_size
        image = load_reference_image(self.cfg.cond_image_path, size=size, border=self.cfg.border).rgb
        embedding = encode_reference(name, image, device=get_device())
        self._reference = self._prior.reference(embedding, image)

    def __call__(
        self,
        rgb: Tensor,
        elevation: Tensor,
        azimuth: Tensor,
        camera_distances: Tensor,
        rgb_as_latents: bool = False,
        guidance_eval: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Distillation loss of a batch of rendered views; arguments and outputs as `DistillationGuidance.__call__`, without a prompt."""
        conditioning = self._prior.conditioning(
            self._reference,
            elevation,
            azimuth,
            camera_distances,
            reference_elevation_deg=self.cfg.cond_elevation_deg,
            reference_azimuth_deg=self.cfg.cond_azimuth_deg,
            reference_distance=self.cfg.cond_camera_distance,
            pose=self.cfg.pose,
            distance_unit=self.cfg.distance_unit,
        )
        return self._distil(rgb, conditioning, rgb_as_latents, kwargs)
