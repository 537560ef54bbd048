"""How a surface's maps become pictures: which channels lie in which picture, under which name, for which program."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Channel:
    """One channel of a picture: that of a map, or a constant where the asset has no such map."""

    map: str | None
    index: int = 0
    default: float = 0.0
    inverted: bool = False
    signed: bool = False  # from [-1, 1], as a normal's coordinates are


_RGB = tuple(Channel("base_color", index) for index in range(3))
_OCCLUSION, _ROUGHNESS, _METALLIC = Channel("occlusion", default=1.0), Channel("roughness", default=1.0), Channel("metallic")
_X, _Y, _Z = (Channel("normal", index, signed=True) for index in range(3))

# Contents of pictures. A picture exists where the asset has at least one of its maps.
CONTENTS = {
    "base_color": _RGB,  # display RGB (sRGB); all others are linear
    "occlusion": (_OCCLUSION,),
    "roughness": (_ROUGHNESS,),
    "metallic": (_METALLIC,),
    "orm": (_OCCLUSION, _ROUGHNESS, _METALLIC),
    # Unity HDRP: metallic, occlusion, detail mask, smoothness. Detail at full strength, so that a detail map added later shows.
    "mask": (_METALLIC, _OCCLUSION, Channel(None, default=1.0), Channel("roughness", default=1.0, inverted=True)),
    "normal": (_X, _Y, _Z),  # OpenGL: green is up
    "normal_directx": (_X, Channel("normal", 1, signed=True, inverted=True), _Z),  # green is down
}

# Pictures beside the mesh: what follows the asset's name in the file's, and the content. The names are those that the programs'
# importers (in Blender: Node Wrangler) look for.
PRESETS = {
    "gltf": {"": "base_color", "_orm": "orm", "_normal": "normal", "_roughness": "roughness", "_metallic": "metallic"},
    "unreal": {"_BaseColor": "base_color", "_ORM": "orm", "_Normal": "normal_directx"},
    "unity-hdrp": {"_BaseMap": "base_color", "_MaskMap": "mask", "_Normal": "normal"},
    "blender": {
        "_BaseColor": "base_color",
        "_Occlusion": "occlusion",
        "_Roughness": "roughness",
        "_Metallic": "metallic",
        "_Normal": "normal",
    },
}

# Contents that a Wavefront material can refer to. It knows neither packed channels nor DirectX's normals.
MTL_KEYWORDS = {"base_color": "map_Kd", "roughness": "map_Pr", "metallic": "map_Pm", "normal": "norm"}

PACK_ROWS = 256  # rows packed at once; bounds the memory


def exists(content: str, maps: Collection[str]) -> bool:
    """Whether an asset with these maps has this picture."""
    return any(channel.map in maps for channel in CONTENTS[content])


def pack(maps: dict[str, np.ndarray], content: str) -> np.ndarray:
    """A picture's pixels (R, R, channels) uint8 of the maps (R, R, C) float32 of `bake.bake`."""
    channels = CONTENTS[content]
    height, width = next(iter(maps.values())).shape[:2]
    picture = np.empty((height, width, len(channels)), np.uint8)
    for top in range(0, height, PACK_ROWS):
        rows = slice(top, top + PACK_ROWS)
        for number, channel in enumerate(channels):
            values = maps[channel.map][rows, :, channel.index] if channel.map in maps else np.float32(channel.default)
            values = values * 0.5 + 0.5 if channel.signed else values
            values = 1 - values if channel.inverted else values
            picture[rows, :, number] = np.clip(values, 0, 1) * 255 + 0.5
    return picture
