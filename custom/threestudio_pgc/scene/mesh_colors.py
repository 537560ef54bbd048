"""The colours that a mesh file gives its own surface."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .mesh import MeshError, TriangleMesh, linear_to_srgb, sample_surface, srgb_to_linear


@dataclass(frozen=True)
class SurfaceColors:
    """A mesh whose faces all have colours."""

    mesh: TriangleMesh
    pictures: list[np.ndarray]  # (H, W, 3) uint8 display RGB each; numbered as in mesh.face_colors

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points spread evenly over the surface, and the colours there.

        Args:
            generator: on the CPU.
        Returns:
            points: (count, 3) float32 in the mesh's frame, on its device.
            colors: (count, 3) float32 display RGB in [0, 1], on the same.
        """
        points, faces, weights = sample_surface(self.mesh, count, generator)
        found, faces, weights = self.mesh.face_colors, faces.cpu().numpy(), weights.cpu().numpy()[:, :, None]
        colors = (found.corners[faces] * weights).sum(axis=1)
        uvs = (found.corner_uvs[faces] * weights).sum(axis=1)
        for number, picture in enumerate(self.pictures):
            here = found.face_picture[faces] == number
            texels = bilinear(picture, uvs[here])
            colors[here] = linear_to_srgb(srgb_to_linear(texels) * srgb_to_linear(colors[here]))
        return points, torch.from_numpy(np.clip(colors, 0, 1).astype(np.float32)).to(points.device)


def surface_colors(mesh: TriangleMesh) -> SurfaceColors | None:
    """The colours that the file of a mesh gave its surface, or None if it gave none.

    They are vertex or face colours, a picture through its texture coordinates (times glTF's base colour factor), or the flat colour of
    a material; each part of a file has its own. Faces without any are left out. Works as well after `normalize`. Lighting, roughness,
    opacity and the pictures' own transforms are not read. An OBJ finds its materials and pictures beside it; where they are missing it has
    no colours.

    Raises:
        MeshError: a picture that cannot be decoded.
    """
    found = mesh.face_colors
    if found is None:
        return None
    pictures = [_decode(picture, str(mesh.source_path or "mesh"), number) for number, picture in enumerate(found.pictures)]
    painted = ~np.isnan(found.corners).any(axis=(1, 2))
    faces = mesh.faces[torch.from_numpy(painted).to(mesh.faces.device)]
    # only positions, faces and colours are of use here, and the rest would no longer fit the faces
    return SurfaceColors(TriangleMesh(mesh.vertices, faces, face_colors=found.select(painted)), pictures)


def bilinear(picture: np.ndarray, uvs: np.ndarray) -> np.ndarray:
    """Colours of a picture (H, W, 3) uint8 that repeats, at texture coordinates (N, 2): (N, 3) float64 in [0, 1].

    v = 1 is the upper edge of row 0, and a texel has its colour at its centre.
    """
    height, width = picture.shape[:2]
    x, y = uvs[:, 0].astype(np.float64) * width - 0.5, (1 - uvs[:, 1].astype(np.float64)) * height - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    colors = np.zeros((len(uvs), 3))
    for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
            colors += (across * down)[:, None] * picture[row % height, column % width]
    return colors / 255


def _decode(picture, name: str, number: int) -> np.ndarray:
    try:
        return np.asarray(picture.convert("RGB"))
    except Exception as error:  # every picture format fails in its own way
        raise MeshError(f"{name}: its picture {number} cannot be read ({type(error).__name__}: {error})") from error
