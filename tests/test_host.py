import importlib.util
import sys
import types
from pathlib import Path

import pytest

from threestudio_pgc import host

symbols = {
    "threestudio": "register find info warn debug",
    "threestudio.models.background.base": "BaseBackground",
    "threestudio.models.exporters.base": "Exporter ExporterOutput",
    "threestudio.models.geometry.base": "BaseExplicitGeometry BaseGeometry",
    "threestudio.models.materials.base": "BaseMaterial",
    "threestudio.models.mesh": "Mesh",
    "threestudio.models.renderers.base": "Rasterizer Renderer",
    "threestudio.systems.base": "BaseLift3DSystem BaseSystem",
    "threestudio.systems.utils": "parse_optimizer",
    "threestudio.utils.base": "BaseModule BaseObject Updateable",
    "threestudio.utils.config": "parse_structured",
    "threestudio.utils.misc": "cleanup get_device load_module_weights",
}


def load_again(name: str) -> types.ModuleType:
    """The door, opened once more under another name, so that the one in use stays as it is."""
    spec = importlib.util.spec_from_file_location(f"threestudio_pgc.{name}", Path(host.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def threestudio(monkeypatch):
    """A stand-in with the symbols that are taken from the real one."""
    packages = {name.rsplit(".", depth)[0] for name in symbols for depth in range(name.count(".") + 1)}
    for name in sorted(packages | set(symbols)):
        module = types.ModuleType(name)
        module.__path__ = []
        for symbol in symbols.get(name, "").split():
            setattr(module, symbol, f"{name}.{symbol}")
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("PGC_HOST", raising=False)


def test_alone_it_is_the_standalone_host():
    assert host.HOST == "standalone" and "threestudio" not in sys.modules
    assert all(getattr(host, name) is not None for name in host.__all__)
    assert host.BaseModule.__module__ == "threestudio_pgc.standalone.base"


def test_loaded_by_threestudio_it_is_threestudio(threestudio):
    door = load_again("host_under_threestudio")
    assert door.HOST == "threestudio" and door.__all__ == host.__all__
    for module, names in symbols.items():
        for name in names.split():
            assert getattr(door, name) == f"{module}.{name}"
    assert all(hasattr(door, name) for name in door.__all__)


def test_environment_decides(threestudio, monkeypatch):
    monkeypatch.setenv("PGC_HOST", "standalone")
    assert load_again("host_forced").HOST == "standalone"
    monkeypatch.setenv("PGC_HOST", "blender")
    with pytest.raises(ImportError, match="PGC_HOST: found 'blender', wanted 'threestudio' or 'standalone'"):
        load_again("host_wrong")


def test_threestudio_wanted_but_absent(monkeypatch):
    monkeypatch.setenv("PGC_HOST", "threestudio")
    monkeypatch.setitem(sys.modules, "threestudio", None)
    with pytest.raises(ImportError, match="threestudio"):
        load_again("host_absent")
