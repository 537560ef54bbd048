"""Which process this is, which device it owns, and giving memory back."""

import gc
import os


def get_rank() -> int:
    """Rank of this process among all processes of the run: 0 when there is only one.

    Read from the environment, because Lightning and torchrun set it there before torch.distributed is up.
    """
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def get_local_rank() -> int:
    """Rank of this process on its own machine: the index of its GPU."""
    value = os.environ.get("LOCAL_RANK", "")
    return int(value) if value.isdigit() else get_rank()


def get_device():
    """`cuda:<local rank>` where CUDA is usable, else `cpu`. The launcher hides GPUs the user did not ask for."""
    import torch

    return torch.device("cuda", get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def cleanup() -> None:
    """Collect garbage and hand cached GPU memory back to the driver."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
