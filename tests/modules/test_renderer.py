"""What the renderer hands to a material that is lit: normals on the side that is seen, and its maps as pictures."""

import pytest
import torch

from threestudio_pgc.host import Mesh
from threestudio_pgc.modules.background import Background
from threestudio_pgc.modules.data import camera_batch
from threestudio_pgc.modules.geometry import TexturedMesh, surface_of
from threestudio_pgc.modules.material import PBR, Albedo
from threestudio_pgc.modules.renderer import MeshRasterizer
from threestudio_pgc.scene.cameras import look_at_cameras
from threestudio_pgc.scene.mesh import TriangleMesh

TEXTURE = {"preset": "pocket", "n_levels": 2, "log2_hashmap_size": 8}


def square():
    """An open square in the plane x = 0 that faces +x."""
    vertices = torch.tensor([[0, -0.5, -0.5], [0, 0.5, -0.5], [0, 0.5, 0.5], [0, -0.5, 0.5]])
    return TriangleMesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]))


class Recorder(Albedo):
    """The albedo material that keeps the normals it is given."""

    requires_normal = False

    def forward(self, features, shading_normal, **kwargs):
        self.normals = shading_normal
        return super().forward(features)


def render(material, azimuth=0.0, **kwargs):
    torch.manual_seed(0)
    geometry = TexturedMesh({"mesh": None, "texture": {**TEXTURE, "n_output": material.n_features}}, square())
    background = Background({"kind": "solid"})
    renderer = MeshRasterizer({}, geometry=geometry, material=material, background=background)
    with torch.no_grad():
        return renderer(**camera_batch(look_at_cameras(0.0, azimuth, 3.0, 0.6), 32, 32), **kwargs)


@pytest.mark.parametrize("azimuth, sign", [(0.0, 1.0), (180.0, -1.0)])
def test_a_lit_material_sees_the_normal_of_the_side_that_is_seen(azimuth, sign):
    material = Recorder({})
    material.requires_normal = True
    render(material, azimuth)
    torch.testing.assert_close(material.normals, torch.tensor([[sign, 0, 0]]).expand_as(material.normals))


def test_an_unlit_one_is_given_the_surfaces_normal():
    material = Recorder({})
    render(material, 180.0)
    torch.testing.assert_close(material.normals, torch.tensor([[1.0, 0, 0]]).expand_as(material.normals))


def test_both_sides_of_an_open_surface_are_lit_alike_in_even_light():
    material = PBR({"light": "builtin:studio"})
    material.light = type(material.light)(torch.ones(8, 16, 3))
    front, back = (render(material, azimuth)["comp_rgb"] for azimuth in (0.0, 180.0))
    torch.testing.assert_close(front, back.flip(2), atol=0.02, rtol=0)


def test_maps_are_pictures_on_white():
    out = render(PBR({"light": "builtin:studio"}), render_maps=True)
    assert set(out["maps"]) == {"albedo", "roughness", "shading_normal"}
    for picture in out["maps"].values():
        assert picture.shape == (1, 32, 32, 3) and 0 <= picture.min() and picture.max() <= 1
        assert (picture[out["opacity"].expand_as(picture) == 0] == 1).all()
    (normal,) = out["maps"]["shading_normal"][0, 16, 16][None]
    assert normal[0] > 0.9, "the square faces +x"


def test_no_maps_unless_asked():
    assert "maps" not in render(Albedo({}))


class HostsGeometry(TexturedMesh):
    """As threestudio's own geometries are: a surface by `isosurface` alone."""

    triangle_mesh = property()

    def isosurface(self):
        return Mesh(v_pos=self._mesh.vertices, t_pos_idx=self._mesh.faces.int())


def test_a_geometry_of_the_hosts_is_rendered_by_its_isosurface():
    texture = {**TEXTURE, "n_output": 3}
    mesh = surface_of(HostsGeometry({"mesh": None, "texture": texture}, square()))
    assert mesh.faces.dtype == torch.int64 and torch.equal(mesh.vertices, square().vertices)


def test_a_geometry_without_a_surface_is_refused_by_its_key():
    with pytest.raises(ValueError, match="system.geometry_type: found Albedo, wanted one with a surface"):
        surface_of(Albedo({}))
