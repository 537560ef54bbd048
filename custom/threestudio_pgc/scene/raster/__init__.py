"""Rasterisers behind one protocol: `make_rasterizer("auto")` picks nvdiffrast on CUDA where it is installed, else the CPU one."""

from __future__ import annotations

import importlib.util

import torch

from .protocol import RasterError, RasterizerBackend

__all__ = ["ANTIALIASING", "BACKENDS", "RasterError", "RasterizerBackend", "make_rasterizer"]

BACKENDS = ("auto", "cpu", "nvdiffrast")
ANTIALIASING = ("auto", "walk", "nvdiffrast")


def make_rasterizer(backend: str = "auto", device: str | torch.device = "cpu", antialias: str = "auto") -> RasterizerBackend:
    """Build a rasteriser.

    Args:
        backend: "cpu" (numba), "nvdiffrast" (CUDA), or "auto": nvdiffrast where `device` is CUDA and nvdiffrast is installed, else cpu.
        device: where the caller's tensors live. The CPU rasteriser serves CUDA tensors too, by copying them there and back.
        antialias: how silhouettes are found: "walk" (across neighbouring triangles, on the CPU with any backend; exact on fine meshes),
            "nvdiffrast" (its own rule, with its backend only), or "auto", what the backend brings.

    Raises:
        RasterError: unknown name; nvdiffrast asked for but not installed, or without a CUDA device.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise RasterError(f"rasterizer: unknown backend {backend!r}; want one of {', '.join(BACKENDS)}")
    if antialias not in ANTIALIASING:
        raise RasterError(f"antialias: found {antialias!r}, wanted one of {', '.join(ANTIALIASING)}")
    if backend == "auto":
        backend = "nvdiffrast" if device.type == "cuda" and importlib.util.find_spec("nvdiffrast") else "cpu"
    if backend == "nvdiffrast":
        from .nvdiffrast import NvdiffrastRasterizer

        return NvdiffrastRasterizer(device, walk=antialias == "walk")
    if antialias == "nvdiffrast":
        raise RasterError("antialias: found 'nvdiffrast' with the cpu backend, wanted 'auto' or 'walk', or the nvdiffrast backend")
    from .cpu import CpuRasterizer

    return CpuRasterizer()
