"""What the exporter hands on: the mesh to be saved, without fragments and without a gradient."""

import pytest
import torch

from threestudio_pgc.modules.exporter import MeshExporter
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
