"""Which prompt each view gets: view-dependent prompts, perpendicular negatives, and the conditioning made of encoded prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .prior import Conditioning

DIRECTIONS = ("side", "front", "back", "overhead")  # the host's order


class PromptEmbedding(NamedTuple):
    """float32 on the CPU."""

    embedding: Tensor  # (L, D)
    pooled: Tensor | None = None  # (P,), None for a family without one


def view_prompts(prompt: str) -> list[str]:
    """The prompt from each side, in the order of `direction_index`: side, front, back, overhead."""
    return [f"{prompt}, {view} view" for view in DIRECTIONS]


def direction_index(
    elevation_deg: Tensor,
    azimuth_deg: Tensor,
    *,
    front: float = 45.0,
    back: float = 45.0,
    overhead: float = 60.0,
) -> Tensor:
    """Which of `view_prompts` a camera sees: (B,), (B,) degrees -> (B,) int64. Azimuth 0 (camera on +x) is the front.

    overhead above `overhead` degrees of elevation; else front within `front` degrees of azimuth 0, back within `back` degrees of
    180, side between. Thresholds are exclusive, any azimuth is wrapped.
    """
    azimuth = (azimuth_deg + 180) % 360 - 180
    index = torch.full(azimuth.shape, DIRECTIONS.index("side"), dtype=torch.int64, device=azimuth.device)
    index[azimuth.abs() < front] = DIRECTIONS.index("front")
    index[azimuth.abs() > 180 - back] = DIRECTIONS.index("back")
    index[elevation_deg > overhead] = DIRECTIONS.index("overhead")
    return index


class PerpNeg(NamedTuple):
    """What B views are drawn to, and what they are kept from.

    towards (B, 4): the share of each of DIRECTIONS' embeddings in the view's own; each row sums to 1.
    away (2, B): how strongly to stay away from the front's and from the side's prompt.
    """

    towards: Tensor
    away: Tensor


# a, b, c of f(r) = a exp(-b r) + c: the host's, such that f_fs, f_sf and f_sb vanish at r = 1.
_F_FS = _F_SF = (4.0, 0.5, -2.426)
_F_SB = (1.0, 0.5, -0.606)
_F_FSB = (1.0, 0.5, 0.967)


def perp_neg(elevation_deg: Tensor, azimuth_deg: Tensor, *, overhead: float = 60.0) -> PerpNeg:
    """The view interpolation of Perp-Neg (Armandpour et al. 2023, arXiv 2304.04968); (B,), (B,) degrees, azimuth 0 is the front.

    With f(r) = a exp(-b r) + c, front to side and, with another r, side to back:

        |azimuth| < 90:   r = 1 - |azimuth| / 90   towards r front + (1 - r) side   away f_fs(r) front, f_sf(1 - r) side
        else:             r = 2 - |azimuth| / 90   towards r side + (1 - r) back    away f_fsb(r) front, f_sb(r) side

    A view is thus kept from the front the more, the further it is from it, and from the side only near the front and the back. Above
    `overhead` degrees of elevation: towards the overhead prompt, away from nothing. The strengths are positive; the host writes them
    with the opposite sign and adds.
    """
    angle = ((azimuth_deg + 180) % 360 - 180).abs() / 90
    frontal, above = angle < 1, elevation_deg > overhead
    r, zero = torch.where(frontal, 1 - angle, 2 - angle), torch.zeros_like(angle)
    shares = {"front": torch.where(frontal, r, zero), "side": torch.where(frontal, 1 - r, r), "back": torch.where(frontal, zero, 1 - r)}
    shares = {view: torch.where(above, zero, share) for view, share in shares.items()} | {"overhead": above.to(angle)}
    front = torch.where(frontal, _decay(_F_FS, r), _decay(_F_FSB, r))
    side = torch.where(frontal, _decay(_F_SF, 1 - r), _decay(_F_SB, r))
    return PerpNeg(
        torch.stack([shares[view] for view in DIRECTIONS], dim=1),
        torch.where(above, zero, torch.stack([front, side])),
    )


def _decay(parameters: tuple[float, float, float], r: Tensor) -> Tensor:
    a, b, c = parameters
    return a * torch.exp(-b * r) + c


def make_perp_neg_conditioning(
    encoded: Mapping[str, PromptEmbedding],
    views: Sequence[str],
    uncond: str,
    elevation_deg: Tensor,
    azimuth_deg: Tensor,
    *,
    overhead: float = 60.0,
) -> Conditioning:
    """Conditioning of B views with `perp_neg`; views: the prompt from each side, in the order of `view_prompts`.

    negatives are the front's and the side's prompt, the same two for every view. Raises KeyError for a prompt that was not encoded.
    """
    towards, away = (tensor.cpu() for tensor in perp_neg(elevation_deg, azimuth_deg, overhead=overhead))
    batch = len(towards)
    negatives = [[views[DIRECTIONS.index(view)]] * batch for view in ("front", "side")]
    conditioning = make_conditioning(encoded, [uncond] * batch, uncond, negatives, away)
    embedding, pooled = _stack(encoded, views)
    return replace(
        conditioning,
        cond=torch.einsum("bv,vld->bld", towards.to(embedding), embedding),
        pooled_cond=None if pooled is None else towards.to(pooled) @ pooled,
    )


def make_conditioning(
    encoded: Mapping[str, PromptEmbedding],
    prompts: Sequence[str],
    uncond: str | Sequence[str] = "",
    negatives: Sequence[Sequence[str]] | None = None,
    negative_weights: Tensor | None = None,
) -> Conditioning:
    """Conditioning of B views from what `encode_prompts` returned.

    prompts           B, one per view
    uncond            what classifier-free guidance leaves, the negative or the empty prompt: one for all views or one each
    negatives         N times B prompts to be predicted on their own; negative_weights (N, B) or None: see `Conditioning`

    Raises KeyError for a prompt that was not encoded, ValueError where the numbers differ.
    """
    unconds = [uncond] * len(prompts) if isinstance(uncond, str) else list(uncond)
    negatives = [list(row) for row in negatives or ()]
    for row in (unconds, *negatives):
        if len(row) != len(prompts):
            raise ValueError(f"found {len(row)} negative prompts for {len(prompts)} prompts, wanted one or as many")
    if negative_weights is not None and negative_weights.shape != (len(negatives), len(prompts)):
        raise ValueError(f"negative_weights: found shape {tuple(negative_weights.shape)}, wanted ({len(negatives)}, {len(prompts)})")
    cond, pooled_cond = _stack(encoded, prompts)
    uncond, pooled_uncond = _stack(encoded, unconds)
    rows = [_stack(encoded, row) for row in negatives]
    return Conditioning(
        cond,
        uncond,
        pooled_cond,
        pooled_uncond,
        negatives=torch.stack([embedding for embedding, _ in rows]) if rows else None,
        pooled_negatives=torch.stack([pooled for _, pooled in rows]) if rows and pooled_cond is not None else None,
        negative_weights=negative_weights,
    )


def _stack(encoded: Mapping[str, PromptEmbedding], prompts: Sequence[str]) -> PromptEmbedding:
    """With a leading dimension: one entry per prompt."""
    items = [encoded[prompt] for prompt in prompts]
    pooled = [item.pooled for item in items]
    return PromptEmbedding(torch.stack([item.embedding for item in items]), None if pooled[0] is None else torch.stack(pooled))
