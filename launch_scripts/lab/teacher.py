"""The prior under examination, with its prompts encoded: loaded once per process."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from threestudio_pgc.diffusion.prior import (
    CONTROLNET_KEY,
    MODEL,
    MODEL_KEY,
    SCHEDULER,
    UNET,
    VAE,
    VAE_KEY,
    Conditioning,
    LatentPrior,
    PriorError,
    find_model,
    find_single,
    read_config,
)
from threestudio_pgc.diffusion.prompts import direction_index, make_conditioning, view_prompts
from threestudio_pgc.diffusion.prompts import encode_prompts as encode_texts
from threestudio_pgc.diffusion.sdxl import SDXLPrior

POCKET, POCKET_CONTROLNET = "builtin:pocket", "builtin:pocket-controlnet-depth"


@dataclass(frozen=True)
class Model:
    """A prior by name: a local folder, `builtin:<name>` or a hub id. `dtype` as in `SDXLPrior.from_pretrained`."""

    prior: str = POCKET
    controlnet: str | None = None
    vae: str | None = None
    dtype: str = "auto"
    device: str = "cpu"

    def as_settings(self) -> dict:
        return asdict(self)

    @property
    def guidance_scale(self) -> float:
        """The paper's 100, and 30 for the bundled model, which it is tuned for."""
        return 30.0 if self.prior == POCKET else 100.0


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
    """Channels of the prior's latents, from its files' headers: nothing is loaded, and a prior without a VAE or U-Net is refused here.

    Raises:
        ArgumentError: the prior, its VAE or its ControlNet is not where the argument says.
    """
    try:
        # With another VAE the prior's own may be missing.
        root = find_model(model.prior, MODEL_KEY, [UNET, SCHEDULER] + ([VAE] if model.vae is None else []))
        if model.vae is not None:
            find_single(model.vae, VAE_KEY, VAE)
        if model.controlnet is not None:
            find_model(model.controlnet, CONTROLNET_KEY, [MODEL], pipeline=False)
        return int(read_config(root, UNET)["in_channels"])
    except PriorError as error:
        raise _as_arguments(error) from error


@functools.lru_cache(maxsize=2)
def load_prior(model: Model) -> LatentPrior:
    """The prior, kept for the next unit of this process.

    Raises:
        ArgumentError: it cannot be loaded; names the argument.
    """
    try:
        # channels_last: a tenth faster on a CPU and what tensor cores want
        return SDXLPrior.from_pretrained(
            model.prior, vae=model.vae, controlnet=model.controlnet, dtype=model.dtype, device=model.device, channels_last=True
        )
    except PriorError as error:
        raise _as_arguments(error) from error


def encode_prompts(model: Model, prompts: Sequence[str], negative: str) -> None:
    """Encode all at once, with all warnings said; runs find them in the prompt cache.

    Raises:
        ArgumentError: the prior has no text encoders or tokenizers where it should.
    """
    texts = [text for prompt in prompts for text in (prompt, *view_prompts(prompt))]
    try:
        encode_texts(model.prior, [*texts, negative], device=model.device)
    except PriorError as error:
        raise _as_arguments(error) from error


class Prompts:
    """One prompt, encoded as it stands and as seen from each side."""

    def __init__(self, model: Model, prompt: str, negative: str = ""):
        self.prompt, self.negative, self.views = prompt, negative, view_prompts(prompt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `encode_prompts` has said them
            texts = list(dict.fromkeys([prompt, *self.views, negative]))
            self.encoded = encode_texts(model.prior, texts, device=model.device)

    def plain(self, batch: int, device: torch.device | str = "cpu") -> Conditioning:
        """The prompt as it stands, for pictures that have no camera."""
        return make_conditioning(self.encoded, [self.prompt] * batch, self.negative).to(device)

    def by_view(self, elevation_deg: Tensor, azimuth_deg: Tensor, device: torch.device | str = "cpu") -> Conditioning:
        """The prompt with "front view" and so on, as each camera sees the object."""
        texts = [self.views[index] for index in direction_index(elevation_deg, azimuth_deg).tolist()]
        return make_conditioning(self.encoded, texts, self.negative).to(device)
