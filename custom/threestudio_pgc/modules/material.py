"""Albedo only, the paper's shading."""

from dataclasses import dataclass

from torch import Tensor

from ..host import BaseMaterial, register
from ..scene.materials import AlbedoMaterial


@register("pgc-albedo-material")
class Albedo(BaseMaterial):
    """Config: low, high: range of the colours; the authors' 0.05 to 0.95 keeps the sigmoid away from its flat ends."""

    @dataclass
    class Config(BaseMaterial.Config):
        low: float = 0.05
        high: float = 0.95

    cfg: Config

    def configure(self) -> None:
        self._albedo = AlbedoMaterial(self.cfg.low, self.cfg.high)

    def forward(self, features: Tensor, **kwargs) -> Tensor:
        """(..., 3) features -> (..., 3) display RGB."""
        return self._albedo(features)

    def export(self, features: Tensor, **kwargs) -> dict[str, Tensor]:
        return {"albedo": self._albedo(features)}
