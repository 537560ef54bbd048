"""Control images in the convention each ControlNet was trained with.

All are RGB in [0, 1], channels last. A ControlNet that was trained on BGR says so in its config
(`controlnet_conditioning_channel_order`), and diffusers turns the channels round: never do it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import NamedTuple

import torch
from torch import Tensor

FAR_END = 0.2  # the object's farthest pixel; above the background's 0, so that the silhouette stays visible


class NormalConvention(NamedTuple):
    """How a unit normal n becomes a colour, per channel 0.5 + 0.5 sign n, with n in camera space: x right, y up, z to the viewer."""

    signs: tuple[int, int, int]  # of x in red, y in green, z in blue: -1 where a bright channel means the other way
    background: tuple[float, float, float]  # RGB outside the object
    facts: str  # what bright red, green and blue face, and where that is known from


FLAT = (0.5, 0.5, 1.0)  # the colour of a surface that faces the viewer; the same in every convention

# The two published conventions of Stable Diffusion 1.5 agree in colours, not in strength: see `midas`.
NORMAL_CONVENTIONS: dict[str, NormalConvention] = {
    "opengl": NormalConvention(
        (1, 1, 1),
        FLAT,
        "Red faces right, green up, blue the viewer: OpenGL's normal maps, camera space. A right-handed frame, what renderers write.",
    ),
    "normalbae": NormalConvention(
        (-1, 1, 1),
        FLAT,
        "Red faces left, green up, blue the viewer, for control_v11p_sd15_normalbae: its authors say so in the README of "
        "https://github.com/lllyasviel/ControlNet-v1-1-nightly (section Normal), and the estimator's figure shows it, "
        "https://github.com/baegwangbin/surface_normal_uncertainty (figs/readme_scannet.png). The estimator knows no background; a flat "
        "one is what https://github.com/carson-katri/dream-textures (engine/annotations/normal.py) renders for this net.",
    ),
    "midas": NormalConvention(
        (-1, 1, 1),
        FLAT,
        "Red faces left, green up, blue the viewer, for sd-controlnet-normal. No source says it in words, so it is derived from "
        "https://github.com/lllyasviel/ControlNet (annotator/midas/__init__.py): with MiDaS's nearness m the colours are those of "
        "(dm/dcolumn, dm/drow, 2 pi), made unit. A surface that comes nearer towards the right faces left, one that comes nearer "
        "towards the bottom faces up. The authors' pictures of that net agree (github_page/p18.png), and so does the example of "
        "https://huggingface.co/lllyasviel/sd-controlnet-normal. Where m is below a threshold, the background, both slopes are set to 0. "
        "Not a metric normal: m has no scale, so slopes came out steeper in training than true ones look.",
    ),
}

# Kind of control image -> the buffers it is made of.
CONTROL_KINDS: dict[str, tuple[str, ...]] = {"depth": ("depth", "opacity"), "normal": ("view_normal", "opacity")}

# fusing's is the same net as lllyasviel's, at its first address; control_sd15_normal is the name of its original file.
_MIDAS_NETS = ("sd-controlnet-normal", "stable-diffusion-v1-5-controlnet-normal", "control_sd15_normal")


@torch.no_grad()
def depth_control(depth: Tensor, opacity: Tensor) -> Tensor:
    """Depth image for a depth ControlNet: MiDaS polarity, near is bright. (B, H, W, 3) in [0, 1], without a graph.

    depth    (B, H, W, 1) distance along the viewing axis, positive; values outside the object are not read
    opacity  (B, H, W, 1) in [0, 1]; a pixel is the object where it is above one half and its depth is positive

    Per view, the object's nearest pixel is 1 and its farthest 0.2, linear between; the background is 0. The range is the view's own,
    so one view does not change another. An object of a single depth is all near (1); an empty view is all background (0).
    """
    inside = (opacity > 0.5) & (depth > 0)
    near = depth.masked_fill(~inside, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
    far = depth.masked_fill(~inside, -torch.inf).amax(dim=(1, 2, 3), keepdim=True)
    extent = far - near
    nearness = torch.where(extent > 0, (far - depth) / extent, torch.ones_like(depth))
    value = torch.where(inside, FAR_END + (1 - FAR_END) * nearness, torch.zeros_like(depth))
    return value.expand(-1, -1, -1, 3).contiguous()


@torch.no_grad()
def normal_control(view_normal: Tensor, opacity: Tensor, convention: str) -> Tensor:
    """Normal image for a normal ControlNet, 0.5 + 0.5 sign n per channel. (B, H, W, 3) in [0, 1], without a graph.

    view_normal  (B, H, W, 3) camera space: x right, y up, z towards the viewer; made unit here; values outside the object are not read
    opacity      (B, H, W, 1) in [0, 1]; a pixel is the object where it is above one half and its normal is not zero
    convention   a name in NORMAL_CONVENTIONS: which way bright channels face, and the background's colour

    A pixel is the object or the background, never a blend of the two: a blend would be the colour of a normal that the object has not.

    Raises:
        ValueError: an unknown convention.
    """
    if convention not in NORMAL_CONVENTIONS:
        raise ValueError(f"normal_convention: found {convention!r}, wanted one of {', '.join(NORMAL_CONVENTIONS)}")
    chosen = NORMAL_CONVENTIONS[convention]
    length = view_normal.norm(dim=-1, keepdim=True)
    inside = (opacity > 0.5) & (length > 0) & length.isfinite()
    color = 0.5 + 0.5 * view_normal.new_tensor(chosen.signs) * view_normal / length
    return torch.where(inside, color, view_normal.new_tensor(chosen.background)).clamp(0, 1)


def make_control(kind: str, buffers: Mapping[str, Tensor | None], *, normal_convention: str = "opengl") -> Tensor:
    """Control image (B, H, W, 3) in [0, 1] of a kind in CONTROL_KINDS, without a graph.

    buffers            "depth", "opacity" (B, H, W, 1) and "view_normal" (B, H, W, 3), as `depth_control` and `normal_control` take them;
                       what the kind does not need may be missing or None
    normal_convention  a name in NORMAL_CONVENTIONS; only read for "normal"

    Raises:
        ValueError: an unknown kind or convention, or a buffer is missing.
    """
    if kind not in CONTROL_KINDS:
        raise ValueError(f"control kind: found {kind!r}, wanted one of {', '.join(CONTROL_KINDS)}")
    for name in CONTROL_KINDS[kind]:
        if buffers.get(name) is None:
            found = ", ".join(key for key, value in buffers.items() if value is not None) or "none"
            raise ValueError(f"control kind {kind!r}: found the buffers {found}, wanted {name} too")
    if kind == "depth":
        return depth_control(buffers["depth"], buffers["opacity"])
    return normal_control(buffers["view_normal"], buffers["opacity"], normal_convention)


def known_normal_convention(controlnet: str | PurePath) -> str:
    """The convention of a published normal ControlNet by its hub id or its folder's name; "opengl" where the name is not known."""
    name = _last_name(controlnet)
    if name in _MIDAS_NETS:
        return "midas"
    return "normalbae" if "normalbae" in name.replace("_", "").replace("-", "") else "opengl"


def control_kind_of(controlnet: str | PurePath) -> str | None:
    """The kind of control image that a ControlNet's hub id or its folder's name speaks of; None where it names none or several.

    A guess from the name alone, good for a default only.
    """
    named = [kind for kind in CONTROL_KINDS if kind in _last_name(controlnet)]
    return named[0] if len(named) == 1 else None


def _last_name(controlnet: str | PurePath) -> str:
    return PurePath(controlnet).name.lower()
