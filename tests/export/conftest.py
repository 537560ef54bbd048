import contextlib
import resource

import numpy as np
import pytest
import torch

from threestudio_pgc.scene.mesh import TriangleMesh, load_mesh, normalize


def textured_box() -> TriangleMesh:
    """A box of edge 1.6 whose sides lie in a 3 x 2 grid of the texture, a little apart."""
    vertices, faces, uvs = [], [], []
    for side in range(6):
        axis, sign = side % 3, 1 if side < 3 else -1
        first, second = ((axis + 1) % 3, (axis + 2) % 3)[::sign]
        for a, b in ((0, 0), (1, 0), (1, 1), (0, 1)):
            corner = np.zeros(3)
            corner[axis], corner[first], corner[second] = 0.8 * sign, 1.6 * a - 0.8, 1.6 * b - 0.8
            vertices.append(corner)
            uvs.append([(side % 3 + 0.05 + 0.9 * a) / 3, (side // 3 + 0.05 + 0.9 * b) / 2])
        faces += [[4 * side, 4 * side + 1, 4 * side + 2], [4 * side, 4 * side + 2, 4 * side + 3]]
    uv_faces = np.array(faces)
    vertices, inverse = np.unique(np.array(vertices), axis=0, return_inverse=True)
    return TriangleMesh(
        torch.tensor(vertices, dtype=torch.float32),
        torch.tensor(inverse.reshape(-1)[uv_faces]),
        uvs=torch.tensor(uvs, dtype=torch.float32),
        uv_faces=torch.tensor(uv_faces),
    )


@pytest.fixture
def box():
    return textured_box()


@pytest.fixture
def bare_sphere(tmp_path):
    """A sphere without texture coordinates, 320 faces, as a user's file: 30 units large, far off, read and normalised."""
    import trimesh

    sphere = trimesh.creation.icosphere(subdivisions=2, radius=15)
    sphere.apply_translation([100, -20, 7])
    path = tmp_path / "input" / "sphere.ply"
    path.parent.mkdir()
    sphere.export(path)
    return normalize(load_mesh(path))


def position_color(points):
    """A colour per point in [-1, 1]^3 that no symmetry of the cube keeps."""
    x, y, z = points.unbind(-1)
    return torch.stack([0.5 + 0.4 * x, 0.5 + 0.2 * y + 0.2 * z, 0.4 + 0.3 * z - 0.05 * x], -1)


def position_maps(points, normals):
    """An asset with a base colour alone."""
    return {"base_color": position_color(points)}


def pbr_maps(points, normals):
    """All the maps, smooth in the position, of points in [-1, 1]^3; the normals lean by up to half a radian off the surface's."""
    x, y, z = points.unbind(-1)
    leaning = normals + 0.5 * torch.stack([torch.sin(3 * y), torch.sin(3 * z), torch.sin(3 * x)], dim=-1) / 3**0.5
    return {
        "base_color": position_color(points),
        "occlusion": (0.7 + 0.3 * z)[:, None],
        "roughness": (0.5 + 0.4 * x)[:, None],
        "metallic": (0.4 - 0.4 * y)[:, None],
        "normal": torch.nn.functional.normalize(leaning, dim=-1),
    }


@pytest.fixture
def maps_fn():
    return position_maps


@pytest.fixture
def limit_file_size():
    """Context in which writing beyond so many bytes fails in the kernel, as on a full disk.

    A context and not the whole test: the test runner's own output may go to a file, which the limit would hit as well.
    """

    @contextlib.contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
