"""The bundled lights are what their script makes, and light as their notes say."""

import pytest
import torch

from launch_scripts import make_lights
from threestudio_pgc.scene.environment import EnvironmentLight, direction_of
from threestudio_pgc.scene.hdr import LIGHTS_DIRECTORY, builtin_light_names, read_hdr
from threestudio_pgc.scene.shading import shade, to_linear, tone_map


def test_every_bundled_light_has_its_recipe():
    assert builtin_light_names() == sorted(make_lights.LIGHTS)


def test_the_command_writes_the_bundled_bytes(tmp_path):
    assert make_lights.main(["--output", str(tmp_path / "new")]) == 0
    for name in make_lights.LIGHTS:
        content = (tmp_path / "new" / f"{name}.hdr").read_bytes()
        assert content == (LIGHTS_DIRECTORY / f"{name}.hdr").read_bytes()
        assert len(content) < 40_000


def test_the_studio_shows_a_white_of_0_8_as_0_8_from_the_front():
    light = EnvironmentLight(read_hdr("builtin:studio"))
    front = torch.tensor([[1.0, 0.0, 0.0]])
    one = torch.ones(1, 1)
    shown = tone_map(shade(light, torch.full((1, 3), 0.8), 0.6 * one, 0 * one, front, front))
    torch.testing.assert_close(to_linear(shown), torch.full((1, 3), 0.8), atol=0.05, rtol=0)
    assert light.color_deviation() < 1e-6
    torch.testing.assert_close(light.diffuse(front), torch.ones(1, 3), atol=0.01, rtol=0)


@pytest.mark.parametrize("name, azimuth, elevation", [("studio", -45, 40), ("sky", -40, 45)])
def test_the_brightest_lamp_stands_upper_left_of_the_camera(name, azimuth, elevation):
    image = read_hdr(f"builtin:{name}").sum(dim=-1).double()
    rows, columns = torch.nonzero(image > 0.9 * image.max(), as_tuple=True)
    u, v = (columns + 0.5) / 128, (rows + 0.5) / 64
    lamp = direction_of(torch.tensor(0.5 - azimuth / 360), torch.tensor(0.5 - elevation / 180))
    nearest = (direction_of(u, v) @ lamp).max()
    assert nearest > torch.cos(torch.deg2rad(torch.tensor(3.0)))


def test_the_sky_is_blue_above_and_brown_below():
    light = EnvironmentLight(read_hdr("builtin:sky"))
    above, below = light.radiance(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]))
    assert above[2] > above[1] > above[0]
    torch.testing.assert_close(below, torch.tensor([0.22, 0.2, 0.17]), rtol=0.01, atol=0)
