"""Control images in the convention each ControlNet was trained with."""

from __future__ import annotations

import torch
from torch import Tensor

FAR_END = 0.2  # the object's farthest pixel; above the background's 0, so that the silhouette stays visible


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
