"""Prompts for SDXL: encoded once, cached on disk, chosen by view."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..diffusion.prior import Conditioning
from ..diffusion.prompts import (
    PromptEmbedding,
    PromptWarning,
    direction_index,
    encode_prompts_sdxl,
    make_conditioning,
    view_prompts,
)
from ..host import BaseObject, get_device, info, register, warn


@dataclass
class SDXLPrompts:
    """The encoded prompts of a run: what the guidance calls `prompt_utils`.

    prompt: as written. prompts_vd: the same from the side, front, back and above. thresholds: degrees, see `direction_index`.
    """

    prompt: str
    prompts_vd: list[str]
    negative_prompt: str
    encoded: dict[str, PromptEmbedding]
    thresholds: dict[str, float] = field(default_factory=dict)

    def conditioning(self, elevation: Tensor, azimuth: Tensor, camera_distances: Tensor, view_dependent: bool = True) -> Conditioning:
        """Conditioning of B views. elevation, azimuth (B,) degrees; camera_distances (B,) is there for the host's way of calling."""
        texts = [self.prompt] * len(elevation)
        if view_dependent:
            texts = [self.prompts_vd[index] for index in direction_index(elevation, azimuth, **self.thresholds).tolist()]
        return make_conditioning(self.encoded, texts, self.negative_prompt)


@register("pgc-sdxl-prompt-processor")
class SDXLPromptProcessor(BaseObject):
    """Config:
    prompt: what to make.
    negative_prompt: what to avoid.
    zero_empty: true makes an empty negative prompt all zeros, false encodes the empty text, as the authors do; null does what the model's
        own pipeline would, which for SDXL is zeros.
    pretrained_model_name_or_path: where the text encoders are; the guidance's model.
    prompt_front, prompt_side, prompt_back, prompt_overhead: replace "<prompt>, front view" and so on.
    overhead_threshold, front_threshold, back_threshold: degrees; see `diffusion.prompts.direction_index`.
    cache_dir: where encoded prompts are kept; null for the default.
    """

    @dataclass
    class Config(BaseObject.Config):
        prompt: str = ""
        negative_prompt: str = ""
        zero_empty: Any = None
        pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-xl-base-1.0"
        prompt_front: Any = None
        prompt_side: Any = None
        prompt_back: Any = None
        prompt_overhead: Any = None
        overhead_threshold: float = 60.0
        front_threshold: float = 45.0
        back_threshold: float = 45.0
        cache_dir: Any = None

    cfg: Config

    def configure(self) -> None:
        prompt, negative = self.cfg.prompt, self.cfg.negative_prompt
        if not prompt.strip():
            raise ValueError("system.prompt_processor.prompt: found an empty prompt, wanted a description of the object")
        own = (self.cfg.prompt_side, self.cfg.prompt_front, self.cfg.prompt_back, self.cfg.prompt_overhead)
        views = [written or derived for written, derived in zip(own, view_prompts(prompt))]
        info(f"Prompt: {prompt!r}; negative prompt: {negative!r}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptWarning)
            encoded = encode_prompts_sdxl(
                self.cfg.pretrained_model_name_or_path,
                list(dict.fromkeys([prompt, *views, negative])),
                cache_dir=self.cfg.cache_dir,
                device=get_device(),
                zero_empty=self.cfg.zero_empty,
            )
        for warning in caught:  # through the host, so that they stand in its log and once per run
            warn(str(warning.message))
        thresholds = {view: self.cfg[f"{view}_threshold"] for view in ("front", "back", "overhead")}
        self._prompts = SDXLPrompts(prompt, views, negative, encoded, thresholds)

    def __call__(self) -> SDXLPrompts:
        return self._prompts
