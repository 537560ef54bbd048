"""Priors whose network is a transformer that predicts the velocity of a straight path to noise: Stable Diffusion 3, FLUX."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from . import schedule
from .model_files import TRANSFORMER
from .prior import Conditioning, NoiseLevel, PriorError
from .vae_prior import Condition, VAEPrior


class FlowPrior(VAEPrior):
    """Flow matching (Lipman et al. 2023; Esser et al. 2024, arXiv 2403.03206): z_t = (1 - sigma) z + sigma eps, velocity eps - z.

    The T timesteps are the scheduler's training timesteps before its shift, sigma = (t + 1) / T for t = 0 ... T - 1. The shift only says
    at which of them a sampler stops. The last timestep is pure noise, alpha = 0: the predicted noise is then z_t, whatever the network
    says. A turbo checkpoint has the configuration of its teacher: only its name gives it away.

    Attribute beside those of `VAEPrior`: transformer (the network).
    """

    NETWORK, NETWORK_PART = "transformer", TRANSFORMER
    NEEDS_POOLED: ClassVar[str]  # the model's name in errors

    def __init__(self, vae, transformer, scheduler_config: Mapping, controlnets: Sequence = (), **options):
        """Takes diffusers' AutoencoderKL and the transformer as they are loaded; freezes them. `controlnets` must be empty.

        options: those of `VAEPrior`. Raises PriorError where the parts do not fit each other or are not this kind of model's.
        """
        self.transformer = transformer
        super().__init__(vae, transformer, controlnets, **options)
        scheduler = scheduler_config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if not scheduler.startswith("FlowMatch"):
            raise PriorError(f"scheduler_config.json: found class {scheduler}, wanted FlowMatchEulerDiscreteScheduler")
        self.num_train_timesteps = scheduler_config.get("num_train_timesteps", 1000)

    @property
    def time_embedding(self) -> nn.Module:
        return self.transformer.time_text_embed

    def noise_level(self, t: Tensor) -> NoiseLevel:
        """sigma = (t + 1) / T, alpha = 1 - sigma."""
        sigma = (t.to(self.device, self.arithmetic_dtype) + 1).view(-1, 1, 1, 1) / self.num_train_timesteps
        return NoiseLevel(1 - sigma, sigma)

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition, images: list[Tensor]) -> Tensor:
        velocity = self._velocity(z_t, t, condition).to(self.arithmetic_dtype)
        return schedule.noise_from_output(velocity, z_t, self.noise_level(t), "flow")

    @abstractmethod
    def _velocity(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the transformer says, (N, C, h, w), in its own precision."""

    def _check_conditioning(self, conditioning: Conditioning) -> None:
        given = conditioning
        lacks_negatives = given.negatives is not None and given.pooled_negatives is None
        if given.pooled_cond is None or given.pooled_uncond is None or lacks_negatives:
            raise ValueError(f"conditioning: {self.NEEDS_POOLED} needs the pooled embeddings of every prompt, found None")
