"""The system: the parts together, as a LightningModule."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import nn

from .base import Updateable, load_module_weights, update_end_if_possible, update_if_possible
from .config import ConfigError, parse_structured, read_yaml
from .log import debug, info
from .misc import cleanup, get_device
from .parts import BaseGeometry
from .registry import RegistryError, find, nearest
from .saving import SaverMixin
from .schedules import C


def parse_optimizer(config: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of the block `{name, args, params}`.

    Args:
        config: `name`, a class of torch.optim; `args`, its arguments; `params`, one parameter group per module
            (`geometry.encoding: {lr: 0.01}`; null leaves a group out). Without `params` all parameters of `model` are optimised, else
            those listed only.

    Raises:
        ConfigError: no such optimiser, no such module, a module without parameters, or an argument that is refused.
    """
    name = config.get("name", "")
    optimizer = getattr(torch.optim, name, None)
    if not isinstance(optimizer, type):
        raise ConfigError(f"system.optimizer.name: torch.optim has no {name!r}")
    args = _container(config.get("args"))
    groups: Any = list(model.parameters())
    if config.get("params"):
        groups = []
        for path, values in config["params"].items():
            if values is None:  # an override can name a group away, but not take its key out
                continue
            parameters = _parameters(model, path)
            groups.append({"params": parameters, "name": path, **_container(values)})
    if not groups:
        raise ConfigError("system.optimizer: the system has no parameters to optimise")
    try:
        return optimizer(groups, **args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"system.optimizer: {name}({', '.join(args)}): {error}") from error


def _container(config: Any) -> dict[str, Any]:
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    return dict(config or {})


def _parameters(model: nn.Module, path: str) -> list[nn.Parameter]:
    target: Any = model
    for name in path.split("."):
        target = getattr(target, name, None)
    if isinstance(target, nn.Parameter):
        return [target]
    parameters = list(target.parameters()) if isinstance(target, nn.Module) else []
    if not parameters:
        known = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
        known += [name for name, _ in model.named_parameters()]
        raise ConfigError(f"system.optimizer.params.{path}: no module with parameters there; {nearest(path, known)}")
    return parameters


def parse_scheduler(config: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A learning rate schedule `{name, args, interval, monitor}` for Lightning; `interval` is "epoch" (default) or "step".

    `SequentialLR` (with `milestones`) and `ChainedScheduler` take `schedulers`, a list of such blocks.
    """
    from torch.optim import lr_scheduler

    def build(block: Any) -> Any:
        scheduler = getattr(lr_scheduler, block.get("name", ""), None)
        if not isinstance(scheduler, type):
            raise ConfigError(f"system.scheduler.name: torch.optim.lr_scheduler has no {block.get('name')!r}")
        parts = [build(part) for part in block.get("schedulers") or ()]
        if block.name == "SequentialLR":
            return scheduler(optimizer, parts, milestones=list(block.milestones))
        if block.name == "ChainedScheduler":
            return scheduler(parts)
        return scheduler(optimizer, **_container(block.get("args")))

    interval = config.get("interval", "epoch")
    if interval not in ("epoch", "step"):
        raise ConfigError(f"system.scheduler.interval: found {interval!r}, wanted 'epoch' or 'step'")
    result = {"scheduler": build(config), "interval": interval}
    if config.get("monitor"):
        result["monitor"] = config.monitor
    return result


class BaseSystem(pl.LightningModule, Updateable, SaverMixin):
    """Common to all systems: config, optimiser, steps told to the parts, the step count of a loaded checkpoint."""

    @dataclass
    class Config:
        loggers: dict = field(default_factory=dict)
        loss: dict = field(default_factory=dict)  # lambda_<name>: weight, a number or a schedule
        optimizer: dict = field(default_factory=dict)
        scheduler: dict | None = None
        weights: str | None = None  # checkpoint to start from (parameters only)
        weights_ignore_modules: list[str] | None = None
        cleanup_after_validation_step: bool = False
        cleanup_after_test_step: bool = False

    cfg: DictConfig

    def __init__(self, cfg: Any, resumed: bool = False) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self._resumed = resumed
        self._evaluated: tuple[int, int] | None = None
        self.configure()
        if self.cfg.weights is not None:
            self.load_weights(self.cfg.weights, self.cfg.weights_ignore_modules)
        self.post_configure()

    def configure(self) -> None:
        """Build the parts."""

    def post_configure(self) -> None:
        """Called when weights are loaded."""

    def load_weights(self, weights: str, ignore_modules: list[str] | None = None) -> None:
        state, epoch, global_step = load_module_weights(weights, ignore_modules=ignore_modules)
        self.load_state_dict(state, strict=False)
        self.do_update_step(epoch, global_step, on_load_weights=True)

    def set_resume_status(self, current_epoch: int, global_step: int) -> None:
        """Where a checkpoint stands that is evaluated and not trained on: Lightning itself counts from 0 there."""
        self._evaluated = (current_epoch, global_step)
        self.do_update_step(current_epoch, global_step, on_load_weights=True)

    @property
    def resumed(self) -> bool:
        return self._resumed

    @property
    def true_global_step(self) -> int:
        """Optimiser steps behind the parameters, also when a checkpoint is only evaluated."""
        return self._evaluated[1] if self._evaluated else self.global_step

    @property
    def true_current_epoch(self) -> int:
        return self._evaluated[0] if self._evaluated else self.current_epoch

    def C(self, value: Any) -> float:
        """A scheduled number now; see `schedules.C`."""
        return C(value, self.true_current_epoch, self.true_global_step)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = parse_optimizer(self.cfg.optimizer, self)
        result: dict[str, Any] = {"optimizer": optimizer}
        if self.cfg.scheduler is not None:
            result["lr_scheduler"] = parse_scheduler(self.cfg.scheduler, optimizer)
        return result

    def preprocess_data(self, batch: Any, stage: str) -> None:
        """Change a batch in place; `stage` is train, validation, test or predict."""

    def _loader_dataset(self, stage: str) -> Any:
        loader = getattr(self.trainer, {"train": "train_dataloader"}.get(stage, f"{_plural(stage)}_dataloaders"), None)
        if isinstance(loader, (list, tuple)):
            loader = loader[0] if loader else None
        return getattr(loader, "dataset", None)

    def _batch_start(self, batch: Any, stage: str) -> None:
        self.preprocess_data(batch, stage)
        now = (self.true_current_epoch, self.true_global_step)
        update_if_possible(self._loader_dataset(stage), *now)
        self.do_update_step(*now)

    def _batch_end(self, stage: str) -> None:
        now = (self.true_current_epoch, self.true_global_step)
        update_end_if_possible(self._loader_dataset(stage), *now)
        self.do_update_step_end(*now)

    def on_train_batch_start(self, batch, batch_idx, unused=0):
        self._batch_start(batch, "train")

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self._batch_start(batch, "validation")

    def on_test_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self._batch_start(batch, "test")

    def on_predict_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self._batch_start(batch, "predict")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._batch_end("train")

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self._batch_end("validation")
        if self.cfg.cleanup_after_validation_step:
            cleanup()

    def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self._batch_end("test")
        if self.cfg.cleanup_after_test_step:
            cleanup()

    def on_predict_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self._batch_end("predict")

    def training_step(self, batch, batch_idx):
        raise NotImplementedError

    def validation_step(self, batch, batch_idx):
        raise NotImplementedError

    def on_validation_epoch_end(self):
        """Called after the validation pictures."""

    def test_step(self, batch, batch_idx):
        raise NotImplementedError

    def on_test_epoch_end(self):
        """Called after the test pictures, e.g. to make the turntable."""

    def predict_step(self, batch, batch_idx):
        raise NotImplementedError


def _plural(stage: str) -> str:
    return {"validation": "val"}.get(stage, stage)


class BaseLift3DSystem(BaseSystem):
    """A 3D representation trained through its renderings by a 2D guidance.

    `configure` builds geometry, material, background and renderer. Guidance and prompt processor are built by the subclass in
    `on_fit_start`, so that testing and exporting need no diffusion model.
    """

    @dataclass
    class Config(BaseSystem.Config):
        geometry_type: str = MISSING
        geometry: dict = field(default_factory=dict)
        geometry_convert_from: str | None = None
        geometry_convert_inherit_texture: bool = False
        geometry_convert_override: dict = field(default_factory=dict)
        material_type: str = MISSING
        material: dict = field(default_factory=dict)
        background_type: str = MISSING
        background: dict = field(default_factory=dict)
        renderer_type: str = MISSING
        renderer: dict = field(default_factory=dict)
        guidance_type: str = MISSING
        guidance: dict = field(default_factory=dict)
        prompt_processor_type: str = MISSING
        prompt_processor: dict = field(default_factory=dict)
        exporter_type: str = "mesh-exporter"
        exporter: dict = field(default_factory=dict)

    def configure(self) -> None:
        if self.cfg.geometry_convert_from and not self.cfg.weights and not self.resumed:
            try:
                self.geometry = self._converted_geometry(Path(self.cfg.geometry_convert_from))
            except (ValueError, RegistryError) as error:
                raise ConfigError(f"system.geometry_convert_from: {error}") from error
        else:
            self.geometry = find(self.cfg.geometry_type)(self.cfg.geometry)
        self.material = find(self.cfg.material_type)(self.cfg.material)
        self.background = find(self.cfg.background_type)(self.cfg.background)
        self.renderer = find(self.cfg.renderer_type)(
            self.cfg.renderer, geometry=self.geometry, material=self.material, background=self.background
        )

    def _converted_geometry(self, path: Path) -> BaseGeometry:
        """This stage's geometry, made by its class from that of a checkpoint.

        What the checkpoint's geometry is stands in the run's configuration, `../configs/parsed.yaml` seen from the checkpoint, and is
        changed by `geometry_convert_override`.

        Raises:
            ValueError, RegistryError: a file is missing or cannot be read, or the two geometries do not go together.
        """
        state, epoch, global_step = load_module_weights(path, module_name="geometry")
        parsed = path.parent.parent / "configs" / "parsed.yaml"
        if not parsed.is_file():
            raise ConfigError(f"found no {parsed}, wanted the checkpoint in the folder of its run, beside the run's configuration")
        system = read_yaml(parsed, "earlier stage").get("system") or {}
        name = system.get("geometry_type") or ""
        try:
            previous = find(name)(OmegaConf.merge(system.get("geometry") or {}, self.cfg.geometry_convert_override))
            previous.load_state_dict(state, strict=False)
        except (ValueError, RegistryError) as error:
            raise ConfigError(f"{parsed}: {error} (system.geometry_convert_override changes its system.geometry)") from error
        except RuntimeError as error:  # torch's word for parameters of another shape
            raise ConfigError(f"{path} does not fit {parsed}: {' '.join(str(error).split())}") from error
        previous.do_update_step(epoch, global_step, on_load_weights=True)
        info(f"Geometry: taken over from {path}, a {name} after {global_step} steps")
        inherit = self.cfg.geometry_convert_inherit_texture
        return find(self.cfg.geometry_type).create_from(previous.to(get_device()), self.cfg.geometry, copy_net=inherit)

    def on_fit_start(self) -> None:
        info(f"Pictures made while training are saved to {self.get_save_dir()}")

    def on_test_end(self) -> None:
        info(f"Test results are saved to {self.get_save_dir()}")

    def on_predict_start(self) -> None:
        self.exporter = find(self.cfg.exporter_type)(
            self.cfg.exporter, geometry=self.geometry, material=self.material, background=self.background
        )

    def predict_step(self, batch, batch_idx):
        if self.exporter.cfg.save_video:
            self.test_step(batch, batch_idx)

    def on_predict_epoch_end(self) -> None:
        if self.exporter.cfg.save_video:
            self.on_test_epoch_end()
        folder = f"it{self.true_global_step}-export"
        for output in self.exporter():
            save = getattr(self, f"save_{output.save_type}", None)
            if save is None:
                raise ValueError(f"{type(self.exporter).__name__}: there is no way to save {output.save_type!r}")
            debug(f"exporting {output.save_name}")
            save(f"{folder}/{output.save_name}", **output.params)
        info(f"The export is saved to {self.get_save_dir()}/{folder}")
