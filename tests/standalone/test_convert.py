"""One stage's geometry as the next one's start, through the launcher: `system.geometry_convert_from`."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.standalone.test_launcher import toy, workplace  # noqa: F401  the fixture is used by all tests
from threestudio_pgc import host
from threestudio_pgc.standalone import registry
from threestudio_pgc.standalone.launcher import main

RUN = Path("outputs/toy/first")
LAST = RUN / "ckpts" / "last.ckpt"


def load_parts():
    """The toy parts, and a geometry that takes others over."""
    toy.load_parts()

    @host.register("toy-heir")
    class Heir(registry.find("toy-geometry")):
        @staticmethod
        def create_from(other, cfg, copy_net):
            heir = Heir(cfg)
            heir.colours.data = -other.colours.detach()
            torch.save((other.colours.detach().clone(), other.steps_seen, copy_net, dict(other.cfg.options)), "taken.pt")
            return heir


def launch(*words, config="toy.yaml"):
    former, registry._parts = registry._parts, {}
    try:
        return main(["--config", str(config), *words], load_parts=load_parts)
    finally:
        registry._parts = former


def convert(*words):
    return launch("--train", "tag=second", "system.geometry_type=toy-heir", f"system.geometry_convert_from={LAST}", *words)


def colours(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]["geometry.colours"]


@pytest.fixture
def first_stage(workplace):  # noqa: F811
    assert launch("--train", "tag=first", "trainer.max_steps=3") == 0


def test_the_next_stage_starts_from_the_trained_geometry_at_its_step(first_stage):
    assert convert("trainer.max_steps=1", "checkpoint.every_n_train_steps=1", "system.geometry_convert_inherit_texture=true") == 0
    taken, steps_seen, copy_net, _ = torch.load("taken.pt", weights_only=True)
    assert torch.equal(taken, colours(LAST)) and steps_seen == [3] and copy_net
    after = colours("outputs/toy/second/ckpts/last.ckpt")
    assert 0 < (after + taken).abs().max() <= 0.051  # one step of Adam at 0.05


def test_the_override_is_of_the_earlier_geometry_and_keeps_the_rest(first_stage):
    assert convert("system.geometry_convert_override.options.depth=5", "trainer.max_steps=1") == 0
    _, _, copy_net, options = torch.load("taken.pt", weights_only=True)
    assert options == {"scale": 2.0, "depth": 5} and not copy_net


def test_resume_and_weights_do_not_convert_again(first_stage):
    assert convert("trainer.max_steps=3") == 0
    shutil.rmtree(RUN)
    Path("taken.pt").unlink()
    second = Path("outputs/toy/second")
    for mode in ("train", "test", "export"):
        assert launch(f"--{mode}", f"resume={second}/ckpts/last.ckpt", config=second / "configs/parsed.yaml") == 0
    assert torch.load(second / "ckpts/last.ckpt", weights_only=True)["global_step"] == 3
    shutil.copy(second / "ckpts/last.ckpt", "weights.ckpt")
    assert convert("system.weights=weights.ckpt", "trainer.max_steps=1") == 0
    assert not Path("taken.pt").exists()


def no_checkpoint():
    LAST.unlink()


def damaged_checkpoint():
    LAST.write_bytes(LAST.read_bytes()[:999])


def checkpoint_without_a_geometry():
    torch.save({"state_dict": {"lamp.power": torch.ones(1)}}, LAST)


def no_configuration():
    (RUN / "configs" / "parsed.yaml").unlink()


def configuration_cut_short():
    (RUN / "configs" / "parsed.yaml").write_text("system: {geometry_type: [")


def unknown_geometry():
    parsed = RUN / "configs" / "parsed.yaml"
    parsed.write_text(parsed.read_text().replace("toy-geometry", "toy-geometri"))


def configuration_of_something_else():
    (RUN / "configs" / "parsed.yaml").write_text("model: {layers: 3}")


def unknown_key():
    parsed = RUN / "configs" / "parsed.yaml"
    parsed.write_text(parsed.read_text().replace("options:", "opsions:"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (no_checkpoint, ["no such checkpoint", "last.ckpt"]),
        (damaged_checkpoint, ["last.ckpt is not a readable checkpoint"]),
        (checkpoint_without_a_geometry, ["holds no 'geometry'", "lamp"]),
        (no_configuration, ["found no outputs/toy/first/configs/parsed.yaml"]),
        (configuration_cut_short, ["parsed.yaml cannot be read"]),
        (unknown_geometry, ["parsed.yaml", "toy-geometri", "did you mean 'toy-geometry'?"]),
        (configuration_of_something_else, ["parsed.yaml", "'' is not registered"]),
        (unknown_key, ["parsed.yaml", "opsions: no such key", "system.geometry_convert_override"]),
    ],
)
def test_what_cannot_be_converted_is_told_by_the_key(first_stage, capsys, damage, told):
    damage()
    assert convert() == 2
    said = capsys.readouterr().err
    assert "system.geometry_convert_from: " in said and "Traceback" not in said
    for words in told:
        assert words in said
    assert not Path("outputs/toy/second").exists()


def test_a_geometry_that_takes_none_over_is_told(first_stage, capsys):
    assert convert("system.geometry_type=toy-geometry") == 2
    assert "system.geometry_convert_from: a ToyGeometry cannot be turned into" in capsys.readouterr().err


def test_parameters_of_another_shape_are_told(first_stage, capsys):
    assert convert("system.geometry_convert_override.size=5") == 2
    said = capsys.readouterr().err
    assert "system.geometry_convert_from: " in said and "does not fit" in said and "size mismatch for colours" in said
