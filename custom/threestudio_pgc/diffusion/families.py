"""Any prior by its name: the class that is made for what model_index.json says the folder holds."""

from __future__ import annotations

from pathlib import Path

from .flux import FluxPrior
from .model_files import MODEL_KEY, current_id, family_of, find_model
from .sdxl import SDXLPrior
from .stable_diffusion import StableDiffusionPrior
from .stable_diffusion_3 import StableDiffusion3Prior
from .vae_prior import VAEPrior
from .zero123 import Zero123Prior

PRIORS: dict[str, type[VAEPrior]] = {
    prior.FAMILY: prior for prior in (StableDiffusionPrior, SDXLPrior, StableDiffusion3Prior, Zero123Prior, FluxPrior)
}


def load_prior(pretrained_model_name_or_path: str | Path, **options) -> VAEPrior:
    """A prior from a local folder, `builtin:<name>` or hub id; `options` as in `VAEPrior.from_pretrained`.

    Raises PriorError for a pipeline of a family that is not here, and for anything that cannot be had.
    """
    name = current_id(pretrained_model_name_or_path)
    return PRIORS[family_of(find_model(name, MODEL_KEY, []))].from_pretrained(name, **options)
