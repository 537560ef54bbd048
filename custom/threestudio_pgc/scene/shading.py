"""Metallic-roughness surfaces under an environment light (split sum), and the way from radiance to the display.

Karis: "Real Shading in Unreal Engine 4", SIGGRAPH 2013 course. Fdez-Aguera: "A Multiple-Scattering Microfacet Model for Real-Time
Image-based Lighting", JCGT 8(1), 2019. The surface is glTF 2.0's, appendix B: a mixture by `metallic` of a metal and a dielectric.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .environment import EnvironmentLight

DIELECTRIC_F0 = 0.04  # reflectance at normal incidence of an index of refraction of 1.5
LEAST_N_DOT_V = 1e-4
TABLE_SIZE = (32, 64)  # nodes of roughness and of n.v over [0, 1]
TABLE_SAMPLES = (64, 16)  # of the half vector: polar, azimuthal

TONE_MAPPINGS = ("neutral", "srgb", "none")
NEUTRAL_START = 0.8 - 0.04  # peak above which "neutral" compresses
NEUTRAL_DESATURATION = 0.15


def to_linear(display: Tensor) -> Tensor:
    """Display RGB >= 0 as linear light (IEC 61966-2-1). `mesh.srgb_to_linear` is the numpy twin."""
    return torch.where(display <= 0.04045, display / 12.92, ((display.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)


def to_display(linear: Tensor) -> Tensor:
    """Linear light >= 0 as display RGB (IEC 61966-2-1). `mesh.linear_to_srgb` is the numpy twin."""
    # the clamp keeps the unused branch's gradient finite at 0
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def tone_map(radiance: Tensor, mapping: str = "neutral") -> Tensor:
    """Display RGB (..., 3) in [0, 1] of linear radiance (..., 3).

    Args:
        mapping: "neutral", the Khronos PBR Neutral tone mapper: 0.04 less, the share that a dielectric reflects, up to a peak of 0.8, so
            that under a white light of 1 a base colour is shown as it is; above, the peak is compressed and turns to white. "srgb": cut
            off at 1. "none": cut off at 1 and not encoded, for what is display RGB already.

    Raises:
        ValueError: for an unknown mapping.
    """
    if mapping not in TONE_MAPPINGS:
        raise ValueError(f"tone mapping: found {mapping!r}, wanted one of {', '.join(TONE_MAPPINGS)}")
    if mapping == "none":
        return radiance.clamp(0, 1)
    if mapping == "neutral":
        radiance = _neutral(radiance.clamp(min=0))
    return to_display(radiance.clamp(0, 1)).clamp(0, 1)


def _neutral(color: Tensor) -> Tensor:
    least = color.amin(dim=-1, keepdim=True)
    color = color - torch.where(least < 0.08, least - 6.25 * least**2, torch.full_like(least, 0.04))
    peak = color.amax(dim=-1, keepdim=True).clamp(min=NEUTRAL_START)
    room = 1 - NEUTRAL_START
    compressed = 1 - room**2 / (peak + room - NEUTRAL_START)
    white = 1 - 1 / (NEUTRAL_DESATURATION * (peak - compressed) + 1)
    # where nothing is to be compressed, peak = compressed and white = 0
    return color * (compressed / peak) * (1 - white) + compressed * white


@functools.lru_cache(maxsize=8)
def _split_sum_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 2, roughness, n.v): scale and bias at the nodes, by the midpoint rule over GGX-distributed half vectors."""
    with torch.inference_mode(False), torch.no_grad():  # kept beyond this call, for calls that have a gradient
        n_roughness, n_cosines = TABLE_SIZE
        alpha = torch.linspace(0, 1, n_roughness, dtype=torch.float64).clamp(min=1e-3)[:, None, None, None] ** 2
        nv = torch.linspace(0, 1, n_cosines, dtype=torch.float64).clamp(min=LEAST_N_DOT_V)[:, None, None]
        step, turn = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in TABLE_SAMPLES)
        left = 1 - step[:, None]
        share = 1 - left**2  # of the half vectors that are steeper; denser at the flat end, where their weight is large
        nh = ((1 - share) / (1 + (alpha**2 - 1) * share)).sqrt()
        azimuth = turn * math.pi  # the other half mirrors it
        vh = (1 - nv**2).sqrt() * (1 - nh**2).sqrt() * azimuth.cos() + nv * nh
        nl = (2 * vh * nh - nv).clamp(min=0)
        # height-correlated Smith: visibility = G / (4 n.l n.v)
        visibility = 0.5 / (nl * (nv**2 * (1 - alpha**2) + alpha**2).sqrt() + nv * (nl**2 * (1 - alpha**2) + alpha**2).sqrt())
        weight = 4 * visibility * nl * vh / nh * (2 * left)  # 0 where l is below the surface; the last factor is d share / d step
        fresnel = (1 - vh.clamp(0, 1)) ** 5
        table = torch.stack([(weight * (1 - fresnel)).mean(dim=(-1, -2)), (weight * fresnel).mean(dim=(-1, -2))])
        table = table / table.sum(dim=0).clamp(min=1)  # the rule's error takes some smooth surfaces 0.002 beyond all of the light
        return table[None].to(device, dtype)


def split_sum(n_dot_v: Tensor, roughness: Tensor) -> tuple[Tensor, Tensor]:
    """The environment BRDF of Karis 2013: F0 * scale + bias is what a rough surface reflects of a uniform light in a single bounce.

    GGX with height-correlated Smith shadowing, alpha = roughness^2, Schlick's Fresnel term; read from a table, bilinear.

    Args:
        n_dot_v: (N, 1), clamped to [0, 1]; so is roughness (N, 1).
    Returns:
        scale (N, 1) and bias (N, 1), both in [0, 1].
    """
    table = _split_sum_table(n_dot_v.device, n_dot_v.dtype)
    grid = torch.stack([n_dot_v, roughness], dim=-1) * 2 - 1  # (N, 1, 2): x is n.v
    values = F.grid_sample(table, grid[None], mode="bilinear", padding_mode="border", align_corners=True)  # (1, 2, N, 1)
    return values[0, 0], values[0, 1]


def _reflectance(f0: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Shares (N, C) reflected in one bounce, and in more (Fdez-Aguera 2019, eq. 18): together 1 for f0 = 1."""
    single = f0 * scale + bias
    missed = 1 - (scale + bias)  # by a single bounce even where f0 is 1
    mean_fresnel = f0 + (1 - f0) / 21  # cosine-weighted mean of Schlick's
    return single, single * mean_fresnel * missed / (1 - mean_fresnel * missed)


def shade(
    light: EnvironmentLight,
    base_color: Tensor,
    roughness: Tensor,
    metallic: Tensor,
    normal: Tensor,
    view: Tensor,
    occlusion: Tensor | None = None,
) -> Tensor:
    """Linear radiance (N, 3) towards the viewer, differentiable in every argument.

        L = ((1 - m) S(0.04) + m S(c)) lobe + ((1 - m) M(0.04) + m M(c) + (1 - m) c (1 - S(0.04) - M(0.04))) irradiance / pi

    with S and M the shares that a surface of that F0 reflects in one bounce and in more, c the base colour, m `metallic`, and `lobe` the
    light's `specular`. What the dielectric reflects does not reach its colour, so that a white surface returns all of the light.

    Args:
        base_color: (N, 3) linear in [0, 1].
        roughness, metallic: (N, 1) in [0, 1].
        normal: (N, 3) unit; one that faces away from the viewer is shaded as one seen edge-on.
        view: (N, 3) unit, from the surface towards the viewer.
        occlusion: (N, 1) in [0, 1], the share of the sky that is seen: multiplies all, since all of the light comes from far away.
    """
    n_dot_v = (normal * view).sum(dim=-1, keepdim=True)
    reflected = 2 * n_dot_v * normal - view
    scale, bias = split_sum(n_dot_v.clamp(min=LEAST_N_DOT_V), roughness)
    one_dielectric, more_dielectric = _reflectance(torch.full_like(scale, DIELECTRIC_F0), scale, bias)
    one_metal, more_metal = _reflectance(base_color, scale, bias)
    one = one_dielectric + (one_metal - one_dielectric) * metallic
    more = more_dielectric + (more_metal - more_dielectric) * metallic
    albedo = base_color * (1 - metallic) * (1 - one_dielectric - more_dielectric)
    radiance = one * light.specular(reflected, roughness) + (more + albedo) * light.diffuse(normal)
    return radiance if occlusion is None else radiance * occlusion
