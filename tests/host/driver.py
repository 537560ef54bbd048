"""threestudio's own launcher on a machine without a GPU. Its source is not edited: all that it lacks is put around it, before it starts.

    python tests/host/driver.py ROOT --config CONFIG --train key=value ...    one command, as `python launch.py ...` would run it in ROOT
    python tests/host/driver.py ROOT --serve                                  many: each line of stdin is {"arguments": [...], "log": FILE}

Each command of the second form runs in a fork of this process, so that threestudio is imported once; its exit code is a line of stdout.

Packages that are installed are used as they are. For those that are not, and need a GPU or are imported for nothing here, there are
stand-ins in `stand_ins/`. They make the code run; what they compute says nothing about quality.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
RUN_SECONDS = 150  # a command that takes longer is ended, and has failed

# What threestudio imports at start and a run on a CPU never calls. Submodules too.
IMPORT_ONLY = (
    *("bs4", "controlnet_aux", "einops", "IPython", "jaxtyping", "kornia", "mcubes", "torchvision", "typeguard", "wandb"),
    *("nerfacc.data_specs", "nerfacc.estimators", "nerfacc.pdf", "nerfacc.volrend"),
)


class _Unused(type):
    """Of classes that may be subscripted, as in Float[Tensor, "B 3"], or subclassed, and never made."""

    def __getitem__(cls, item):
        return cls

    def __call__(cls, *args, **kwargs):
        raise RuntimeError(f"{cls.__module__}.{cls.__name__} is a stand-in for the sake of an import, and was called")


class ImportOnly(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of IMPORT_ONLY that nobody else has found: modules, every name in which is a class that cannot be made."""

    def find_spec(self, name, path=None, target=None):
        if any(name == known or name.startswith(known + ".") for known in IMPORT_ONLY):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        def unused(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            # not made by calling _Unused's instances: a class statement would be refused where the real one is subclassed
            value = _Unused(name, (), {"__module__": module.__name__})
            setattr(module, name, value)
            return value

        module.__getattr__ = unused


def define_torchvision_operators() -> None:
    """PyPI's torchvision is a CUDA build: beside a CPU torch two of its operators are missing, and then importing it fails."""
    import torch

    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch._torchvision_operators = library  # the operators live as long as it does


def alias_libigl() -> None:
    """libigl 2.6 renamed two functions."""
    import igl

    for old, new in (("fast_winding_number_for_meshes", "fast_winding_number"), ("read_obj", "readOBJ")):
        if not hasattr(igl, old):
            setattr(igl, old, getattr(igl, new))


def prepare(root: Path) -> None:
    """Import threestudio from `root` in this process, ready for `launch.main` on a CPU. The order matters."""
    define_torchvision_operators()
    import diffusers  # noqa: F401
    import pytorch_lightning as pl
    import torch
    import transformers  # noqa: F401

    alias_libigl()
    # After those above: they look for optional packages at import, and a stand-in is not what they hope for.
    sys.path += [str(HERE / "stand_ins"), str(HERE.parents[1] / "custom")]
    sys.meta_path.append(ImportOnly())

    os.chdir(root)
    sys.path.insert(0, str(root))

    class Trainer(pl.Trainer):
        """launch.py asks for GPUs in its source, not in its configuration."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "accelerator": "cpu", "devices": 1})

    pl.Trainer = Trainer
    import threestudio  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "threestudio" and hasattr(module, "get_device"):
            module.get_device = lambda: torch.device("cpu")
    for name in ("threestudio.data.image", "threestudio.models.networks"):  # where a rank is taken for a device
        sys.modules[name].get_rank = lambda: "cpu"
    torch.cuda.device = lambda *args, **kwargs: contextlib.nullcontext()


def run(arguments: list[str]) -> int:
    """`python launch.py *arguments`; the exit code."""
    sys.argv = ["launch.py", *arguments]
    try:
        runpy.run_path("launch.py", run_name="__main__")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_forked(arguments: list[str], log: str) -> int:
    """`run` in a child whose output goes to the file `log`."""
    child = os.fork()
    if child == 0:
        signal.alarm(RUN_SECONDS)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main(argv: list[str]) -> int:
    root, *arguments = argv
    if arguments != ["--serve"]:
        prepare(Path(root).resolve())
        return run(arguments)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed meanwhile is no answer
    prepare(Path(root).resolve())
    for line in sys.stdin:
        command = json.loads(line)
        print(run_forked(command["arguments"], command["log"]), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
