"""Materials: raw field features -> what the surface looks like."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AlbedoMaterial:
    """A colour per point and no lighting: rgb = low + (high - low) * sigmoid(features).

    The default range is the PGC authors' (sigmoid * 0.9 + 0.05): it keeps the sigmoid from saturating at pure black or white.
    Fantasia3D's field uses the whole of [0, 1].
    """

    low: float = 0.05
    high: float = 0.95

    n_features = 3

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"material low, high: found {self.low}, {self.high}, wanted 0 <= low < high <= 1")

    def __call__(self, features: Tensor) -> Tensor:
        """(..., 3) raw features -> (..., 3) display-space rgb in [low, high]."""
        if features.shape[-1] != self.n_features:
            raise ValueError(f"material features: found {features.shape[-1]} channels, wanted {self.n_features}")
        return features.sigmoid() * (self.high - self.low) + self.low


MATERIALS = {"albedo": AlbedoMaterial}
