"""A low-rank adapter on a prior's own network, told the camera: the second score of variational score distillation.

ProlificDreamer (Wang et al. 2023) fine-tunes a copy of the network on what the renderer makes. Here there is no copy: forward hooks add
the low-rank terms to the frozen network's attention layers while the adapter is active, and the network is untouched otherwise.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from .prior import Conditioning
from .vae_prior import Control, VAEPrior

CAMERA_NUMBERS = 16  # a flattened camera-to-world matrix
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class LowRankAdapter(nn.Module):
    """LoRA (Hu et al. 2021) on every attention projection: W x becomes W x + up(down(x)), rank r; and a camera embedding that is added
    to the timestep's. `up` and the camera embedding's last layer start at zero, so a fresh adapter changes nothing.

    Parameters are float32 (float64 on a float64 network), whatever the network's precision, and the same in every process.
    """

    def __init__(self, prior: VAEPrior, rank: int = 4, seed: int = 0):
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"lora_rank: found {rank!r}, wanted an integer of at least 1")
        layers = {
            name: layer
            for name, layer in prior.network.named_modules()
            if isinstance(layer, nn.Linear) and name.endswith(tuple(f".{projection}" for projection in _PROJECTIONS))
        }
        if not layers:
            raise ValueError(f"vsd: {type(prior.network).__name__} has no attention projections to adapt")
        width = _output_width(prior.time_embedding)
        options = {"device": prior.device, "dtype": prior.arithmetic_dtype}
        generator = torch.Generator().manual_seed(seed)

        def gaussian(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator) * std).to(**options))

        self.down = nn.ParameterList([gaussian(rank, layer.in_features, std=1 / rank) for layer in layers.values()])
        self.up = nn.ParameterList([nn.Parameter(torch.zeros(layer.out_features, rank, **options)) for layer in layers.values()])
        self.camera_in = gaussian(width, CAMERA_NUMBERS, std=CAMERA_NUMBERS**-0.5)
        self.camera_out = nn.Parameter(torch.zeros(width, width, **options))

        self._camera: Tensor | None = None
        self._is_active = False
        # Of the network only the hooks' handles are kept: its parameters must not be counted, saved or moved with the adapter's.
        self._handles = [
            layer.register_forward_hook(self._low_rank_hook(down, up)) for layer, down, up in zip(layers.values(), self.down, self.up)
        ]
        self._handles.append(prior.time_embedding.register_forward_hook(self._camera_hook))

    def remove(self) -> None:
        """Take the adapter off the network for good."""
        for handle in self._handles:
            handle.remove()

    def _low_rank_hook(self, down: Tensor, up: Tensor):
        def hook(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if not self._is_active:
                return None
            return output + F.linear(F.linear(inputs[0].to(down.dtype), down), up).to(output.dtype)

        return hook

    def _camera_hook(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if not self._is_active or self._camera is None:
            return None
        embedded = F.linear(F.silu(F.linear(self._camera.to(self.camera_in.dtype), self.camera_in)), self.camera_out)
        return output + embedded.to(output.dtype)

    @contextlib.contextmanager
    def active(self, camera: Tensor | None = None) -> Iterator[None]:
        """Within, the network predicts the score of what was rendered. camera (B, 16), one row per view that is asked, or None."""
        self._is_active, self._camera = True, camera
        try:
            yield
        finally:
            self._is_active, self._camera = False, None


class AdapterTraining:
    """The adapter's own optimiser: one step per distillation step, on the same views.

    The loss is ProlificDreamer's, E ||eps_adapter(z_t; y, t, camera) - eps||^2 with t uniform over the whole schedule; the mean over the
    latents. The camera is dropped for a tenth of the views, so that the adapter also knows the unconditional score.
    """

    CAMERA_DROPPED = 0.1

    def __init__(self, prior: VAEPrior, *, rank: int = 4, learning_rate: float = 1e-4, seed: int = 0, checkpointing: bool = False):
        """checkpointing: recompute the network's activations in the backward pass; nothing else ever keeps them."""
        self.prior = prior
        if checkpointing:
            prior.network.enable_gradient_checkpointing()
        self.adapter = LowRankAdapter(prior, rank, seed)
        self.optimizer = torch.optim.Adam(self.adapter.parameters(), lr=learning_rate)

    @torch.no_grad()
    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, control: Control, camera: Tensor | None) -> Tensor:
        """The adapter's noise prediction for the prompt, (B, C, h, w)."""
        with self.adapter.active(camera):
            return self.prior.predict_conditional(z_t, t, conditioning, control)

    def step(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        control: Control,
        camera: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> float:
        """One optimiser step; returns the loss before it. latents (B, C, h, w), camera (B, 16) or None; draws t, noise, dropped cameras."""
        batch, source = len(latents), generator.device if generator is not None else "cpu"
        t = torch.randint(0, self.prior.num_train_timesteps, (batch,), generator=generator, device=source).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator, device=source).to(latents)
        kept = torch.rand(batch, 1, generator=generator, device=source).to(latents.device) >= self.CAMERA_DROPPED
        z_t = self.prior.noise_level(t).add_noise(latents, noise)
        parameters = list(self.adapter.parameters())
        with torch.enable_grad(), self.adapter.active(None if camera is None else camera * kept):
            predicted = self.prior.predict_conditional(z_t, t, conditioning, control)
            residual = (predicted - noise).detach()
            # As in the pullback: the backward pass is linear in what it is given. At the loss's own scale (1 / number of latents) half
            # precision would lose it; so it is given the residual scaled to 1, and the gradients are scaled back in float32.
            scale = residual.abs().max().clamp_min(torch.finfo(residual.dtype).tiny)
            # Inside, because with checkpointing the forward pass runs again here.
            gradients = torch.autograd.grad(predicted, parameters, residual / scale, allow_unused=True)
        loss = float(residual.square().mean())
        factor = 2 * scale / residual.numel()
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient * factor
        self._average_over_processes(parameters)
        # After the average, so that every process skips or none does.
        if all(bool(torch.isfinite(parameter.grad).all()) for parameter in parameters):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    @staticmethod
    def _average_over_processes(parameters: list[nn.Parameter]) -> None:
        """Each process saw other views; all must make the same step, or their adapters drift apart."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
            parameter.grad = part.view_as(parameter)

    def state_dict(self) -> dict[str, Any]:
        return {"adapter": self.adapter.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on working in the given tensors


def _output_width(module: nn.Module) -> int:
    """Width of what a timestep embedding puts out: that of its last linear layer."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1].out_features
