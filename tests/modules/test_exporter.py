"""What the exporter hands on: the mesh to be saved, without fragments and without a gradient."""

import re

import pytest
import torch

from threestudio_pgc.modules.exporter import MeshExporter
from threestudio_pgc.modules.material import PBR, Albedo
from threestudio_pgc.scene.mesh import TriangleMesh


class Geometry:
    """Two triangles apart, one a hundredth of the other, with a gradient."""

    def triangle_mesh(self):
        large = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        return TriangleMesh(torch.cat([large, large * 0.1 + 2]).requires_grad_() * 1.0, torch.arange(6).view(2, 3))


class Tetrahedral(Geometry):
    """A geometry whose mesh for the renderer is another one than that for a file."""

    def export_mesh(self):
        return super().triangle_mesh()

    def triangle_mesh(self):
        raise AssertionError("wanted the mesh that is meant for export")


def exported(geometry, **config):
    (output,) = MeshExporter(config, geometry=geometry, material=None, background=None)()
    return output.params["mesh"]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused_by_the_key(share):
    with pytest.raises(ValueError, match="system.exporter.min_fragment: found"):
        exported(Geometry(), min_fragment=share)


@pytest.mark.parametrize("geometry", [Geometry, Tetrahedral])
def test_everything_is_kept_by_default_and_without_a_gradient(geometry, caplog):
    mesh = exported(geometry())
    assert len(mesh.faces) == 2 and not mesh.vertices.requires_grad and "left out" not in caplog.text


@pytest.mark.parametrize("geometry", [Geometry, Tetrahedral])
def test_small_fragments_are_left_out_and_that_is_said(geometry, caplog):
    mesh = exported(geometry(), min_fragment=0.05)
    assert mesh.faces.tolist() == [[0, 1, 2]] and len(mesh.vertices) == 3
    assert "1 loose part(s) left out, each below 0.05 of the largest one's surface" in caplog.text


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("formats", ["fbx"], "found ['fbx'], wanted any of ['glb', 'obj']"),
        ("preset", "maya", "found 'maya', wanted one of gltf, "),
        ("image_format", "tiff", "found 'tiff', wanted one of "),
        ("texture_size", 16, "found 16, wanted 64 to 8192"),
        ("quality", 0, "found 0, wanted 1 to 100"),
        ("texture_samples", 3, "found 3, wanted 1, 4, 9 or 16"),
        ("unwrap_seconds", 0.0, "found 0.0, wanted 1 to inf"),
        ("simplify", 2, "found 2, wanted null or at least 4 faces"),
        ("simplify", 0.5, "found 0.5, wanted null or at least 4 faces"),
    ],
)
def test_a_bad_setting_is_refused_by_its_key(key, value, message):
    with pytest.raises(ValueError, match=re.escape(f"system.exporter.{key}: {message}")):
        exported(Geometry(), **{key: value})


class Sphere(Geometry):
    """Eighty faces, which can be fewer, with three features a point."""

    def triangle_mesh(self):
        import trimesh

        sphere = trimesh.creation.icosphere(subdivisions=1)
        return TriangleMesh(torch.tensor(sphere.vertices, dtype=torch.float32), torch.tensor(sphere.faces))

    def export(self, points):
        return {"features": points}


def test_a_mesh_is_simplified_on_request_only(caplog):
    assert len(exported(Sphere()).faces) == len(exported(Sphere(), simplify=80).faces) == 80 and "simplified" not in caplog.text
    assert len(exported(Sphere(), simplify=40).faces) <= 40
    assert "80 faces simplified to 40" in caplog.text


def test_the_maps_of_a_material_have_the_names_that_are_baked():
    points = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    geometry = Sphere()
    (albedo,) = MeshExporter({}, geometry=geometry, material=Albedo({}), background=None)()
    assert set(albedo.params["maps"](points, points)) == {"base_color"}
    geometry.export = lambda points: {"features": points.repeat(1, 3)}
    (pbr,) = MeshExporter({}, geometry=geometry, material=PBR({"occlusion": [0, 1], "metallic": [0, 1]}), background=None)()
    maps = pbr.params["maps"](points, points)
    assert set(maps) == {"base_color", "occlusion", "roughness", "metallic", "normal"}
    assert not torch.equal(maps["normal"], points)
