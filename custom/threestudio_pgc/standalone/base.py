"""Base classes of all parts: built from a config, told before each step which step it is."""

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from .config import ConfigError, parse_structured
from .misc import get_device


class Updateable:
    """Something that may change with the step: annealed thresholds, progressive bands, cached meshes.

    Override `update_step` (before each batch) and `update_step_end` (after). Both must be functions of their arguments alone:
    threestudio reaches a shared part on every path to it, hence more than once per step.
    """

    def do_update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Call `update_step` of all parts under this one, inner ones first, each once."""
        for part in _reachable(self):
            part.update_step(epoch, global_step, on_load_weights=on_load_weights)

    def do_update_step_end(self, epoch: int, global_step: int) -> None:
        """Call `update_step_end` of all parts under this one, inner ones first, each once."""
        for part in _reachable(self):
            part.update_step_end(epoch, global_step)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Prepare for the step; `on_load_weights` when called because weights were just loaded."""

    def update_step_end(self, epoch: int, global_step: int) -> None:
        """Tidy up after the step."""


def _reachable(root: Updateable) -> list[Updateable]:
    """Updateables reachable by public attributes, inner ones first. Names with a leading underscore are private: not followed."""
    seen: set[int] = set()
    order: list[Updateable] = []

    def visit(part: Updateable) -> None:
        if id(part) in seen:
            return
        seen.add(id(part))
        attributes = dict(vars(part))
        if isinstance(part, nn.Module):
            attributes.update(part._modules)
        for name, value in attributes.items():
            if not name.startswith("_") and isinstance(value, Updateable):
                visit(value)
        order.append(part)

    visit(root)
    return order


def update_if_possible(part: Any, epoch: int, global_step: int) -> None:
    """`do_update_step` where `part` (e.g. a data set) is an Updateable."""
    if isinstance(part, Updateable):
        part.do_update_step(epoch, global_step)


def update_end_if_possible(part: Any, epoch: int, global_step: int) -> None:
    """`do_update_step_end` where `part` (e.g. a data set) is an Updateable."""
    if isinstance(part, Updateable):
        part.do_update_step_end(epoch, global_step)


class BaseObject(Updateable):
    """A part without parameters of its own. Override `Config` and `configure`, not `__init__`."""

    @dataclass
    class Config:
        pass

    cfg: DictConfig

    def __init__(self, cfg: Any = None, *args, **kwargs) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self.device = get_device()
        self.configure(*args, **kwargs)

    def configure(self, *args, **kwargs) -> None:
        """Build what the part needs; the arguments are other parts (geometry, material, ...)."""


class BaseModule(nn.Module, Updateable):
    """A part with parameters. Override `Config` and `configure`, not `__init__`.

    Config:
        weights: `"<checkpoint>:<module>"` loads the parameters found under that name in a checkpoint, e.g.
            `"outputs/x/y/ckpts/last.ckpt:geometry"`.
    """

    @dataclass
    class Config:
        weights: str | None = None

    cfg: DictConfig

    def __init__(self, cfg: Any = None, *args, **kwargs) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self.device = get_device()
        self.configure(*args, **kwargs)
        if self.cfg.get("weights") is not None:
            path, separator, module = self.cfg.weights.rpartition(":")
            if not separator or not module:
                raise ConfigError(f"weights: found {self.cfg.weights!r}, wanted '<checkpoint>:<module>'")
            state, epoch, global_step = load_module_weights(path, module_name=module)
            self.load_state_dict(state, strict=False)
            self.do_update_step(epoch, global_step, on_load_weights=True)

    def configure(self, *args, **kwargs) -> None:
        """Build parameters and whatever else the part needs; the arguments are other parts (geometry, material, ...)."""


def load_module_weights(
    path: str, module_name: str | None = None, ignore_modules: list[str] | None = None, map_location="cpu"
) -> tuple[dict[str, torch.Tensor], int, int]:
    """Parameters from a checkpoint: those under `module_name` (prefix removed), or all but those under `ignore_modules`.

    Returns:
        state dict, epoch, global step of the checkpoint.

    Raises:
        ConfigError: no such file, not a checkpoint, or no parameters under that name.
    """
    from .checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path, map_location)
    state = checkpoint["state_dict"]
    if module_name is not None:
        prefix = f"{module_name}."
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not state:
            found = sorted({key.split(".", 1)[0] for key in checkpoint["state_dict"]})
            raise ConfigError(f"weights: {path} holds no {module_name!r}; it holds {', '.join(found)}")
    prefixes = tuple(f"{name}." for name in ignore_modules or ())
    state = {key: value for key, value in state.items() if not key.startswith(prefixes)} if prefixes else state
    return state, int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0))
