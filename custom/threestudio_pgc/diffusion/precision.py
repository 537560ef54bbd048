"""The precision that networks run in, their attention, and the memory they take."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import nn

from .prior import PriorError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATTENTION_MODES = ("sdpa", "sliced", "xformers")


def resolve_dtype(name: str | torch.dtype, device: torch.device | str, key: str = "dtype") -> torch.dtype:
    """`auto` is fp16 on CUDA and fp32 elsewhere; `fp32`, `fp16`, `bf16` are themselves. `key` is named in errors.

    Raises PriorError for any other name, and for fp16 on a CPU.
    """
    device = torch.device(device)
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = name if isinstance(name, torch.dtype) else DTYPES.get(name)
    if dtype is None:
        raise PriorError(f"{key}: found {name!r}, wanted one of auto, {', '.join(DTYPES)}")
    if dtype == torch.float16 and device.type == "cpu":
        raise PriorError(
            f"{key}: fp16 on a CPU is refused: CPUs compute half precision by emulation, slower than fp32, and the VAE's gradients "
            "overflow. Wanted fp32, bf16 or auto, or a CUDA device"
        )
    return dtype


def resolve_vae_dtype(name: str | torch.dtype, network_dtype: torch.dtype, force_upcast: bool, device: torch.device | str) -> torch.dtype:
    """`auto`: the denoising network's precision, but fp32 where that is fp16 and the VAE overflows in it (`force_upcast`)."""
    if name != "auto":
        return resolve_dtype(name, device, key="vae_dtype")
    return torch.float32 if force_upcast and network_dtype == torch.float16 else network_dtype


def without_autocast(device: torch.device):
    """Context in which a surrounding mixed-precision trainer does not change the precision the prior was loaded in.

    Lightning's 16-mixed would otherwise run an upcast VAE in half precision again, which overflows.
    """
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode and no parameter gradients. Gradients to the input still flow."""
    return module.eval().requires_grad_(False)


def set_attention(module: nn.Module, mode: str) -> None:
    """`sdpa`: torch's fused attention (the default of diffusers); `sliced`: one head at a time, less memory; `xformers`.

    Raises PriorError for another mode, where a network cannot slice, and where xformers is asked for and missing.
    """
    if mode not in ATTENTION_MODES:
        raise PriorError(f"attention: found {mode!r}, wanted one of {', '.join(ATTENTION_MODES)}")
    if mode == "sliced":
        if not hasattr(module, "set_attention_slice"):
            raise PriorError(f"attention: found 'sliced', which {type(module).__name__} cannot do; wanted sdpa or xformers")
        module.set_attention_slice("max")
    elif mode == "xformers":
        try:
            module.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise PriorError(f"attention: xformers cannot be used here ({error}); wanted sdpa or sliced") from error


class ParameterMemory(NamedTuple):
    count: int
    bytes: int  # of parameters and buffers
    by_dtype: dict[str, int]  # parameters per precision


def parameter_memory(module: nn.Module) -> ParameterMemory:
    """Parameters of a module, counted by precision, and the bytes they and its buffers take (SD 3's position embedding is a buffer)."""
    size, by_dtype = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()), {}
    for parameter in module.parameters():
        size += parameter.numel() * parameter.element_size()
        name = str(parameter.dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + parameter.numel()
    return ParameterMemory(sum(by_dtype.values()), size, by_dtype)


def memory_note(modules: dict[str, nn.Module]) -> str:
    """One line: parameters and memory of each named module and of all together."""
    memories = {name: parameter_memory(module) for name, module in modules.items()}
    parts = [
        f"{name} {memory.count / 1e6:.1f} M ({', '.join(memory.by_dtype)}, {memory.bytes / 2**20:.0f} MiB)"
        for name, memory in memories.items()
    ]
    total = sum(memory.bytes for memory in memories.values())
    return f"frozen parameters: {'; '.join(parts)}; together {total / 2**20:.0f} MiB"
