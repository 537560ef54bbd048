"""Any guidance of the host, with its image gradient regulated pixel by pixel."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..host import BaseModule, find, info, parse_structured, register
from ..pixelgrad import PGCConfig, surrogate_loss
from .regulation import Regulation


@register("pgc-wrapped-guidance")
class WrappedGuidance(BaseModule):
    """PGC around a guidance that knows nothing of it, such as threestudio's stable-diffusion-guidance or zero123-guidance.

    The inner guidance sees the image as a leaf without a history, so its backward pass ends there: the gradient of each of its losses
    is regulated and handed to the renderer through `surrogate_loss`. It keeps its own randomness, schedules and further outputs.

    A module, because the inner guidance may be one: its parameters are found at `guidance.inner`, by the optimiser as in the checkpoint.

    Config:
        inner_type, inner: the guidance and its own settings, as `system.guidance_type` and `system.guidance` would hold them.
        inner_divides_by_batch: the inner losses are averages over the views, as threestudio's are; false if they are sums. Either way the
            threshold means one view's own gradient, and what reaches the renderer is the average over the views.
        pgc: see `pixelgrad.PGCConfig`; `enabled: false` hands every call to the inner guidance as it is. The pullback is the inner
            guidance's own, so the settings of ours stay at their defaults.
    """

    @dataclass
    class Config(BaseModule.Config):
        inner_type: str = "???"  # OmegaConf's mark of a key that must be set
        inner: dict = field(default_factory=dict)
        inner_divides_by_batch: bool = True
        pgc: PGCConfig = field(default_factory=PGCConfig)

    cfg: Config

    def configure(self, sharing: "WrappedGuidance | None" = None, stream: str = "") -> None:
        """`sharing`: a guidance of the same kind, whose inner one is used if it has the same settings. `stream` is of no use here: the
        inner guidance draws its own random numbers."""
        self._regulation = Regulation(self.cfg.pgc)
        self.pgc = self._regulation.config
        for key, default in (("pullback", "vae"), ("views_per_pullback", "auto")):
            if self.pgc[key] != default:
                raise ValueError(
                    f"system.guidance.pgc.{key}: found {self.pgc[key]!r}, wanted {default!r}: the inner guidance does its own backward pass"
                )
        inner_type = self.cfg.get("inner_type")  # get: reading a key that is not set raises otherwise
        if not inner_type:
            raise ValueError("system.guidance.inner_type: found nothing, wanted the name of the guidance to wrap")
        inner_class = find(inner_type)
        _refuse_second_rule(inner_type, inner_class, self.cfg.inner)
        same = sharing is not None and (sharing.cfg.inner_type, sharing.cfg.inner) == (inner_type, self.cfg.inner)
        if not same:
            info(f"Wrapping {inner_type} ...")
        # Public, so that the host's walk over the parts tells it the step; telling it here as well would be once too often.
        self.inner = sharing.inner if same else inner_class(self.cfg.inner)
        self._step, self._epoch = 0, 0

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._epoch, self._step = epoch, global_step

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint of the run must hold beside the parameters: an adaptive threshold, and the inner guidance's under "inner"."""
        inner = getattr(self.inner, "run_state", dict)()
        return self._regulation.run_state() | ({"inner": inner} if inner else {})

    def load_run_state(self, state: dict[str, Any]) -> None:
        self._regulation.load_run_state(state)
        if "inner" in state and hasattr(self.inner, "load_run_state"):
            self.inner.load_run_state(state["inner"])

    def last_norms(self) -> Tensor | None:
        """(L B, H, W) norms of the last step's raw image gradient, the L losses one after the other; None before the first step."""
        return self._regulation.last_norms()

    def forward(self, rgb: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inner guidance's outputs, with the image gradient of its losses regulated.

        Args:
            rgb: (B, H, W, 3) rendered views, or (B, H, W, C) of whatever the inner guidance takes as its first argument.
            args, kwargs: the inner guidance's further arguments, handed on as they are.

        Returns:
            All that the inner guidance returned. Of these, each "loss_*" that depends on the image has become a scalar whose gradient at
            `rgb` is the regulated per-view gradient divided by B; other losses are the inner guidance's own. With them, where the inner
            guidance does not say the same, the numbers of `Regulation.account` over the gradients of all these losses.

        Raises:
            RuntimeError: no loss depends on the image.
        """
        if not self.pgc.enabled:
            return self.inner(rgb, *args, **kwargs)
        image = rgb.detach().requires_grad_()
        with torch.enable_grad():
            out = self.inner(image, *args, **kwargs)
        losses = {key: value for key, value in out.items() if key.startswith("loss_") and isinstance(value, Tensor)}
        reached = {key: _backward_leaves(loss) for key, loss in losses.items()}
        names = [key for key, leaves in reached.items() if any(leaf is image for leaf in leaves)]
        if not names:
            raise RuntimeError(
                f"system.guidance.inner_type: found {self.cfg.inner_type!r}, whose losses ({', '.join(losses) or 'none'}) "
                "do not depend on the image, wanted one that returns a loss_* with a gradient there"
            )
        # Losses that train something besides the image: the inner guidance's own parameters, or what an argument was rendered from. The
        # surrogate knows the image only, so the loss itself is added for their sake. The image it saw is a leaf: its backward pass ends
        # there, unregulated gradient and all, and never gets to the renderer. Only then is the inner graph worth its memory.
        trains = [key for key in names if len(reached[key]) > 1]
        raw = []
        for key in names:
            (gradient,) = torch.autograd.grad(losses[key], image, retain_graph=bool(trains) or key != names[-1])
            raw.append(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
        # One tensor of all losses: they share the threshold, and an adaptive one must be asked once a step.
        raw = torch.cat(raw) * (len(rgb) if self.cfg.inner_divides_by_batch else 1)
        threshold = self._regulation.threshold(self._epoch, self._step)
        threshold = threshold(raw) if callable(threshold) else threshold
        regulated = self._regulation.rule(raw, threshold, norm=self.pgc.norm)
        for key, gradient in zip(names, regulated.chunk(len(names))):
            loss = surrogate_loss(rgb, gradient) / len(rgb)
            losses[key] = loss + losses[key] if key in trains else loss
        return self._regulation.account(raw, threshold, self._step) | out | losses


def _refuse_second_rule(inner_type: str, inner_class: type, config: Any) -> None:
    """ValueError if the inner guidance would regulate its gradient too: clipped twice, c would be the threshold of neither."""
    if issubclass(inner_class, WrappedGuidance):
        raise ValueError(f"system.guidance.inner_type: found {inner_type!r}, wanted a guidance that is not wrapped already")
    schema = getattr(inner_class, "Config", None)
    if schema is None:
        return
    own = parse_structured(schema, config)
    if "pgc" in own and parse_structured(PGCConfig, own.pgc).enabled:
        raise ValueError(
            f"system.guidance.inner.pgc.enabled: found True, wanted False: {inner_type} would apply a rule of its own before this one"
        )


def _backward_leaves(loss: Tensor) -> list[Tensor]:
    """The tensors whose `grad` a backward pass from `loss` would add to, each once."""
    leaves, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return leaves
