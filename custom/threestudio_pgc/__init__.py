"""Pixel-wise Gradient Clipping for high-resolution text-to-3D: an extension of threestudio that also runs on its own.

Loaded by threestudio's launcher, importing this package registers its parts with the host. Imported by anything else (the standalone
launcher, a test, a notebook), it registers nothing and costs nothing: the standalone launcher imports `threestudio_pgc.modules` itself.
"""

import sys

__version__ = "0.1.0"

if "threestudio" in sys.modules:
    from . import modules  # noqa: F401  registers every part by importing it
