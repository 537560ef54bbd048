"""Loading this package as threestudio does, with a module of that name in place of the real one: all parts are registered, or none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import threestudio_pgc

CUSTOM = Path(__file__).resolve().parents[1] / "custom"

# What threestudio 0.2.3 registers itself.
HOSTS = """
    co3d-datamodule control4d-multiview-system custom-mesh deep-floyd-guidance deep-floyd-prompt-processor
    diffuse-with-point-light-material dreamfusion-system dummy-exporter dummy-prompt-processor eff-random-camera-datamodule
    efficient-dreamfusion-system fantasia3d-system gan-volume-renderer hybrid-rgb-latent-material image-condition-dreamfusion-system
    implicit-sdf implicit-volume instructnerf2nerf-system latentnerf-system magic123-system magic3d-system mesh-exporter
    multiview-camera-datamodule nerf-volume-renderer neural-environment-map-background neural-radiance-material neus-volume-renderer
    no-material nvdiff-rasterizer patch-renderer pbr-material perceptual-loss prolificdreamer-system random-camera-datamodule
    sd-latent-adapter-material sdi-system single-image-datamodule sjc-system solid-color-background stable-diffusion-controlnet-guidance
    stable-diffusion-guidance stable-diffusion-instructpix2pix-guidance stable-diffusion-prompt-processor stable-diffusion-sdi-guidance
    stable-diffusion-unified-guidance stable-diffusion-vsd-guidance stable-zero123-guidance tetrahedra-sdf-grid textmesh-system
    textured-background volume-grid zero123-guidance zero123-simple-system zero123-system zero123-unified-guidance
""".split()
# What published extensions register (threestudio-extensions' list, and the extensions read).
EXTENSIONS = """
    diffusers-stable-diffusion-xl-guidance diffusers-controlnet-guidance diffusers-stable-diffusion-guidance tetrahedra-sdf-grid-geodream
    multi-controlnet-guidance mvdream-system mvdream-multiview-diffusion-guidance mvdream-random-multiview-camera-datamodule
    dreamcraft3d-mask-nvdiff-rasterizer dreamcraft3d-system gaussian-mesh-exporter gaussian-splatting lrm-guidance
""".split()

# Run in a process of its own: what threestudio's launcher does with a folder in custom/.
LOADER = """
import importlib.util, os, sys, types
host = types.ModuleType("threestudio")
host.__version__, host.__modules__ = os.environ["HOST_VERSION"], {name: type(name, (), {}) for name in os.environ["HOST_PARTS"].split()}
sys.modules["threestudio"] = host

def load(folder=os.path.join(os.environ["CUSTOM"], "threestudio_pgc")):
    name = os.path.basename(folder)
    try:
        spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return True
    except Exception:
        return False
"""
# The symbols that `host.py` takes from threestudio, each by its twin in the standalone host.
SYMBOLS = """
def register(name):
    def enter(cls):
        if name in host.__modules__:
            raise ValueError(f"Module {name} already exists! Names of extensions conflict!")
        host.__modules__[name] = cls
        return cls
    return enter

host.register, host.find, host.info, host.warn, host.debug, host.__path__ = register, host.__modules__.get, print, print, print, []
del sys.modules["threestudio"]
sys.path.insert(0, os.environ["CUSTOM"])
from threestudio_pgc.standalone import base, config, misc, parts, systems
sys.modules["threestudio"] = host
for name in "models.background models.exporters models.geometry models.materials models.renderers systems utils".split():
    for package in (name.split(".")[0], name):
        sys.modules[f"threestudio.{package}"] = types.ModuleType(package)
        sys.modules[f"threestudio.{package}"].__path__ = []
for name in "models.background.base models.exporters.base models.geometry.base models.materials.base models.mesh".split():
    sys.modules[f"threestudio.{name}"] = parts
sys.modules |= {"threestudio.models.renderers.base": parts, "threestudio.systems.base": systems, "threestudio.systems.utils": systems}
misc.load_module_weights = base.load_module_weights
sys.modules |= {"threestudio.utils.base": base, "threestudio.utils.config": config, "threestudio.utils.misc": misc}
"""


def in_a_host(code: str, version: str = "0.2.3", parts: list[str] = HOSTS) -> subprocess.CompletedProcess:
    """Run `code` after LOADER, in a threestudio of that version that has these parts."""
    settings = {"HOST_VERSION": version, "HOST_PARTS": " ".join(parts), "CUSTOM": str(CUSTOM), "OMP_NUM_THREADS": "1"}
    settings = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **settings}
    settings.pop("PGC_HOST", None)
    return subprocess.run([sys.executable, "-c", LOADER + code], capture_output=True, text=True, env=settings)


# Whether it loads, and whether the host has afterwards the parts that it had before.
TRY = "before = dict(host.__modules__); print(load(), before == host.__modules__)"


def test_all_is_registered_and_only_once(tmp_path):
    copy = tmp_path / "threestudio-pgc"
    copy.symlink_to(CUSTOM / "threestudio_pgc")
    done = in_a_host(
        SYMBOLS
        + "known = set(host.__modules__); assert load(); print(*sorted(set(host.__modules__) - known))\n"
        + f"{TRY}; print(load({str(copy)!r}), before == host.__modules__)\n"
        + "host.__modules__.clear(); print(load(), len(host.__modules__))"
    )
    assert done.returncode == 0, done.stderr
    names, again, second, forgotten = done.stdout.splitlines()
    assert tuple(names.split()) == threestudio_pgc.PARTS
    assert (again, second, forgotten) == ("True True", "False True", f"True {len(threestudio_pgc.PARTS)}")
    assert done.stderr.count("was not loaded") == 1
    assert "threestudio-pgc was not loaded" in done.stderr and "a second copy of this one" in done.stderr


FULL_TABLE = """
def full(name):
    if len(host.__modules__) > 60:
        raise RuntimeError("the table is full")
    return register(name)
host.register = full
"""


def test_what_fails_half_way_leaves_nothing_and_says_why():
    missing = "\nhost.register, sys.modules['numpy'] = register, None\n"
    done = in_a_host(SYMBOLS + FULL_TABLE + TRY + missing + TRY + "\ndel sys.modules['numpy']; print(load())")
    assert done.stdout.split() == ["False", "True", "False", "True", "True"], done.stderr
    full, numpy = done.stderr.split("threestudio_pgc was not loaded: ")[1:]
    assert full.startswith("RuntimeError: the table is full") and "KeyError: 'pgc-...'" in full
    assert "what to do: install numpy in" in numpy


@pytest.mark.parametrize("version", ["0.1.9", "none"])
def test_an_old_host_is_refused(version):
    done = in_a_host(TRY, version=version)
    assert done.stdout.split() == ["False", "True"]
    assert f"threestudio_pgc was not loaded: threestudio: found version {version}, wanted 0.2.0 or newer" in done.stderr


def test_a_name_that_is_taken_is_found_before_the_first_is_registered():
    done = in_a_host(TRY, parts=[*HOSTS, "pgc-zero123-guidance"])
    assert done.stdout.split() == ["False", "True"]
    assert "found pgc-zero123-guidance by __main__, wanted" in done.stderr and "_disabled" in done.stderr


def test_standalone_by_wish_registers_nothing_with_the_host():
    done = in_a_host("os.environ['PGC_HOST'] = 'standalone'; " + TRY)
    assert done.stdout.split() == ["True", "True"]


def test_the_list_of_names_is_what_is_registered():
    import threestudio_pgc.modules
    from threestudio_pgc.standalone import registry

    ours = {name for name, part in registry._parts.items() if part.__module__.startswith("threestudio_pgc.modules")}
    assert ours == set(threestudio_pgc.PARTS)
    assert len(set(threestudio_pgc.PARTS)) == len(threestudio_pgc.PARTS)


def test_no_name_is_the_hosts_or_a_published_extensions():
    assert all(name.startswith("pgc-") for name in threestudio_pgc.PARTS)
    assert not set(threestudio_pgc.PARTS) & {*HOSTS, *EXTENSIONS}


def test_importing_the_parts_loads_nothing_heavy():
    """pytorch_lightning itself brings transformers, scipy and matplotlib where they are installed: only what comes on top counts."""
    code = (
        "import sys, torch, numpy, omegaconf, pytorch_lightning; before = set(sys.modules)\n"
        "import threestudio_pgc.modules\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(CUSTOM)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    heavy = (
        "diffusers transformers trimesh xatlas igl numba llvmlite scipy imageio matplotlib PIL accelerate OpenEXR huggingface_hub".split()
    )
    assert not set(heavy) & set(done.stdout.split())
