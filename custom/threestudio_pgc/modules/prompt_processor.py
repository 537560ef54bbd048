"""Prompts of any prior that takes them: encoded once, cached on disk, chosen by view."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..diffusion.conditioning import PromptEmbedding, direction_index, make_conditioning, make_perp_neg_conditioning, view_prompts
from ..diffusion.prior import Conditioning
from ..diffusion.prompts import PromptWarning, encode_prompts
from ..host import BaseObject, get_device, info, register, warn


@dataclass
class Prompts:
    """The encoded prompts of a run: what the guidance calls `prompt_utils`.

    prompt: as written. prompts_vd: the same from the side, front, back and above. encoded: these, the negative and the empty prompt.
    thresholds: degrees, see `direction_index`. use_perp_neg: see `diffusion.conditioning.perp_neg`.
    """

    prompt: str
    prompts_vd: list[str]
    negative_prompt: str
    encoded: dict[str, PromptEmbedding]
    thresholds: dict[str, float] = field(default_factory=dict)
    use_perp_neg: bool = False

    def conditioning(
        self,
        elevation: Tensor,
        azimuth: Tensor,
        camera_distances: Tensor,
        view_dependent: bool = True,
        *,
        separate_negative: bool = False,
    ) -> Conditioning:
        """Conditioning of B views. elevation, azimuth (B,) degrees; camera_distances (B,) is there for the host's way of calling.

        The unconditional half is the negative prompt. With separate_negative it is the empty prompt, and the negative prompt is the one
        entry of `Conditioning.negatives`. With use_perp_neg the negatives are the front's and the side's prompt.

        Raises ValueError where use_perp_neg meets separate_negative or prompts that do not depend on the view.
        """
        if self.use_perp_neg:
            return self._perp_neg(elevation, azimuth, view_dependent, separate_negative)
        texts = [self.prompt] * len(elevation)
        if view_dependent:
            texts = [self.prompts_vd[index] for index in direction_index(elevation, azimuth, **self.thresholds).tolist()]
        if separate_negative:
            return make_conditioning(self.encoded, texts, "", [[self.negative_prompt] * len(texts)])
        return make_conditioning(self.encoded, texts, self.negative_prompt)

    def _perp_neg(self, elevation: Tensor, azimuth: Tensor, view_dependent: bool, separate_negative: bool) -> Conditioning:
        key = "system.prompt_processor.use_perp_neg"
        if not view_dependent:
            raise ValueError(f"{key}: found true without view-dependent prompts, wanted system.guidance.view_dependent_prompting=true")
        if separate_negative:
            raise ValueError(f"{key}: found true, wanted false: this objective needs the negative prompt on its own")
        overhead = {"overhead": self.thresholds["overhead"]} if "overhead" in self.thresholds else {}
        return make_perp_neg_conditioning(self.encoded, self.prompts_vd, self.negative_prompt, elevation, azimuth, **overhead)


@register("pgc-prompt-processor")
class PromptProcessor(BaseObject):
    """Text encoders of Stable Diffusion 1 and 2, SDXL or Stable Diffusion 3, whichever the model has.

    Config:
    prompt: what to make.
    negative_prompt: what to avoid.
    zero_empty: SDXL only. true makes an empty negative prompt all zeros, false encodes the empty text, as the authors do; null does what
        the model's own pipeline would, which for SDXL is zeros. Other models always encode it.
    pretrained_model_name_or_path: where the text encoders are; the guidance's model.
    prompt_front, prompt_side, prompt_back, prompt_overhead: replace "<prompt>, front view" and so on.
    overhead_threshold, front_threshold, back_threshold: degrees; see `diffusion.conditioning.direction_index`.
    use_perp_neg: Perp-Neg: between two views their prompts are mixed, and the prediction is kept from the front's and the side's prompt
        where they are not what is seen (against several faces). Needs view-dependent prompts; front_threshold and back_threshold then
        say nothing. See `diffusion.conditioning.perp_neg`.
    dtype: of the text encoders: "auto" (fp16 on CUDA, fp32 on a CPU), "fp32", "fp16" or "bf16".
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
        use_perp_neg: bool = False
        dtype: str = "auto"
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
            encoded = encode_prompts(
                self.cfg.pretrained_model_name_or_path,
                list(dict.fromkeys([prompt, *views, negative, ""])),
                cache_dir=self.cfg.cache_dir,
                device=get_device(),
                dtype=self.cfg.dtype,
                zero_empty=self.cfg.zero_empty,
            )
        for warning in caught:  # through the host, so that they stand in its log and once per run
            warn(str(warning.message))
        thresholds = {view: self.cfg[f"{view}_threshold"] for view in ("front", "back", "overhead")}
        self._prompts = Prompts(prompt, views, negative, encoded, thresholds, self.cfg.use_perp_neg)

    def __call__(self) -> Prompts:
        return self._prompts
