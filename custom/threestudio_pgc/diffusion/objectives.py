"""Distillation objectives: noise predictions to the gradient at the latents, one function each. No network, no graph.

What all of them share. The gradient is (B, C, h, w), per view: no view sees its neighbours, and nothing is divided by B. It stands
without its two Jacobians: those are the pullback's and the renderer's. `level` is the noise level of z_t, `weighting` a name of
WEIGHTINGS, `timesteps` (B,) integers. eps_y, eps and eps_n are the conditional, the unconditional and the negative prediction. The
arithmetic stays in the tensors' own precision. Unknown names are refused with ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .prior import NoiseLevel, NoisePrediction

CFG_FORMS = ("authors", "diffusers")


# ---------------------------------------------------------------------------------------------------------------- weightings


def weight_sds(level: NoiseLevel) -> Tensor:
    """w(t) = sigma_t^2, for a diffusion model 1 - abar_t (DreamFusion; the paper's setting)."""
    return level.sigma**2


def weight_uniform(level: NoiseLevel) -> Tensor:
    """w(t) = 1."""
    return torch.ones_like(level.sigma)


def weight_fantasia3d(level: NoiseLevel) -> Tensor:
    """w(t) = alpha_t sigma_t^2, for a diffusion model sqrt(abar_t) (1 - abar_t): the host's weighting of this name.

    It vanishes at both ends of the schedule. The authors' code also calls 1 / (1 - abar_t) Fantasia3D's, but no option of it selects that.
    """
    return level.alpha * level.sigma**2


WEIGHTINGS = {"sds": weight_sds, "uniform": weight_uniform, "fantasia3d": weight_fantasia3d}


def _weight(level: NoiseLevel, weighting: str) -> Tensor:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: found {weighting!r}, wanted one of {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[weighting](level)


# ------------------------------------------------------------------------------------------------------------------ guidance


def effective_scale(guidance_scale: float, form: str = "authors") -> float:
    """The scale s of eps + s (eps_y - eps) that a guidance scale in either form of `cfg_combine` amounts to."""
    _check_form(form)
    return guidance_scale + 1 if form == "authors" else guidance_scale


def cfg_combine(
    prediction: NoisePrediction,
    guidance_scale: float | Tensor,
    form: str = "authors",
    *,
    rescale: float = 0.0,
    negative_weights: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022), (B, C, h, w).

    authors:    eps_y + s (eps_y - eps), the form of the method's authors and of the host's SDS (s = 0 is the plain conditional)
    diffusers:  eps + s (eps_y - eps), so `authors` at s equals `diffusers` at s + 1

    negative_weights (N, B), together with prediction.negatives, are perpendicular negatives (Armandpour et al. 2023, arXiv 2304.04968).
    With d = eps_y - eps and d_n = eps_n - eps, the direction

        d - sum_n w_n (d_n - <d_n, d> / <d, d> d)

    stands in for eps_y - eps, so that `authors` is eps + (s + 1) direction. Inner products are per view; d = 0 has no parallel part. A
    positive weight leads away from its negative (the host writes the same with negative numbers). Without weights the negatives are not
    read.

    rescale, phi in [0, 1]: eq. 15-16 of Lin et al. 2023 (arXiv 2305.08891), here on noise predictions. phi of the result is scaled per
    view to the standard deviation that eps_y has over C, h, w. A constant result is left as it is.

    Raises ValueError for another form, a phi outside [0, 1], weights without negatives, and weights of another shape.
    """
    _check_form(form)
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale: found {rescale}, wanted a number in [0, 1]")
    base, direction = prediction.cond, prediction.cond - prediction.uncond
    if negative_weights is not None:
        away = _away_from_negatives(prediction, direction, negative_weights)
        base, direction = base - away, direction - away
    guided = (base if form == "authors" else prediction.uncond) + guidance_scale * direction
    if rescale == 0:
        return guided
    return rescale * _ratio(_spread(prediction.cond), _spread(guided)) * guided + (1 - rescale) * guided


def _check_form(form: str) -> None:
    if form not in CFG_FORMS:
        raise ValueError(f"cfg: found {form!r}, wanted one of {', '.join(CFG_FORMS)}")


def _away_from_negatives(prediction: NoisePrediction, direction: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of what each negative has perpendicular to the guidance direction, (B, C, h, w)."""
    if prediction.negatives is None:
        raise ValueError(f"negatives: found none for negative_weights of shape {tuple(weights.shape)}, wanted (N, B, C, h, w)")
    if weights.shape != prediction.negatives.shape[:2]:
        raise ValueError(f"negative_weights: found shape {tuple(weights.shape)}, wanted {tuple(prediction.negatives.shape[:2])}")
    towards = prediction.negatives - prediction.uncond
    perpendicular = towards - _ratio(_dot(towards, direction), _dot(direction, direction)) * direction
    return (weights.to(direction)[:, :, None, None, None] * perpendicular).sum(dim=0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over C, h, w, which stay as sizes 1."""
    return (a * b).sum(dim=(-3, -2, -1), keepdim=True)


def _spread(eps: Tensor) -> Tensor:
    """The standard deviation over C, h, w, but for a factor that depends on their sizes alone."""
    deviation = eps - eps.mean(dim=(1, 2, 3), keepdim=True)
    return _dot(deviation, deviation).sqrt()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 1 where the denominator is 0: every use multiplies a tensor that is then 0, or may stay as it is."""
    return torch.where(denominator == 0, 1, numerator / denominator)


def _only_negative(prediction: NoisePrediction, objective: str) -> Tensor:
    """eps_n (B, C, h, w) of an objective that has one negative."""
    count = 0 if prediction.negatives is None else len(prediction.negatives)
    if count != 1:
        raise ValueError(f"negatives: found {count}, wanted exactly one negative prompt for {objective}")
    return prediction.negatives[0]


# ---------------------------------------------------------------------------------------------------------------- objectives


def sds(
    prediction: NoisePrediction,
    noise: Tensor,
    level: NoiseLevel,
    guidance_scale: float | Tensor,
    cfg: str = "authors",
    weighting: str = "sds",
    rescale: float = 0.0,
    negative_weights: Tensor | None = None,
) -> Tensor:
    """Score Distillation Sampling: w(t) (eps_hat(z_t; y, t) - eps), eq. 2 of the paper (DreamFusion's eq. 3 for a latent model).

    noise (B, C, h, w): what was added. guidance_scale, cfg, rescale, negative_weights: see `cfg_combine`.
    """
    guided = cfg_combine(prediction, guidance_scale, cfg, rescale=rescale, negative_weights=negative_weights)
    return _weight(level, weighting) * (guided - noise)


def csd(prediction: NoisePrediction, level: NoiseLevel, weighting: str = "sds", negative_scale: float = 0.0) -> Tensor:
    """Classifier Score Distillation (Yu et al. 2023, arXiv 2310.19415): w(t) (eps_y - eps), guidance without the prior's own score.

    With negative_scale a and one negative: w(t) ((eps_y - eps) - a (eps_n - eps)). This is the paper's form with negative prompts,
    omega_1 eps_y + (omega_2 - omega_1) eps - omega_2 eps_n, at omega_1 = 1 and omega_2 = a; its authors anneal a from 1 to 0.5
    while they refine. `uncond` must then be the empty prompt's prediction.

    Raises ValueError for a negative_scale other than 0 without exactly one negative.
    """
    direction = prediction.cond - prediction.uncond
    if negative_scale != 0:
        direction = direction - negative_scale * (_only_negative(prediction, "csd with a negative_scale") - prediction.uncond)
    return _weight(level, weighting) * direction


def nfsd(
    prediction: NoisePrediction,
    level: NoiseLevel,
    timesteps: Tensor,
    guidance_scale: float = 7.5,
    weighting: str = "sds",
    boundary: int = 200,
) -> Tensor:
    """Noise-Free Score Distillation (Katzir et al. 2023, arXiv 2310.17590): w(t) (delta_D + s (eps_y - eps)).

    delta_D = eps for t < boundary, eps - eps_n from there on: the direction to the images of the prior, with the noise taken out. The
    paper's boundary is 200 of 1000, its eps_n the prediction for "unrealistic, blurry, low quality, ...".

    Raises ValueError without exactly one negative.
    """
    domain = prediction.uncond - _only_negative(prediction, "nfsd")
    domain = torch.where((timesteps < boundary).view(-1, 1, 1, 1), prediction.uncond, domain)
    return _weight(level, weighting) * (domain + guidance_scale * (prediction.cond - prediction.uncond))


def ssd(
    prediction: NoisePrediction,
    noise: Tensor,
    level: NoiseLevel,
    timesteps: Tensor,
    weighting: str = "sds",
    boundary: int = 100,
) -> Tensor:
    """Stable Score Distillation (Tang et al. 2023, arXiv 2312.09305).

    With h = eps_y - eps: w(t) h for t > boundary, below it

        w(t) ||h|| / ||e|| e,    e = eps_y - r eps_added,    r = <eps_y, eps_added> / ||eps_added||^2

    e is what eps_y has orthogonal to the added noise; e = 0 gives 0. Norms and inner products are per view. The paper's boundary M is
    100 of 1000. The method authors' code sums r over the batch and divides it by the norm only, which leaves mostly noise in e.
    """
    h = prediction.cond - prediction.uncond
    e = prediction.cond - _ratio(_dot(prediction.cond, noise), _dot(noise, noise)) * noise
    late = _ratio(_dot(h, h).sqrt(), _dot(e, e).sqrt()) * e
    return _weight(level, weighting) * torch.where((timesteps <= boundary).view(-1, 1, 1, 1), late, h)


def ism(guided: Tensor, inverted: Tensor, level: NoiseLevel, weighting: str = "sds") -> Tensor:
    """Interval Score Matching (Liang et al. 2023, LucidDreamer, arXiv 2311.11284): w(t) (eps_hat(z_t; y, t) - eps(z_s; s)), s < t.

    guided: at z_t. inverted: the unconditional prediction that took the inversion from z_s to z_t, the second value of
    `trajectories.invert`.
    """
    return _weight(level, weighting) * (guided - inverted)


def sdi(guided: Tensor, inverted_noise: Tensor, level: NoiseLevel, weighting: str = "sds") -> Tensor:
    """Score Distillation via Reparametrized DDIM (Lukoianov et al. 2024, arXiv 2405.15891): SDS with the noise that inversion found.

    w(t) (eps_hat(z_t; y, t) - kappa), where z_t = alpha z + sigma kappa was reached by DDIM inversion: `trajectories.noise_between`.
    """
    return _weight(level, weighting) * (guided - inverted_noise)


def vsd(guided: Tensor, adapted: Tensor, level: NoiseLevel, weighting: str = "sds") -> Tensor:
    """Variational Score Distillation (Wang et al. 2023, ProlificDreamer, arXiv 2305.16213): w(t) (eps_hat(z_t; y, t) - eps_phi).

    adapted: the prediction eps_phi of the adapter that learns the renders' own distribution.
    """
    return _weight(level, weighting) * (guided - adapted)


def bgt(latents: Tensor, denoised: Tensor, level: NoiseLevel, weighting: str = "uniform") -> Tensor:
    """HiFA's latent residual (Zhu & Zhuang 2023, arXiv 2305.18766): the gradient 2 w(t) (z - z_hat) of w(t) ||z - z_hat||^2.

    z_hat: z_t denoised in a few steps (`trajectories.denoise`), constant. After one step z - z_hat = sigma / alpha (eps_hat - eps), and
    the gradient is 2 sigma / alpha times that of `sds` at the same weighting. HiFA's code halves the loss of its paper; this does not.
    """
    return 2 * _weight(level, weighting) * (latents - denoised)


def bgt_image(image: Tensor, decoded: Tensor, level: NoiseLevel, weighting: str = "uniform", lambda_rgb: float = 0.1) -> Tensor:
    """The image half of HiFA's BGT+: the gradient 2 lambda_rgb w(t) (x - x_hat) of lambda_rgb w(t) ||x - x_hat||^2, (B, H, W, 3).

    image, decoded (B, H, W, 3) in [0, 1]: the render and the decoded z_hat, constant. The squares are summed, not averaged.
    """
    return 2 * lambda_rgb * _weight(level, weighting) * (image - decoded)
