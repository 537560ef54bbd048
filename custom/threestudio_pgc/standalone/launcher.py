"""The command line: one configuration, one of train, validate, test and export.

Heavy imports wait until the arguments are understood and the GPUs chosen: CUDA looks at CUDA_VISIBLE_DEVICES once.
"""

import argparse
import difflib
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_modes = ("train", "validate", "test", "export")


def main(argv: Sequence[str] | None = None, load_parts: Callable[[], Any] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None: those of the process.
        load_parts: called once before the configuration is checked; registers all parts.

    Returns:
        exit code: 0; 1 the run failed; 2 the command or configuration was refused; 130 Ctrl-C.
    """
    args, overrides = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        return _answer(args, overrides, load_parts)
    except KeyboardInterrupt:
        from .misc import get_rank

        if get_rank() == 0:
            print("interrupted", file=sys.stderr)
        return 130


def _answer(args: argparse.Namespace, overrides: list[str], load_parts: Callable[[], Any] | None) -> int:
    _silence_noise(args.verbose)
    n_gpus = _choose_gpus(args.gpu)

    from . import log
    from .callbacks import Interruption
    from .config import ConfigError
    from .registry import RegistryError

    log.setup(args.verbose)
    try:
        if load_parts is not None:
            load_parts()
        return _run(args, overrides, n_gpus)
    except Interruption:
        raise KeyboardInterrupt from None
    except (ConfigError, RegistryError) as error:
        return _refuse(error, 2, args.verbose)
    except Exception as error:
        if not _is_told_plainly(error):
            raise
        return _refuse(error, 1, args.verbose)


def _refuse(error: Exception, code: int, verbose: bool) -> int:
    from . import log

    log.error(str(error) or repr(error))
    if verbose:
        traceback.print_exception(error)
    return code


def _is_told_plainly(error: Exception) -> bool:
    """Whether the message says all a user needs: errors of this package's own kinds, values it refused, a full disk."""
    from .saving import no_space

    package = __package__.split(".")[0]
    if type(error).__module__.split(".")[0] == package:
        return True
    if isinstance(error, OSError):
        return error.errno in no_space
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_globals.get("__name__", "").split(".")[0] == package


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Train, look at or export one experiment.",
        epilog="key=value arguments override the configuration, e.g. trainer.max_steps=100 resume=PATH.ckpt",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="configuration of the experiment")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true", help="train, then test")
    mode.add_argument("--validate", action="store_true", help="make one validation picture")
    mode.add_argument("--test", action="store_true", help="make the turntable")
    mode.add_argument("--export", action="store_true", help="write the textured mesh")
    parser.add_argument("--gpu", metavar="N[,N...]|none", help="GPUs to use (default: the first, or the CPU where there is none)")
    parser.add_argument("--verbose", action="store_true", help="more messages, full tracebacks")
    args, rest = parser.parse_known_args(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in rest:
        if argument.startswith("-"):
            near = None if "=" in argument else difflib.get_close_matches(argument, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "overrides are written key=value"
            parser.error(f"unknown option {argument}; {hint}")
    if args.gpu is not None and not re.fullmatch(r"none|\d+(,\d+)*", args.gpu):
        parser.error(f"--gpu: found {args.gpu!r}, wanted a number, numbers with commas between, or none")
    if args.gpu not in (None, "none") and len(set(args.gpu.split(","))) != len(args.gpu.split(",")):
        parser.error(f"--gpu: {args.gpu} names a GPU twice")
    args.mode = next(name for name in _modes if getattr(args, name))
    return args, rest


def _choose_gpus(wanted: str | None) -> int:
    """Hide all GPUs but the wanted ones, so that everybody's `cuda:0` is the right one. Returns how many are used."""
    if os.environ.get("PGC_GPUS_CHOSEN") is None:  # else: a process started by Lightning for one of several GPUs
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        if wanted == "none":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif wanted is not None or visible is None or len(names or ()) > 1:
            indices = [int(index) for index in (wanted or "0").split(",")]
            if names and max(indices) < len(names):
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[index] for index in indices)
            elif visible is None:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(index) for index in indices)
    if wanted == "none":
        return 0

    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and wanted is not None:
        print(f"warning: --gpu {wanted}: no usable CUDA device here, running on the CPU (--gpu none says so)", file=sys.stderr)
    needed = len((wanted or "0").split(","))
    if 0 < count < needed:
        print(f"error: --gpu {wanted}: {needed} GPUs wanted, {count} found", file=sys.stderr)
        raise SystemExit(2)
    os.environ["PGC_GPUS_CHOSEN"] = "1"
    return min(count, needed)


def _silence_noise(verbose: bool) -> None:
    """Drop what a user of this program cannot act on: Lightning's advertisements and advice about its own use."""
    if verbose:
        return
    for message in (
        r".*does not have many workers.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*Experiment logs directory .* exists.*",
        r".*smaller than the logging interval.*",
        r".*your dataloader is not resumable.*",
        r".*was not set in the .* config.*",
        r".*LeafSpec.*",
        r".*GPU available but not used.*",
        r".*has no length.*|.*`IterableDataset` has `__len__` defined.*",
        r".*`training_step` returned `None`.*",
        r".*find_unused_parameters=True was specified.*",
        r".*dirpath has changed.*",
        r".*callbacks used to create the checkpoint need to be provided.*",
        r".*predict returned None.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _run(args: argparse.Namespace, overrides: list[str], n_gpus: int) -> int:
    import pytorch_lightning as pl

    if not args.verbose:  # not in _silence_noise: importing Lightning sets the levels
        for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)

    from . import log
    from .callbacks import StopOnInterrupt
    from .checkpoint import read_checkpoint
    from .config import ConfigError, check_config, load_config
    from .misc import get_rank
    from .registry import find

    config = load_config(args.config, cli_args=overrides, n_gpus=n_gpus)
    check_config(config, export=args.mode == "export")
    progress = None
    if config.resume is not None:
        try:
            progress = read_checkpoint(config.resume)
        except ConfigError as error:
            raise ConfigError(f"resume: {error}") from error
        progress = (int(progress["epoch"]), int(progress["global_step"]))
    elif args.mode != "train" and not _mentions_weights(config.system):
        log.warn(f"--{args.mode} without resume=CHECKPOINT: this shows an untrained model")

    trial = Path(config.trial_dir)
    last = trial / "ckpts" / "last.ckpt"
    resume_command = _command(args, trial, last)
    if args.mode == "train":
        _check_limits(config, progress)
        if config.resume is None and last.exists():
            log.warn(f"{trial} holds an earlier run, which is now overwritten; to go on with it:\n  {resume_command}")

    pl.seed_everything(config.seed, workers=True)
    data = find(config.data_type)(config.data)
    system = find(config.system_type)(config.system, resumed=config.resume is not None)
    system.set_save_dir(str(trial / "save"))
    if args.mode == "train" and get_rank() == 0:  # not earlier: a refused configuration leaves no folder behind
        _save_snapshot(trial, config, Path(args.config))

    interrupt = StopOnInterrupt(str(last))
    trainer = _make_trainer(config, args, n_gpus, trial, system, interrupt)
    try:
        with interrupt:
            if args.mode == "train":
                trainer.fit(system, datamodule=data, ckpt_path=config.resume)
                trainer.test(system, datamodule=data, verbose=False)
            else:
                if progress is not None:
                    system.set_resume_status(*progress)
                if args.mode == "validate":
                    trainer.validate(system, datamodule=data, ckpt_path=config.resume, verbose=False)
                elif args.mode == "test":
                    trainer.test(system, datamodule=data, ckpt_path=config.resume, verbose=False)
                else:
                    trainer.predict(system, datamodule=data, ckpt_path=config.resume, return_predictions=False)
    except BaseException as error:
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            lines = [line.strip() for line in str(error).splitlines()[1:3]]
            raise ConfigError(f"resume: {config.resume} does not fit this configuration: {' '.join(lines)}") from error
        if args.mode == "train" and last.exists():
            log.info(f"The last checkpoint is {last}. To resume:\n  {resume_command}")
        raise
    if args.mode == "train" and last.exists():
        log.info(f"Checkpoint: {last}")
    log.info(f"Results: {trial / 'save'}")
    return 0


def _mentions_weights(system: Any) -> bool:
    return any(
        key == "weights" and value is not None or (hasattr(value, "items") and _mentions_weights(value)) for key, value in system.items()
    )


def _check_limits(config: Any, progress: tuple[int, int] | None) -> None:
    from . import log
    from .config import ConfigError

    limit = config.trainer.get("max_steps", -1)
    if limit in (None, -1) and not config.trainer.get("max_epochs") and not config.trainer.get("max_time"):
        raise ConfigError("trainer.max_steps: must be set, or training would never end")
    if progress is not None and isinstance(limit, int) and 0 <= limit <= progress[1]:
        log.warn(f"resume: the checkpoint has done {progress[1]} steps, trainer.max_steps is {limit}: nothing left to train")


def _command(args: argparse.Namespace, trial: Path, checkpoint: Path) -> str:
    """The command that goes on with this run in the same folder."""
    words = ["python", sys.argv[0], "--config", str(trial / "configs" / "parsed.yaml"), "--train"]
    words += ["--gpu", args.gpu] if args.gpu else []
    return " ".join(shlex.quote(word) for word in [*words, f"resume={checkpoint}"])


def _save_snapshot(trial: Path, config: Any, config_path: Path) -> None:
    """What made this run: the command, the configuration as given and as parsed, and the code."""
    from omegaconf import OmegaConf

    from .saving import atomic_write

    parsed = config.copy()
    parsed.resume = None  # else the file would go back to the same checkpoint whenever it is used
    source = config_path.read_bytes()
    configs = trial / "configs"
    for path, content in (
        (trial / "cmd.txt", (shlex.join(["python", *sys.argv]) + "\n").encode()),
        (configs / "parsed.yaml", OmegaConf.to_yaml(parsed, resolve=True).encode()),
        (configs / "raw.yaml", source),
    ):
        if path.name == "raw.yaml" and config_path.resolve().parent == configs.resolve():
            continue
        with atomic_write(path) as file:
            file.write(content)
    package = Path(__file__).resolve().parents[1]
    for file in package.rglob("*.py"):
        copy = trial / "code" / package.name / file.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _make_trainer(config: Any, args: argparse.Namespace, n_gpus: int, trial: Path, system: Any, interrupt: Any) -> Any:
    import pytorch_lightning as pl
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from .callbacks import StepBar, StepSeeding
    from .checkpoint import AtomicCheckpointIO
    from .config import ConfigError

    options = {"inference_mode": False, "enable_model_summary": False, "default_root_dir": str(trial)}
    options.update(OmegaConf.to_container(config.trainer, resolve=True))
    if n_gpus and "devices" in options:
        raise ConfigError("trainer.devices: use --gpu")
    options["accelerator"] = "gpu" if n_gpus else "cpu"
    options["devices"] = options.get("devices", n_gpus or 1)
    if options["devices"] not in (1, "1") and "strategy" not in options:
        # Parts may hold parameters that a step does not touch (a background that was not seen).
        options["strategy"] = "ddp_find_unused_parameters_true"
    callbacks: list[Any] = [interrupt, StepSeeding(config.seed)]
    loggers: list[Any] = []
    if options.get("enable_progress_bar", True):
        callbacks.append(StepBar())
    try:
        if args.mode == "train":
            if options.get("enable_checkpointing", True):
                checkpoint = ModelCheckpoint(
                    **{
                        "dirpath": str(trial / "ckpts"),
                        "enable_version_counter": False,  # last.ckpt must be the last, after a resume too
                        **OmegaConf.to_container(config.checkpoint, resolve=True),
                    }
                )
                callbacks.append(checkpoint)
            callbacks.append(LearningRateMonitor(logging_interval="step"))
            loggers = [TensorBoardLogger(str(trial), name="tb_logs"), CSVLogger(str(trial), name="csv_logs")]
        else:
            options["enable_checkpointing"] = False
        return pl.Trainer(callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()], **options)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer or checkpoint: {str(error).splitlines()[0]}") from error
