"""Checkpoints: written whole or not at all, read without executing anything in them."""

import os
import pickle
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from .config import ConfigError
from .saving import atomic_write


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """Contents of a checkpoint: tensors and plain values only.

    Raises:
        ConfigError: no such file, or not a checkpoint of this kind.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"no such checkpoint: {path}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ConfigError(f"{path} is not a training checkpoint: it has no 'state_dict'")
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning writes through a temporary file in the system's own folder, possibly on another disk; this one writes beside the
    target and renames, so that a run killed while saving still has the checkpoint before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path, map_location)
