import sys

import pytest
import torch

from threestudio_pgc.export.files import ExportError
from threestudio_pgc.export.simplify import simplify
from threestudio_pgc.scene.mesh import TriangleMesh


def test_no_faces_stay_no_faces():
    empty = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    assert simplify(empty, 4) is empty


def test_too_few_faces_are_refused(box):
    with pytest.raises(ExportError, match="found 3, wanted at least 4"):
        simplify(box, 3)


def test_a_mesh_with_no_more_faces_is_returned_as_it_is(box):
    assert simplify(box, 12) is box


def test_a_sphere_keeps_its_shape_frame_and_source(bare_sphere):
    bare_sphere.vertices.requires_grad_()
    coarse = simplify(bare_sphere, 100)
    assert 90 <= len(coarse.faces) <= 100
    assert coarse.frame is bare_sphere.frame and coarse.source_path == bare_sphere.source_path
    assert coarse.uvs is None and coarse.uv_faces is None and not coarse.vertices.requires_grad
    assert coarse.vertices.dtype == torch.float32 and coarse.faces.dtype == torch.int64
    radius = coarse.vertices.norm(dim=1)
    assert radius.min() > 0.7 and radius.max() < 0.9


def test_the_result_is_welded_closed_and_without_degenerate_faces(bare_sphere):
    coarse = simplify(bare_sphere, 60)
    assert len(torch.unique(coarse.vertices, dim=0)) == len(coarse.vertices) == len(torch.unique(coarse.faces))
    assert (coarse.face_normals().norm(dim=1) > 0.99).all()
    assert (coarse.face_adjacency() >= 0).all()


def test_faces_stay_counter_clockwise_from_outside(bare_sphere):
    coarse = simplify(bare_sphere, 60)
    centres = coarse.vertices[coarse.faces].mean(dim=1)
    assert ((centres * coarse.face_normals()).sum(dim=1) > 0).all()


def test_unshared_corners_are_welded(box):
    apart = TriangleMesh(box.vertices[box.faces].reshape(-1, 3), torch.arange(36).view(-1, 3))
    assert len(simplify(apart, 11).vertices) <= 8


def test_a_missing_library_is_named(bare_sphere, monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(ExportError, match="pip install fast-simplification"):
        simplify(bare_sphere, 10)
