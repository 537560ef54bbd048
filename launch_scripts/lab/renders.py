"""Pictures of textured objects by formula, at any size: what a linear map is fitted on and where gradients are measured."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from launch_scripts.pocket.captions import Look, sample_look
from launch_scripts.pocket.renders import bundled_shapes
from launch_scripts.pocket.shapes import Shape, shapes
from launch_scripts.pocket.textures import Surface, paint
from threestudio_pgc.scene.cameras import Cameras, sample_cameras
from threestudio_pgc.scene.gbuffer import composite, render_gbuffer
from threestudio_pgc.scene.mesh import TriangleMesh
from threestudio_pgc.scene.raster import make_rasterizer
from threestudio_pgc.standalone.seeding import derive_seed


@functools.cache
def _pool() -> list[Shape]:
    return [*shapes(), *bundled_shapes()]


def textured_render(
    mesh: TriangleMesh, shape: Shape, look: Look | None, camera: Cameras, size: int, seed: int, background: Tensor
) -> tuple[Tensor, Tensor]:
    """Picture (size, size, 3) in [0, 1] and mask (size, size): bare albedo of `look` (None: mid grey) over a flat `background` (3,).

    `shape` is the same surface as the painters know it; `seed` picks one of a look's variants.
    """
    buffers = render_gbuffer(mesh, camera, size, size, make_rasterizer("cpu"))
    position, normal = (buffers.select(values) for values in (buffers.position, buffers.normal))
    color = torch.full_like(position, 0.5)
    if look is not None:
        color = torch.from_numpy(paint(look, Surface(position.numpy(), normal.numpy(), shape.samples, shape.radius), seed))
    return composite(color, buffers, background.expand(1, size, size, 3))[0].clamp(0, 1), buffers.mask[0]


def shape_of(mesh: TriangleMesh) -> Shape:
    """A mesh as the painters want it."""
    return Shape("object", mesh.vertices.numpy(), mesh.faces.numpy(), lathe=False, weight=1.0)


def textured_renders(count: int, size: int, seed: int = 0) -> Tensor:
    """(count, size, size, 3) in [0, 1]: random shapes, looks, cameras and flat backgrounds, a function of the seed."""
    pool, images = _pool(), []
    for index in range(count):
        rng = np.random.default_rng(derive_seed(seed, index, "renders"))
        shape, look = pool[rng.integers(len(pool))], sample_look(rng)
        camera = sample_cameras(1, generator=torch.Generator().manual_seed(derive_seed(seed, index, "camera")))
        background = torch.from_numpy(rng.random(3)).float()
        mesh = TriangleMesh(torch.as_tensor(shape.vertices, dtype=torch.float32), torch.as_tensor(shape.faces))
        images.append(textured_render(mesh, shape, look, camera, size, int(rng.integers(8)), background)[0])
    return torch.stack(images)
