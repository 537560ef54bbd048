"""What the surface looks like: a colour alone, the paper's shading, or a material under a light."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..host import BaseMaterial, info, register
from ..scene.environment import EnvironmentLight
from ..scene.hdr import LightError, read_hdr
from ..scene.materials import AlbedoMaterial, PBRMaterial, pbr_ranges
from ..scene.regularizers import smoothness
from ..scene.shading import TONE_MAPPINGS
from .randomness import step_generator

# Weights of these may stand in system.loss as lambda_<name>.
REGULARIZERS = ("base_color_smoothness", "material_smoothness", "white_light")


@register("pgc-albedo-material")
class Albedo(BaseMaterial):
    """Config: low, high: range of the colours; the authors' 0.05 to 0.95 keeps the sigmoid away from its flat ends."""

    @dataclass
    class Config(BaseMaterial.Config):
        low: float = 0.05
        high: float = 0.95

    cfg: Config
    n_features = AlbedoMaterial.n_features

    def configure(self) -> None:
        self._albedo = AlbedoMaterial(self.cfg.low, self.cfg.high)

    def forward(self, features: Tensor, **kwargs) -> Tensor:
        """(..., 3) features -> (..., 3) display RGB."""
        return self._albedo(features)

    def export(self, features: Tensor, **kwargs) -> dict[str, Tensor]:
        return {"albedo": self._albedo(features)}


@register("pgc-pbr-material")
class PBR(BaseMaterial):
    """A metallic-roughness material lit by an environment; what the prior sees is display RGB.

    In place of pgc-albedo-material in any configuration: `system.material_type=pgc-pbr-material system.geometry.texture.n_output=9`, since
    it reads nine features.

    Config:
        low, high: range of the base colour, as pgc-albedo-material's; null takes the preset's.
        ranges: what the maps may be: "authors", "fantasia3d" or "host", see `scene.materials.PBR_PRESETS`.
        occlusion, roughness, metallic: [low, high] in [0, 1] in place of that preset's.
        normal: how far the shading normal may lean, in place of the preset's; 0 for no normal map.
        light: an equirectangular .hdr or .exr, or "builtin:studio", "builtin:sky".
        light_intensity: it is multiplied by this.
        light_rotation: degrees about the vertical, counter-clockwise seen from above.
        turn_light: in training the light is turned by another angle in every step, so that the base colour cannot hold its shading.
        trainable_light: the light, at a height of 16 pixels, is optimised too; name `material` in optimizer.params and weigh
            lambda_white_light.
        tone_mapping: "neutral" (Khronos PBR Neutral, what glTF viewers show), "srgb", which clips, or "none".
    """

    @dataclass
    class Config(BaseMaterial.Config):
        low: Any = None
        high: Any = None
        ranges: str = "authors"
        occlusion: Any = None
        roughness: Any = None
        metallic: Any = None
        normal: Any = None
        light: str = "builtin:studio"
        light_intensity: float = 1.0
        light_rotation: float = 0.0
        turn_light: bool = False
        trainable_light: bool = False
        tone_mapping: str = "neutral"

    cfg: Config
    requires_normal = True
    n_features = PBRMaterial.n_features

    def configure(self) -> None:
        cfg = self.cfg
        if cfg.tone_mapping not in TONE_MAPPINGS:
            raise ValueError(f"system.material.tone_mapping: found {cfg.tone_mapping!r}, wanted one of {', '.join(TONE_MAPPINGS)}")
        if not cfg.light_intensity > 0:
            raise ValueError(f"system.material.light_intensity: found {cfg.light_intensity}, wanted more than 0")
        try:
            ranges = pbr_ranges(cfg.ranges, **{name: cfg[name] for name in ("occlusion", "roughness", "metallic", "normal")})
            low, high = (default if given is None else given for given, default in zip((cfg.low, cfg.high), ranges.base_color))
            self._material = PBRMaterial(replace(ranges, base_color=(low, high)), cfg.tone_mapping)
        except (TypeError, ValueError) as error:
            raise ValueError(f"system.material: {error}") from error
        try:
            radiance = read_hdr(cfg.light)
        except LightError as error:
            raise ValueError(f"system.material.light: {error}") from error
        self.light = EnvironmentLight(
            radiance, intensity=cfg.light_intensity, rotation_deg=cfg.light_rotation, trainable=cfg.trainable_light
        )
        info(f"Light {cfg.light}: {radiance.shape[1]} x {radiance.shape[0]}, mean radiance {radiance.mean():.2f}")

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        if self.cfg.turn_light:
            turn = 360 * float(torch.rand(1, generator=step_generator("light", global_step))) if self.training else 0.0
            self.light.rotation_deg = self.cfg.light_rotation + turn

    def forward(self, features: Tensor, viewdirs: Tensor, shading_normal: Tensor, **kwargs) -> Tensor:
        """(N, 9) features, (N, 3) unit directions from the camera to the surface, (N, 3) unit normals -> (N, 3) display RGB."""
        return self._material(features, self.light, shading_normal, -viewdirs)

    def export(self, features: Tensor, shading_normal: Tensor | None = None, **kwargs) -> dict[str, Tensor]:
        """The maps at (N, 9) features, see `PBRMaterial.maps`; "base_color" is "albedo" here, as in the host, "normal" "shading_normal"."""
        maps = self._material.maps(features, shading_normal)
        renamed = {"base_color": "albedo", "normal": "shading_normal"}
        return {renamed.get(name, name): values for name, values in maps.items()}

    def regularizer(self, name: str, features: Tensor, nearby: Tensor) -> Tensor:
        """One of `REGULARIZERS`, a scalar, from the (N, 9) features of points and of points near them."""
        if name == "white_light":
            return self.light.color_deviation()
        channels = slice(0, 3 if name == "base_color_smoothness" else None)
        return smoothness(self._material.values(features)[:, channels], self._material.values(nearby)[:, channels])
