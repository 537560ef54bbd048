"""`jit`: numba compilation with a disk cache that works on a read-only installation too."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import numba


def jit(function: Callable) -> Callable:
    """Compile a serial kernel that releases the GIL and is cached on disk.

    Serial on purpose: numba's parallel pool spins against torch's own threads and slows both. The cache lies beside the source file
    (or in NUMBA_CACHE_DIR, or in the user's cache directory); where none of these can be written, in the temporary directory.
    """
    options = {"nogil": True, "cache": True, "error_model": "numpy"}
    try:
        return numba.njit(**options)(function)
    except RuntimeError:  # numba's "no locator available": neither the package nor the home directory is writable
        user = getattr(os, "getuid", lambda: "user")()
        numba.config.CACHE_DIR = os.path.join(tempfile.gettempdir(), f"threestudio_pgc-numba-{user}")
        return numba.njit(**options)(function)
