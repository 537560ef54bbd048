import pytest

from threestudio_pgc.standalone import registry
from threestudio_pgc.standalone.registry import RegistryError, find, register


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_parts", {})


def test_empty():
    with pytest.raises(RegistryError, match="'sdf' is not registered; there is none to choose from"):
        find("sdf")


def test_register_and_find():
    @register("sdf-grid")
    class Grid:
        pass

    assert find("sdf-grid") is Grid


def test_taken_name_is_refused_and_the_first_stays():
    first = register("grid")(type("First", (), {}))
    with pytest.raises(ValueError, match="'grid' is registered already, by .*First"):
        register("grid")(type("Second", (), {}))
    assert find("grid") is first


def test_unknown_name_gets_the_nearest():
    register("pgc-sdxl-guidance")(type("A", (), {}))
    register("mesh-exporter")(type("B", (), {}))
    with pytest.raises(RegistryError) as caught:
        find("pgc-sdlx-guidance")
    assert str(caught.value) == "'pgc-sdlx-guidance' is not registered; did you mean 'pgc-sdxl-guidance'?"


def test_mixins_stand_left_and_config_is_the_first_in_line():
    class Main:
        class Config:
            pass

        def name(self):
            return ["main"]

    class Plain:
        def name(self):
            return ["plain", *super().name()]

    class Configured:
        class Config:
            pass

        def name(self):
            return ["configured", *super().name()]

    for name, cls in (("main", Main), ("plain", Plain), ("configured", Configured)):
        register(name)(cls)
    both = find("main:plain,configured")
    assert both.__bases__ == (Plain, Configured, Main)
    assert both().name() == ["plain", "configured", "main"]
    assert both.Config is Configured.Config
    assert find("main:plain").Config is Main.Config
    with pytest.raises(RegistryError, match="'plane'.*'plain'"):
        find("main:plane")
    with pytest.raises(RegistryError):
        find("main:")
