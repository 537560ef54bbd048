"""Stand-in for envlight: a bright sky over a dark ground (z is up), whatever the file shows and however rough the surface is."""

import torch


class EnvLight(torch.nn.Module):
    def __init__(self, path, device=None, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, direction, roughness=None):
        """(..., 3) unit vectors -> (..., 3) radiance."""
        return self.scale * (0.3 + 0.2 * direction[..., 2:]).expand_as(direction)
