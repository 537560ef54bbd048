"""Materials: raw field features -> what the surface looks like."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .environment import EnvironmentLight
from .shading import shade, to_linear, tone_map


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
        _check_features(features, self.n_features)
        return features.sigmoid() * (self.high - self.low) + self.low


@dataclass(frozen=True)
class PBRRanges:
    """[low, high] of each map of a metallic-roughness material, all in [0, 1]; equal ends hold a map at that value.

    Attributes:
        base_color: display RGB, as its picture will store it.
        occlusion: share of the light that arrives, glTF's sense: 1 is open. nvdiffrec's first channel of ks is 1 minus this.
        roughness, metallic: as in glTF.
        normal: how far the shading normal may leave the surface's: its tangent can be this to either side of each axis; 0 for none.
    """

    base_color: tuple[float, float] = (0.03, 0.97)
    occlusion: tuple[float, float] = (1.0, 1.0)
    roughness: tuple[float, float] = (0.1, 0.98)
    metallic: tuple[float, float] = (0.0, 0.0)
    normal: float = 1.0

    def __post_init__(self):
        for field in fields(self)[:4]:
            low, high = getattr(self, field.name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"material {field.name}: found [{low}, {high}], wanted 0 <= low <= high <= 1")
        if self.base_color[0] == self.base_color[1]:
            raise ValueError(f"material base_color: found {list(self.base_color)}, wanted low < high")
        if not 0 <= self.normal <= 4:
            raise ValueError(f"material normal: found {self.normal}, wanted 0, for none, to 4")


# What is in use elsewhere. The authors' defaults; what most of Fantasia3D's configurations set; threestudio's pbr-material.
PBR_PRESETS = {
    "authors": PBRRanges(),
    "fantasia3d": PBRRanges(roughness=(0.08, 0.9)),
    "host": PBRRanges(base_color=(0.0, 1.0), roughness=(0.08, 0.9), metallic=(0.0, 0.9)),
}


def pbr_ranges(preset: str = "authors", **overrides) -> PBRRanges:
    """The preset of that name, with the ranges given instead of its own; None keeps.

    Raises:
        ValueError: unknown preset, or a range outside of [0, 1].
    """
    if preset not in PBR_PRESETS:
        raise ValueError(f"material ranges: found {preset!r}, wanted one of {', '.join(PBR_PRESETS)}")
    given = {name: value if name == "normal" else tuple(value) for name, value in overrides.items() if value is not None}
    return replace(PBR_PRESETS[preset], **given)


@dataclass(frozen=True)
class PBRMaterial:
    """glTF's metallic-roughness material, lit from all around.

    Features: base colour (3), occlusion, roughness, metallic, normal (3); each map is low + (high - low) * sigmoid(feature), so features
    of 0 are the middle of every range and the surface's own normal.

    The shading normal is the surface's normal n moved by the tangential part of an offset d, a vector of the object's own frame:
    normalise(n + d - (d . n) n). Unlike a tangent-space normal it needs no texture coordinates while the field is optimised, and has no
    seam and no pole anywhere; export turns it into a tangent-space map.
    """

    ranges: PBRRanges = PBR_PRESETS["authors"]
    tone_mapping: str = "neutral"

    n_features = 9

    def maps(self, features: Tensor, normal: Tensor | None = None) -> dict[str, Tensor]:
        """What a file stores of each point.

        Args:
            features: (N, 9).
            normal: (N, 3) unit normals of the surface.

        Returns:
            "base_color" (N, 3) display RGB; "roughness" (N, 1); "occlusion" and "metallic" (N, 1), unless they are held at 1 and 0, which
            is what they are without a map; and, with `normal` and where the material moves it, "normal" (N, 3), the unit shading normal
            in the same frame.
        """
        _check_features(features, self.n_features)
        share, ranges = _full(features).sigmoid(), self.ranges

        def within(values: Tensor, bounds: tuple[float, float]) -> Tensor:
            return values * (bounds[1] - bounds[0]) + bounds[0]

        maps = {"base_color": within(share[..., :3], ranges.base_color), "roughness": within(share[..., 4:5], ranges.roughness)}
        if ranges.occlusion != (1, 1):
            maps["occlusion"] = within(share[..., 3:4], ranges.occlusion)
        if ranges.metallic != (0, 0):
            maps["metallic"] = within(share[..., 5:6], ranges.metallic)
        if normal is not None and ranges.normal:
            offset = (2 * share[..., 6:] - 1) * ranges.normal
            maps["normal"] = F.normalize(normal + offset - (offset * normal).sum(-1, keepdim=True) * normal, dim=-1)
        return maps

    def __call__(self, features: Tensor, light: EnvironmentLight, normal: Tensor, view: Tensor) -> Tensor:
        """Display RGB (N, 3) in [0, 1] of the lit surface: shaded in linear light and tone-mapped once.

        Args:
            features: (N, 9).
            normal: (N, 3) unit normals of the surface on the side that is seen.
            view: (N, 3) unit, from the surface to the viewer.
        """
        maps = self.maps(features, normal)
        base, normal = to_linear(maps["base_color"]), maps.get("normal", normal)
        metallic = maps.get("metallic", torch.zeros_like(base[..., :1]))
        radiance = shade(light, base, maps["roughness"], metallic, normal, view, maps.get("occlusion"))
        return tone_map(radiance, self.tone_mapping)

    def values(self, features: Tensor) -> Tensor:
        """(N, 9) features -> (N, 9) as they enter the maps, in [0, 1]: what a regulariser of the maps compares."""
        _check_features(features, self.n_features)
        ranges = self.ranges
        width = [ranges.base_color] * 3 + [ranges.occlusion, ranges.roughness, ranges.metallic] + [(0.0, ranges.normal)] * 3
        share = _full(features).sigmoid()
        return share * torch.tensor([high - low for low, high in width], dtype=share.dtype, device=share.device)


def _full(features: Tensor) -> Tensor:
    """Half precision, which an MLP gives under autocast, has too few digits for what follows: light, and powers of it."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


def _check_features(features: Tensor, wanted: int) -> None:
    if features.shape[-1] != wanted:
        raise ValueError(f"material features: found {features.shape[-1]} channels, wanted {wanted}")
