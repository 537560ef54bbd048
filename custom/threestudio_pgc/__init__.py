"""Pixel-wise Gradient Clipping for high-resolution text-to-3D: an extension of threestudio that also runs on its own.

Loaded by threestudio's launcher, importing this package registers its parts with the host: all of them or none. Imported by anything else
(the standalone launcher, a test, a notebook), it registers nothing and costs nothing: the standalone launcher imports
`threestudio_pgc.modules` itself.
"""

import importlib
import os
import re
import sys

__version__ = "0.1.0"

OLDEST_HOST, OLDEST_PYTHON = (0, 2, 0), (3, 10)

# Every name that `modules/` registers. Written out, so that a clash is found before the first of them is registered.
PARTS = (
    "pgc-albedo-material",
    "pgc-background",
    "pgc-dmtet",
    "pgc-fantasia3d-system",
    "pgc-flux-guidance",
    "pgc-mesh-exporter",
    "pgc-mesh-rasterizer",
    "pgc-pbr-material",
    "pgc-prompt-processor",
    "pgc-random-camera-datamodule",
    "pgc-sd3-guidance",
    "pgc-sdxl-guidance",
    "pgc-single-image-datamodule",
    "pgc-stable-diffusion-guidance",
    "pgc-textured-mesh",
    "pgc-wrapped-guidance",
    "pgc-zero123-guidance",
)


def _register(host):
    """Register every part with threestudio, or none and say why: the host goes on after a failed import, and knows nothing of it later.

    Raises ImportError for a host or a Python that is too old and for a name that is taken; else what importing `modules` raised.
    """
    parts = host.__modules__
    ours = f"{__name__}.modules."
    if all(name in parts and parts[name].__module__.startswith(ours) for name in PARTS):
        return  # the host was asked to load this package once more
    before = set(parts)
    try:
        _check(host)
        _forget()  # of an earlier, failed or standalone, import: what is in memory would not register again
        importlib.import_module(".modules", __name__)
    except Exception as error:
        for name in set(parts) - before:
            del parts[name]
        _forget()
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ImportError) else str(error)
        print(
            f"\n{__name__} was not loaded: {reason}\n"
            f"  threestudio knows none of its parts now: a configuration that names one ends in KeyError: 'pgc-...'\n"
            f"  what to do: {_advice(error)}\n",
            file=sys.stderr,
        )
        raise


def _check(host):
    if sys.version_info < OLDEST_PYTHON:
        raise ImportError(f"Python: found {sys.version.split()[0]}, wanted {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    version = getattr(host, "__version__", "none")
    if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < OLDEST_HOST:
        raise ImportError(f"threestudio: found version {version}, wanted {'.'.join(map(str, OLDEST_HOST))} or newer (0.2.3 is tested)")
    taken = [name for name in PARTS if name in host.__modules__]
    if taken:
        owners = ", ".join(f"{name} by {host.__modules__[name].__module__}" for name in taken)
        raise ImportError(f"names: found {owners}, wanted them free: another extension, or a second copy of this one, is in custom/")


def _advice(error):
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name} in {sys.executable}; `bash launch_scripts/install.sh` of this package's repository says how"
    if str(error).startswith("names:"):
        return "rename the other's folder in custom/ to end in _disabled, which threestudio passes over"
    if isinstance(error, ImportError):
        return "run `bash launch_scripts/install.sh THREESTUDIO_DIR` of this package's repository: it says what is wanted and what is there"
    return "report it, with the traceback that follows"


def _forget():
    """Drop what depends on the host from memory."""
    names = (f"{__name__}.host", f"{__name__}.modules")
    for module in [module for module in sys.modules if module.startswith(names)]:
        del sys.modules[module]


if "threestudio" in sys.modules and os.environ.get("PGC_HOST") != "standalone":
    _register(sys.modules["threestudio"])
