"""Stable Diffusion 3 and 3.5 as a frozen latent prior: a transformer that predicts the velocity of a straight path to noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from . import schedule
from .prior import TRANSFORMER, Conditioning, NoiseLevel, PriorError
from .vae_prior import Condition, VAEPrior


class StableDiffusion3Prior(VAEPrior):
    """The `LatentPrior` of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), of any size.

    A flow-matching model: z_t = (1 - sigma) z + sigma eps. The T timesteps are the scheduler's training timesteps before its shift,
    sigma = (t + 1) / T for t = 0 ... T - 1, and the network is told t + 1 = sigma T. The shift only says at which of them a sampler
    stops. The last timestep is pure noise, alpha = 0: the predicted noise is then z_t, whatever the network says.

    Attribute beside those of `VAEPrior`: transformer (the network). A turbo checkpoint has the configuration of its teacher: only its
    name gives it away.
    """

    FAMILY, WHAT = "sd3", "StableDiffusion3Pipeline"
    NETWORK, NETWORK_PART, NETWORK_CLASS = "transformer", TRANSFORMER, "SD3Transformer2DModel"
    NO_CONTROLNETS = "Stable Diffusion 3's are another class (SD3ControlNetModel), which is not supported"

    def __init__(self, vae, transformer, scheduler_config: Mapping, controlnets: Sequence = (), **options):
        """Takes diffusers' AutoencoderKL and SD3Transformer2DModel as they are loaded; freezes them. `controlnets` must be empty.

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
        velocity = self.transformer(
            z_t.to(self.dtype),
            encoder_hidden_states=condition.hidden,
            pooled_projections=condition.pooled,
            timestep=t + 1,
            return_dict=False,
        )[0]
        return schedule.noise_from_output(velocity.to(self.arithmetic_dtype), z_t, self.noise_level(t), "flow")

    def _check_conditioning(self, conditioning: Conditioning) -> None:
        given = conditioning
        lacks_negatives = given.negatives is not None and given.pooled_negatives is None
        if given.pooled_cond is None or given.pooled_uncond is None or lacks_negatives:
            raise ValueError("conditioning: Stable Diffusion 3 needs the pooled embeddings of every prompt, found None")

    def _trained_size(self) -> int:
        return self.transformer.config.sample_size * self.vae_scale

    def _check_networks(self) -> None:
        config = self.transformer.config
        taken, given = config.in_channels, self.transformer.out_channels
        if not taken == given == self.latent_channels:
            raise PriorError(
                f"the VAE has {self.latent_channels} latent channels, the transformer takes {taken} and gives {given}; "
                f"wanted {self.latent_channels} and {self.latent_channels}"
            )
        step, largest = self.vae_scale * config.patch_size, config.pos_embed_max_size
        if self.image_size % step or not 0 < self.image_size <= step * largest:
            raise PriorError(
                f"image_size: found {self.image_size}, wanted a multiple of {step} pixels of at most {step * largest}, "
                "as far as the transformer has positions"
            )
