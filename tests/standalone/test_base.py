from dataclasses import dataclass

import pytest
import torch

from threestudio_pgc.standalone.base import BaseModule, BaseObject, Updateable
from threestudio_pgc.standalone.config import ConfigError
from threestudio_pgc.standalone.parts import BaseExplicitGeometry, Mesh, Rasterizer
from threestudio_pgc.standalone.seeding import seed_step, step_generator
from threestudio_pgc.standalone.systems import parse_optimizer


class Counter(BaseModule):
    def configure(self, log, name, child=None):
        self.log, self.name, self.child = log, name, child

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.log.append((self.name, epoch, global_step, on_load_weights))

    def update_step_end(self, epoch, global_step):
        self.log.append((self.name, "end"))


def test_walker_without_parts():
    Updateable().do_update_step(0, 0)


def test_walker_visits_inner_first_each_once_and_follows_no_private_name():
    log = []
    shared = Counter({}, log, "shared")
    left, right = Counter({}, log, "left", shared), Counter({}, log, "right", shared)
    root = Counter({}, log, "root", left)
    root.other = right
    root._private = [Counter({}, log, "private")]
    right._modules["_hidden"] = Counter({}, log, "hidden")
    root.do_update_step(2, 7, on_load_weights=True)
    assert sorted(name for name, *_ in log) == ["left", "right", "root", "shared"]
    assert log[0] == ("shared", 2, 7, True) and log[-1] == ("root", 2, 7, True)
    log.clear()
    root.do_update_step_end(2, 7)
    assert sorted(log) == [("left", "end"), ("right", "end"), ("root", "end"), ("shared", "end")]


def test_walker_survives_a_circle():
    log = []
    inner = Plain(log)
    inner.back = Plain(log, inner)
    inner.do_update_step(0, 1)
    assert log == [1, 1]


class Plain(Updateable):
    def __init__(self, log, inner=None):
        self.log, self.inner = log, inner

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.log.append(global_step)


def test_base_object_is_configured_with_its_arguments():
    class Scaled(BaseObject):
        @dataclass
        class Config(BaseObject.Config):
            scale: float = 2.0

        def configure(self, factor):
            self.value = self.cfg.scale * factor

    assert Scaled({"scale": "3"}, 2).value == 6.0
    assert Scaled(None, factor=1).value == 2.0
    with pytest.raises(ConfigError, match="scael: no such key; did you mean 'scale'"):
        Scaled({"scael": 1}, 1)


class Linear(BaseModule):
    def configure(self):
        self.layer = torch.nn.Linear(2, 1)


def test_weights_of_one_module_are_loaded(tmp_path):
    source = Linear({})
    state = {f"geometry.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 0, "global_step": 5}, tmp_path / "a.ckpt")
    loaded = Linear({"weights": f"{tmp_path}/a.ckpt:geometry"})
    assert torch.equal(loaded.layer.weight, source.layer.weight)
    with pytest.raises(ConfigError, match="holds no 'geometri'; it holds geometry"):
        Linear({"weights": f"{tmp_path}/a.ckpt:geometri"})
    with pytest.raises(ConfigError, match="no such checkpoint"):
        Linear({"weights": f"{tmp_path}/b.ckpt:geometry"})
    with pytest.raises(ConfigError, match="wanted '<checkpoint>:<module>'"):
        Linear({"weights": "a.ckpt"})


def test_optimizer_groups_and_their_errors():
    model = torch.nn.Module()
    model.geometry = Linear({})
    optimizer = parse_optimizer({"name": "Adam", "args": {"lr": 0.1}, "params": {"geometry.layer": {"lr": 0.5}}}, model)
    assert [(group["name"], group["lr"], len(group["params"])) for group in optimizer.param_groups] == [("geometry.layer", 0.5, 2)]
    assert len(parse_optimizer({"name": "SGD", "args": {"lr": 0.1}}, model).param_groups[0]["params"]) == 2
    with pytest.raises(ConfigError, match=r"params\.geometry\.layr: no module with parameters there; did you mean 'geometry.layer'"):
        parse_optimizer({"name": "Adam", "params": {"geometry.layr": {}}}, model)
    with pytest.raises(ConfigError, match="torch.optim has no 'Adamm'"):
        parse_optimizer({"name": "Adamm"}, model)
    with pytest.raises(ConfigError, match="no parameters to optimise"):
        parse_optimizer({"name": "Adam"}, torch.nn.Module())
    with pytest.raises(ConfigError, match="Invalid learning rate"):
        parse_optimizer({"name": "Adam", "args": {"lr": -1.0}}, model)


def test_renderer_does_not_own_the_shared_parts():
    geometry = BaseExplicitGeometry({"radius": 2.0})
    geometry.colour = torch.nn.Parameter(torch.zeros(3))
    renderer = Rasterizer({}, geometry=geometry, material=None, background=None)
    assert renderer.geometry is geometry and list(renderer.parameters()) == []
    assert geometry.bbox.tolist() == [[-2.0] * 3, [2.0] * 3]


def test_mesh_without_faces_and_normals_of_a_cube():
    empty = Mesh(torch.zeros(2, 3), torch.zeros(0, 3, dtype=torch.long))
    assert empty.v_nrm.tolist() == [[0, 0, 1]] * 2 and empty.edges.shape == (0, 2)
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], requires_grad=True)
    mesh = Mesh(corners, torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]), name="tetrahedron")
    assert torch.allclose(mesh.v_nrm[0], -torch.ones(3) / 3**0.5) and mesh.v_nrm.requires_grad
    assert len(mesh.edges) == 6 and mesh.extras == {"name": "tetrahedron"}


def test_draws_depend_on_the_step_and_the_stream_only():
    def draw(*key):
        return torch.rand(3, generator=step_generator(*key)).tolist()

    assert draw(0, 5, 0, "cameras") == draw(0, 5, 0, "cameras")
    assert len({tuple(draw(*key)) for key in [(0, 5, 0, "a"), (1, 5, 0, "a"), (0, 6, 0, "a"), (0, 5, 1, "a"), (0, 5, 0, "b")]}) == 5
    seed_step(1, 2)
    first = torch.rand(2)
    torch.rand(5)
    seed_step(1, 2)
    assert torch.equal(torch.rand(2), first)


def test_a_renderer_keeps_its_bounds_in_checkpoints_as_threestudios_does():
    renderer = Rasterizer({"radius": 2.0}, geometry=None, material=None, background=None)
    assert {name: value.tolist() for name, value in renderer.state_dict().items()} == {"bbox": [[-2.0] * 3, [2.0] * 3]}
