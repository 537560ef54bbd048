"""The prior under examination, with its prompts encoded: loaded once per process."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from threestudio_pgc.diffusion import families
from threestudio_pgc.diffusion.conditioning import direction_index, make_conditioning, view_prompts
from threestudio_pgc.diffusion.methods import METHODS
from threestudio_pgc.diffusion.model_files import (
    CONTROLNET_KEY,
    MODEL,
    MODEL_KEY,
    SCHEDULER,
    VAE,
    VAE_KEY,
    current_id,
    family_of,
    find_model,
    find_single,
    read_config,
)
from threestudio_pgc.diffusion.prior import Conditioning, PriorError
from threestudio_pgc.diffusion.prompts import encode_prompts as encode_texts
from threestudio_pgc.diffusion.vae_prior import VAEPrior
from threestudio_pgc.diffusion.zero123 import Zero123Prior

POCKET, POCKET_CONTROLNET = "builtin:pocket", "builtin:pocket-controlnet-depth"
POCKET_NEGATIVE = "blurry, low quality"  # what the bundled model's training calls its bad pictures


@dataclass(frozen=True)
class Model:
    """A prior by name: a local folder, `builtin:<name>` or a hub id. `dtype` as in `VAEPrior.from_pretrained`."""

    prior: str = POCKET
    controlnet: str | None = None
    vae: str | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def as_settings(self) -> dict:
        return asdict(self)

    def guidance_scale(self, method: str) -> float | None:
        """The method's own, None where it has none; where that is the paper's 100, the bundled model is tuned for 30."""
        own = METHODS[method].guidance_scale
        return 30.0 if own == 100 and self.prior == POCKET else own


class ArgumentError(ValueError):
    """An argument of the laboratory is wrong; the message names it, what was found and what is wanted."""


def _as_arguments(error: PriorError) -> ArgumentError:
    """The loader names configuration keys; here they are options."""
    message = str(error)
    for key, option in ((VAE_KEY, "--vae"), (CONTROLNET_KEY, "--controlnet"), (MODEL_KEY, "--prior"), ("dtype", "--dtype")):
        if message.startswith(f"{key}:"):
            message = option + message.removeprefix(key)
            break
    return ArgumentError(" ".join(message.split()))


def latent_channels(model: Model) -> int:
    """Channels of the prior's latents, from its files' headers: nothing is loaded, and a prior of which a part is missing is refused here.

    Raises:
        ArgumentError: the prior, its VAE or its ControlNet is not where the argument says, or is of a kind that cannot be used.
    """
    try:
        name = current_id(model.prior)
        family = family_of(find_model(name, MODEL_KEY, []))
        kind = families.PRIORS[family]
        if kind is Zero123Prior:
            wanted = ", ".join(key for key, value in families.PRIORS.items() if value is not kind)
            raise PriorError(f"{MODEL_KEY}: {model.prior} is a {family} model, which takes a picture, not a prompt; wanted one of {wanted}")
        if model.controlnet is not None:
            if kind.NO_CONTROLNETS is not None:
                raise PriorError(f"{CONTROLNET_KEY}: found {model.controlnet}, wanted none: {kind.NO_CONTROLNETS}")
            find_model(model.controlnet, CONTROLNET_KEY, [MODEL], pipeline=False)
        # With another VAE the prior's own may be missing.
        root = find_model(name, MODEL_KEY, [kind.NETWORK_PART, SCHEDULER] + ([VAE] if model.vae is None else []))
        vae = (root, VAE) if model.vae is None else find_single(model.vae, VAE_KEY, VAE)
        return int(read_config(*vae)["latent_channels"])
    except PriorError as error:
        raise _as_arguments(error) from error


@functools.lru_cache(maxsize=2)
def load_prior(model: Model) -> VAEPrior:
    """The prior, kept for the next unit of this process.

    Raises:
        ArgumentError: it cannot be loaded; names the argument.
    """
    try:
        # channels_last: a tenth faster on a CPU and what tensor cores want
        return families.load_prior(
            model.prior, vae=model.vae, controlnet=model.controlnet, dtype=model.dtype, device=model.device, channels_last=True
        )
    except PriorError as error:
        raise _as_arguments(error) from error


def encode_prompts(model: Model, prompts: Sequence[str], negatives: Sequence[str]) -> None:
    """Encode all at once, with all warnings said; runs find them in the prompt cache.

    Raises:
        ArgumentError: the prior has no text encoders or tokenizers where it should.
    """
    texts = [text for prompt in prompts for text in (prompt, *view_prompts(prompt))]
    try:
        encode_texts(model.prior, [*texts, *negatives, ""], device=model.device)
    except PriorError as error:
        raise _as_arguments(error) from error


class Prompts:
    """One prompt, encoded as it stands and as seen from each side."""

    def __init__(self, model: Model, prompt: str, negative: str = ""):
        self.prompt, self.negative, self.views = prompt, negative, view_prompts(prompt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `encode_prompts` has said them
            texts = list(dict.fromkeys([prompt, *self.views, negative, ""]))
            self.encoded = encode_texts(model.prior, texts, device=model.device)

    def plain(self, batch: int, device: torch.device | str = "cpu", *, separate_negative: bool = False) -> Conditioning:
        """The prompt as it stands, for pictures that have no camera. separate_negative: as the method says, see `methods.Method`."""
        return self._conditioning([self.prompt] * batch, separate_negative).to(device)

    def by_view(
        self, elevation_deg: Tensor, azimuth_deg: Tensor, device: torch.device | str = "cpu", *, separate_negative: bool = False
    ) -> Conditioning:
        """The prompt with "front view" and so on, as each camera sees the object."""
        texts = [self.views[index] for index in direction_index(elevation_deg, azimuth_deg).tolist()]
        return self._conditioning(texts, separate_negative).to(device)

    def _conditioning(self, texts: list[str], separate_negative: bool) -> Conditioning:
        if separate_negative:
            return make_conditioning(self.encoded, texts, "", [[self.negative] * len(texts)])
        return make_conditioning(self.encoded, texts, self.negative)
