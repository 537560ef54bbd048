"""The only door to the host. `modules/` takes everything it needs of a host from here.

threestudio, where it is what loaded this package (or PGC_HOST=threestudio says so); else the small host in `standalone/`.
What stands under a name has the same signature in both. Differences that code above must respect:

- A nested dataclass in a `Config` is filled with its defaults and checked here by the standalone host only; call `parse_structured`
  on the nested block in `configure`, which is right in both.
- threestudio's update walker reaches a shared part several times per step: `update_step` must depend on its arguments alone.
"""

import os
import sys

from .standalone.config import ConfigError
from .standalone.misc import get_local_rank, get_rank
from .standalone.schedules import C
from .standalone.seeding import get_seed, step_generator

_wanted = os.environ.get("PGC_HOST", "")
if _wanted not in ("", "threestudio", "standalone"):
    raise ImportError(f"PGC_HOST: found {_wanted!r}, wanted 'threestudio' or 'standalone'")

HOST = _wanted or ("threestudio" if "threestudio" in sys.modules else "standalone")

if HOST == "threestudio":
    import threestudio
    from threestudio.models.background.base import BaseBackground
    from threestudio.models.exporters.base import Exporter, ExporterOutput
    from threestudio.models.geometry.base import BaseExplicitGeometry, BaseGeometry
    from threestudio.models.materials.base import BaseMaterial
    from threestudio.models.mesh import Mesh
    from threestudio.models.renderers.base import Rasterizer, Renderer
    from threestudio.systems.base import BaseLift3DSystem, BaseSystem
    from threestudio.systems.utils import parse_optimizer
    from threestudio.utils.base import BaseModule, BaseObject, Updateable
    from threestudio.utils.config import parse_structured
    from threestudio.utils.misc import cleanup, get_device, load_module_weights

    register, find = threestudio.register, threestudio.find
    info, warn, debug = threestudio.info, threestudio.warn, threestudio.debug
else:
    from .standalone.base import BaseModule, BaseObject, Updateable, load_module_weights
    from .standalone.config import parse_structured
    from .standalone.log import debug, info, warn
    from .standalone.misc import cleanup, get_device
    from .standalone.parts import (
        BaseBackground,
        BaseExplicitGeometry,
        BaseGeometry,
        BaseMaterial,
        Exporter,
        ExporterOutput,
        Mesh,
        Rasterizer,
        Renderer,
    )
    from .standalone.registry import find, register
    from .standalone.systems import BaseLift3DSystem, BaseSystem, parse_optimizer

__all__ = [
    "HOST",
    "BaseBackground",
    "BaseExplicitGeometry",
    "BaseGeometry",
    "BaseLift3DSystem",
    "BaseMaterial",
    "BaseModule",
    "BaseObject",
    "BaseSystem",
    "C",
    "ConfigError",
    "Exporter",
    "ExporterOutput",
    "Mesh",
    "Rasterizer",
    "Renderer",
    "Updateable",
    "cleanup",
    "debug",
    "find",
    "get_device",
    "get_local_rank",
    "get_rank",
    "get_seed",
    "info",
    "load_module_weights",
    "parse_optimizer",
    "parse_structured",
    "register",
    "step_generator",
    "warn",
]
