"""Distillation objectives: noise predictions to the gradient at the latents, one function each. No network, no graph."""

from __future__ import annotations

from torch import Tensor

from .prior import NoisePrediction

CFG_FORMS = ("authors", "diffusers")


def weight_sds(alphas_cumprod_t: Tensor) -> Tensor:
    """w(t) = sigma_t^2 = 1 - abar_t (DreamFusion; the paper's setting)."""
    return 1 - alphas_cumprod_t


def weight_uniform(alphas_cumprod_t: Tensor) -> Tensor:
    """w(t) = 1."""
    return alphas_cumprod_t.new_ones(alphas_cumprod_t.shape)


def weight_fantasia3d(alphas_cumprod_t: Tensor) -> Tensor:
    """w(t) = sqrt(abar_t) (1 - abar_t): the host's weighting of this name, vanishing at both ends of the schedule."""
    return alphas_cumprod_t.sqrt() * (1 - alphas_cumprod_t)


WEIGHTINGS = {"sds": weight_sds, "uniform": weight_uniform, "fantasia3d": weight_fantasia3d}


def cfg_combine(prediction: NoisePrediction, guidance_scale: float | Tensor, form: str = "authors") -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022), (B, C, h, w).

    authors:    eps_y + s (eps_y - eps), the form of the method's authors and of the host's SDS (s = 0 is the plain conditional)
    diffusers:  eps + s (eps_y - eps), so `authors` at s equals `diffusers` at s + 1

    Raises ValueError for another form.
    """
    difference = prediction.cond - prediction.uncond
    if form == "authors":
        return prediction.cond + guidance_scale * difference
    if form == "diffusers":
        return prediction.uncond + guidance_scale * difference
    raise ValueError(f"cfg: found {form!r}, wanted one of {', '.join(CFG_FORMS)}")


def sds(
    prediction: NoisePrediction,
    noise: Tensor,
    alphas_cumprod_t: Tensor,
    guidance_scale: float | Tensor,
    cfg: str = "authors",
    weighting: str = "sds",
) -> Tensor:
    """Score distillation sampling: the gradient at the latents, dz = w(t) (eps_hat(z_t; y, t) - eps).

    Eq. 2 of the paper (DreamFusion's eq. 3 for a latent model) without its two Jacobians: those are the pullback's and the
    renderer's. Summed over the latents, not divided by the batch size.

    prediction        (B, C, h, w) each      noise  (B, C, h, w), the noise that was added
    alphas_cumprod_t  (B, 1, 1, 1)           weighting  "sds" | "uniform" | "fantasia3d"

    Raises ValueError for an unknown weighting or form of guidance.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: found {weighting!r}, wanted one of {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[weighting](alphas_cumprod_t) * (cfg_combine(prediction, guidance_scale, cfg) - noise)
