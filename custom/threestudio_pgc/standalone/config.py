"""From YAML and command line to a checked configuration.

Everything that can be refused is refused here, before anything is built: an unknown key, an unknown part, a value of the wrong
type, a mandatory key (`???`) that nobody set. Each error names the full key.
"""

import dataclasses
import functools
import inspect
import os
import types
import typing
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .misc import get_rank
from .registry import RegistryError, find, nearest


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key, what was found and what is wanted."""


@dataclasses.dataclass
class ExperimentConfig:
    """Top level of a YAML file; its keys are all there are."""

    name: str = "default"
    description: str = ""
    tag: str = ""  # folder of the run: outputs/<name>/<tag>[@timestamp]
    seed: int = 0
    use_timestamp: bool = True
    timestamp: str | None = None  # set in a saved parsed.yaml, so that resuming from it goes on in the same folder
    exp_root_dir: str = "outputs"
    exp_dir: str = ""  # derived
    trial_name: str = ""  # derived
    trial_dir: str = ""  # derived
    n_gpus: int = 1  # derived
    resume: str | None = None  # checkpoint to go on from
    data_type: str = ""
    data: dict = dataclasses.field(default_factory=dict)
    system_type: str = ""
    system: dict = dataclasses.field(default_factory=dict)
    trainer: dict = dataclasses.field(default_factory=dict)  # pytorch_lightning.Trainer
    checkpoint: dict = dataclasses.field(default_factory=dict)  # pytorch_lightning ModelCheckpoint


_resolvers = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "idiv": lambda a, b: a // b,
    "basename": lambda path: os.path.basename(path),
    "rmspace": lambda text, replacement: str(text).replace(" ", replacement),
    "tuple2": lambda value: [float(value), float(value)],
    "gt0": lambda value: value > 0,
    "not": lambda value: not value,
}


def register_resolvers() -> None:
    """Make `${rmspace:...}` and the other functions of the host's YAML files known; names that exist are left alone."""
    # OmegaConf 2.4 renamed the call, warns about the old name, and asks for annotations where it is not told not to.
    if hasattr(OmegaConf, "legacy_register_resolver"):
        enter = functools.partial(OmegaConf.register_resolver, annotation_validation="off")
    else:
        enter = OmegaConf.register_new_resolver
    for name, function in _resolvers.items():
        if not OmegaConf.has_resolver(name):
            enter(name, function)


def load_config(*paths: str | os.PathLike, cli_args: Iterable[str] = (), n_gpus: int = 1) -> DictConfig:
    """Merge YAML files and `key=value` overrides, resolve `${...}`, fill the top level and derive the folders (nothing is written).

    Raises:
        ConfigError: a file or an override that cannot be read, an unknown top-level key, `???` left, an interpolation that fails.
    """
    register_resolvers()
    merged = OmegaConf.merge(*(read_yaml(path) for path in paths), _read_overrides(cli_args), {"n_gpus": n_gpus})
    known = [field.name for field in dataclasses.fields(ExperimentConfig)]
    for key in merged:
        if key not in known:
            raise ConfigError(f"{key}: no such key; {nearest(str(key), known)}")
    _require(_missing(OmegaConf.to_container(merged, resolve=False)))
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {_first_line(error)}") from error
    if merged.get("tag", "") is False or merged.get("tag", "") is True:
        raise ConfigError(f"tag: found {merged.tag}; YAML reads on/off/yes/no as true/false: put it in quotes")
    for key in [key for key, value in merged.items() if value is None]:
        del merged[key]  # `tag:` with nothing behind it leaves the default
    config = fill(ExperimentConfig, merged, "")
    if not config.tag and not config.use_timestamp:
        raise ConfigError("tag: found nothing, and use_timestamp is false; set one of them to name the run's folder")
    if config.use_timestamp and not config.timestamp:
        # Lightning starts one more process per further GPU, with this one's command: they must find this one's folder.
        inherited = os.environ.get("PGC_TIMESTAMP") if get_rank() > 0 else None
        config.timestamp = inherited or datetime.now().strftime("@%Y%m%d-%H%M%S")
        os.environ["PGC_TIMESTAMP"] = config.timestamp
    config.trial_name = config.tag + (config.timestamp if config.use_timestamp else "")
    config.exp_dir = os.path.join(config.exp_root_dir, config.name)
    config.trial_dir = os.path.join(config.exp_dir, config.trial_name)
    return config


def read_yaml(path: str | os.PathLike, key: str = "--config") -> DictConfig:
    """The file as it stands. Raises ConfigError, in which `key` is what named the file."""
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{key}: no such file: {path}") from None
    except (OSError, yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from error
    if not isinstance(config, DictConfig) or not config:
        raise ConfigError(f"{key}: {path} holds no `key: value` pairs")
    return config


def _read_overrides(arguments: Iterable[str]) -> DictConfig:
    overrides = OmegaConf.create({})
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"{argument}: not understood; overrides are written key=value, e.g. trainer.max_steps=100")
        try:
            overrides = OmegaConf.merge(overrides, OmegaConf.from_dotlist([argument]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(
                f"{argument}: the value cannot be read ({_first_line(error)}); text with special characters needs quotes of its own: "
                f"{key}='\"...\"'"
            ) from error
    return overrides


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _missing(container: Any, path: str = "") -> Iterator[str]:
    if isinstance(container, dict):
        for key, value in container.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif container == "???":
        yield path


def _require(missing: Iterable[str]) -> None:
    missing = sorted(missing)
    if missing:
        raise ConfigError("; ".join(f"{key}: must be set" for key in missing) + f" (add e.g. {missing[0]}=... to the command)")


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _nested_schema(annotation: Any) -> type | None:
    """The dataclass in `Schema` or `Schema | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next((arg for arg in typing.get_args(annotation) if dataclasses.is_dataclass(arg)), None)
    return annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None


def _check_keys(schema: type, config: DictConfig, path: str) -> None:
    known = [field.name for field in dataclasses.fields(schema)]
    for key in config:
        full = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(f"{full}: no such key; {nearest(str(key), known)}")
        nested = _nested_schema(_hints(schema)[key])
        value = None if OmegaConf.is_missing(config, key) else config[key]
        if nested and isinstance(value, DictConfig):
            _check_keys(nested, value, full)
        elif nested and value is not None:
            raise ConfigError(f"{full}: found {value!r}, wanted keys: {', '.join(_hints(nested))}")


def fill(schema: type, config: Any, path: str) -> DictConfig:
    """`config` with the defaults of the dataclass `schema`, nested dataclasses included; types are converted and checked.

    Raises:
        ConfigError: an unknown key or a value of the wrong type; named with `path` in front.
    """
    if config is None:
        config = {}
    config = config if isinstance(config, DictConfig) else OmegaConf.create(_plain(config))
    _check_keys(schema, config, path)
    try:
        return OmegaConf.merge(OmegaConf.structured(schema), config)
    except OmegaConfBaseException as error:
        full = ".".join(part for part in (path, error.full_key) if part)
        raise ConfigError(f"{full}: {_first_line(error)}") from error
    except TypeError as error:  # OmegaConf's own word for a list where a mapping stands, without the key
        wrong = [key for key, kind in _hints(schema).items() if kind is dict and isinstance(config.get(key), ListConfig)]
        full = ".".join(part for part in (path, *wrong[:1]) if part)
        raise ConfigError(f"{full}: wanted keys and values ({_first_line(error)})") from error


def _plain(config: Any) -> Any:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return config


def parse_structured(schema: type, config: Any = None) -> DictConfig:
    """Fill and check one part's `config` against its dataclass. Nested dataclass fields are filled and checked too.

    (threestudio's own does neither for nested fields: call this again on a nested block in `configure`.)
    """
    path = ""
    if isinstance(config, DictConfig) and config._get_parent() is not None:
        path = str(config._get_full_key(None) or "")
    return fill(schema, config, path)


def check_config(config: DictConfig, export: bool = False) -> None:
    """Check every part a run will build against the class that will build it, before anything is built.

    Parts are found by their `<part>_type` keys, at any depth. A class without `Config` is left to check itself when it is made.

    Raises:
        ConfigError
    """
    for part in ("data", "system"):
        _check_part(part, config[f"{part}_type"], config[part], export)
    _check_optimizer(config)
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    ours = {"logger": None, "callbacks": None, "plugins": None, "accelerator": "--gpu"}
    _check_call("trainer", pl.Trainer, config.trainer, reserved=ours)
    _check_call("checkpoint", ModelCheckpoint, config.checkpoint, reserved={})


def _check_part(path: str, name: str, config: DictConfig, export: bool) -> None:
    if not name:
        raise ConfigError(f"{path}_type: must be set")
    try:
        schema = getattr(find(name), "Config", None)
    except RegistryError as error:
        raise ConfigError(f"{path}_type: {error}") from error
    if schema is None:
        return
    filled = fill(schema, config, path)
    missing = set(OmegaConf.missing_keys(filled))
    _require(f"{path}.{key}" for key in missing)
    for key in filled:
        part = str(key).removesuffix("_type")
        if part == key or part not in filled or not isinstance(filled[part], DictConfig):
            continue
        # A default that nobody asked for need not exist here (the host's own exporter), unless it is about to be used.
        if key in config or (export and part == "exporter"):
            _check_part(f"{path}.{part}", filled[key], filled[part], export)


def _check_call(path: str, function: Any, config: DictConfig, reserved: dict[str, str | None]) -> None:
    known = [name for name in inspect.signature(function).parameters if name not in reserved]
    for key in config:
        if key in reserved:
            instead = f"use {reserved[key]}" if reserved[key] else "the launcher sets it"
            raise ConfigError(f"{path}.{key}: {instead}")
        if key not in known:
            raise ConfigError(f"{path}.{key}: no such key; {nearest(str(key), known)}")


def _check_optimizer(config: DictConfig) -> None:
    import torch

    optimizer = config.system.get("optimizer")
    if not optimizer:
        return
    known = {"name", "args", "params"}
    for key in optimizer:
        if key not in known:
            raise ConfigError(f"system.optimizer.{key}: no such key; {nearest(str(key), known)}")
    names = [name for name in dir(torch.optim) if inspect.isclass(getattr(torch.optim, name)) and name != "Optimizer"]
    if optimizer.get("name") not in names:
        raise ConfigError(f"system.optimizer.name: {optimizer.get('name')!r}; {nearest(str(optimizer.get('name')), names)}")
    function = getattr(torch.optim, optimizer.name)
    _check_call("system.optimizer.args", function, optimizer.get("args") or {}, {"params": "system.optimizer.params"})
    for part, values in (optimizer.get("params") or {}).items():
        _check_call(f"system.optimizer.params.{part}", function, values or {}, {})
