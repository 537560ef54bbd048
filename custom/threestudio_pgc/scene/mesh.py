"""Triangle meshes: reading any file trimesh reads, into our frame and back into the user's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .adjacency import face_adjacency

MAX_FACES = 1_000_000
BUILTIN_PREFIX = "builtin:"
BUILTIN_DIRECTORY = Path(__file__).resolve().parent.parent / "assets" / "meshes"
Y_UP_SUFFIXES = (".glb", ".gltf")  # glTF fixes y as up; for other formats z is the likelier guess
LINEAR_COLOR_SUFFIXES = Y_UP_SUFFIXES  # glTF's factors and vertex colours are linear light; its pictures are display RGB, as all are

# Stored = Y_UP_TO_Z_UP @ file. A cyclic exchange of axes, hence a rotation: y becomes up, and z, the front of a glTF model, becomes +x,
# which is what the camera at azimuth 0 sees as the front.
Y_UP_TO_Z_UP = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
# What a glTF file's nodes do to a mesh whose own up is z, Blender's and our exporter's too. Such a mesh is read as its own file would be.
Z_UP_NODE = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])


class MeshError(ValueError):
    """A mesh cannot be used; the message names the file, what was found and what is wanted."""


@dataclass(frozen=True)
class Similarity:
    """user = scale * rotation @ stored + offset, in float64."""

    rotation: np.ndarray = field(default_factory=lambda: np.eye(3))  # (3, 3), determinant +1
    scale: float = 1.0
    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))  # (3,)

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Stored points (N, 3) in the user's frame."""
        return self.scale * np.asarray(points, np.float64) @ self.rotation.T + self.offset

    def invert(self, points: np.ndarray) -> np.ndarray:
        """The user's points (N, 3) in the stored frame."""
        return (np.asarray(points, np.float64) - self.offset) @ self.rotation / self.scale

    def rotate(self, directions: np.ndarray) -> np.ndarray:
        """Stored directions, such as normals (N, 3), in the user's frame."""
        return np.asarray(directions, np.float64) @ self.rotation.T


@dataclass(frozen=True)
class FaceColors:
    """What a file paints its faces with.

    The colour of a point is that of its face's corners, interpolated; a picture is multiplied by it, in linear light as in glTF.
    """

    corners: np.ndarray  # (F, 3, 3) float32 display RGB in [0, 1]; NaN for a face that the file gives no colour
    pictures: list[Any]  # PIL images, decoded when they are asked for; row 0 is v = 1, and they repeat
    face_picture: np.ndarray  # (F,) int32 into `pictures`; -1 where there is none
    corner_uvs: np.ndarray  # (F, 3, 2) float32; of no meaning where there is no picture

    def select(self, keep: np.ndarray) -> FaceColors:
        """Those of the faces in `keep`, indices or bool (F,)."""
        return replace(self, corners=self.corners[keep], face_picture=self.face_picture[keep], corner_uvs=self.corner_uvs[keep])


def srgb_to_linear(colors: np.ndarray) -> np.ndarray:
    """Display RGB in [0, 1] as linear light (IEC 61966-2-1)."""
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(colors: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] as display RGB (IEC 61966-2-1)."""
    return np.where(colors <= 0.0031308, 12.92 * colors, 1.055 * np.maximum(colors, 0.0031308) ** (1 / 2.4) - 0.055)


@dataclass
class TriangleMesh:
    """A triangle mesh in the stored frame: right-handed, z up. Faces are counter-clockwise seen from outside."""

    vertices: Tensor  # (V, 3) float32, each position once: texture seams do not split them
    faces: Tensor  # (F, 3) int64 into vertices
    uvs: Tensor | None = None  # (T, 2) float32, v = 1 is row 0 of the texture (OBJ)
    uv_faces: Tensor | None = None  # (F, 3) int64 into uvs
    vertex_colors: Tensor | None = None  # (V, 3) float32 in [0, 1]
    face_colors: FaceColors | None = None  # what the file paints its faces with, if anything; see mesh_colors.surface_colors
    adjacency: Tensor | None = None  # (F, 3) int32 where the maker of the mesh knows it; read it through `face_adjacency`
    frame: Similarity = field(default_factory=Similarity)  # stored -> user's
    source_path: Path | None = None

    def __post_init__(self):
        self._normals: tuple[Tensor, int, Tensor, Tensor] | None = None  # vertices, their version, faces, normals
        self._adjacency = (self.faces, self.adjacency)

    def vertex_normals(self) -> Tensor:
        """Unit outward normals (V, 3), the area-weighted mean of the adjoining faces'; +z where faces cancel out. Differentiable.

        Kept until `vertices` is replaced or written to. Not kept while a gradient is asked for, since a graph serves one backward, nor
        in inference mode, whose tensors training could not use.
        """
        keep = not (self.vertices.requires_grad and torch.is_grad_enabled())
        keep = keep and not torch.is_inference_mode_enabled() and not self.vertices.is_inference()
        if keep and self._normals is not None:
            vertices, version, faces, normals = self._normals
            if vertices is self.vertices and version == vertices._version and faces is self.faces:
                return normals
        corners = self.vertices[self.faces]
        doubled_area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        summed = torch.zeros_like(self.vertices)
        for corner in range(3):
            summed = summed.index_add(0, self.faces[:, corner], doubled_area)
        lengths = summed.norm(dim=-1, keepdim=True)
        up = summed.new_tensor([0.0, 0.0, 1.0])
        # the inner `where` keeps the unused branch from dividing by zero, which would make the gradient NaN
        normals = torch.where(lengths > 0, summed / torch.where(lengths > 0, lengths, torch.ones_like(lengths)), up)
        if keep:
            self._normals = (self.vertices, self.vertices._version, self.faces, normals)
        return normals

    def face_adjacency(self) -> Tensor:
        """`adjacency.face_adjacency` of the faces, (F, 3) int32: as given, or computed once and kept until `faces` is replaced."""
        faces, adjacency = self._adjacency
        if adjacency is None or faces is not self.faces:
            adjacency = face_adjacency(self.faces)
            self._adjacency = (self.faces, adjacency)
        return adjacency

    def face_normals(self) -> Tensor:
        """Unit outward normals (F, 3); zero for a face without area."""
        corners = self.vertices[self.faces]
        crossed = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        return F.normalize(crossed, dim=-1, eps=torch.finfo(crossed.dtype).tiny)

    def to(self, device: str | torch.device) -> TriangleMesh:
        tensors = ("vertices", "faces", "uvs", "uv_faces", "vertex_colors", "adjacency")
        present = {name: getattr(self, name) for name in tensors if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in present.items()})

    def user_vertices(self) -> np.ndarray:
        """Vertices (V, 3) float64 in the user's own frame."""
        return self.frame.apply(self.vertices.detach().cpu().numpy())


def _builtin_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(BUILTIN_DIRECTORY.glob("*")) if path.suffix in (".ply", ".obj")}


def builtin_mesh_names() -> list[str]:
    return list(_builtin_files())


def builtin_mesh_path(name: str) -> Path:
    """File of a bundled mesh. Raises MeshError for an unknown name, listing the known ones."""
    files = _builtin_files()
    if name not in files:
        raise MeshError(f"{BUILTIN_PREFIX}{name}: no such bundled mesh; there are {', '.join(files) or 'none'}")
    return files[name]


def load_mesh(path: str | Path, *, max_faces: int = MAX_FACES, up: str | None = None) -> TriangleMesh:
    """Read a mesh file, or a bundled one as "builtin:NAME".

    All parts of a scene are merged, polygons triangulated, and equal positions welded, so that texture seams and unshared corners do not
    break the shading; the texture coordinates keep an index buffer of their own. Faces keep their order.

    Args:
        max_faces: refuse more than this.
        up: "y" or "z", the axis that is up in the file; default: y for glTF, unless its nodes turn a z-up mesh upright, z for everything
            else. A y-up mesh is rotated, never mirrored; its `frame` leads back to the file's coordinates.

    Warns:
        UserWarning: degenerate faces were left out; texture coordinates were dropped because only some parts have them.

    Raises:
        MeshError: no such file; unreadable; no triangles; a point cloud; NaN or infinite vertices; no extent; over `max_faces`.
    """
    name = str(path)
    if name.startswith(BUILTIN_PREFIX):
        path = builtin_mesh_path(name.removeprefix(BUILTIN_PREFIX))
    path = Path(path).expanduser()
    if up not in (None, "y", "z"):
        raise MeshError(f"{name}: up is {up!r}; want 'y' or 'z'")
    positions, faces, uvs, colors, face_colors, z_up_node = _read(path, name)
    if up is None:
        up = "y" if path.suffix.lower() in Y_UP_SUFFIXES and not z_up_node else "z"
        positions = positions @ Z_UP_NODE if z_up_node else positions

    if len(faces) > max_faces:
        raise MeshError(
            f"{name}: {len(faces)} faces, at most {max_faces} are accepted; simplify the mesh (for example Blender's Decimate "
            f"modifier), or raise max_faces if memory allows"
        )
    used = np.unique(faces)
    if used[0] < 0 or used[-1] >= len(positions):
        raise MeshError(f"{name}: faces refer to vertices {used[0]}..{used[-1]}, but there are {len(positions)}")
    bad = ~np.isfinite(positions[used]).all(axis=1)
    if bad.any():
        raise MeshError(f"{name}: {bad.sum()} of {len(used)} vertices have NaN or infinite coordinates; want finite ones")
    low, high = positions[used].min(axis=0), positions[used].max(axis=0)
    extent = float((high - low).max())
    if not extent > 0 or not np.isfinite(extent):
        raise MeshError(f"{name}: all vertices lie at {low.tolist()}; want a mesh that has an extent")

    rotation = Y_UP_TO_Z_UP if up == "y" else np.eye(3)
    # float32 keeps 7 digits: georeferenced models far from the origin would lose their shape
    offset = (low + high) / 2 if np.abs(low + high).max() > 100 * extent else np.zeros(3)
    frame = Similarity(rotation.T, 1.0, offset)

    first, welded = _weld(positions, faces)
    stored = frame.invert(positions[first]).astype(np.float32)
    keep = _has_area(positions[first], welded)
    if not keep.any():
        raise MeshError(f"{name}: all {len(faces)} faces are degenerate (no area); want at least one triangle")
    if not keep.all():
        warnings.warn(f"{name}: left out {(~keep).sum()} of {len(faces)} faces, which have no area", stacklevel=2)
    mesh = TriangleMesh(torch.from_numpy(stored), torch.from_numpy(np.ascontiguousarray(welded[keep])), frame=frame, source_path=path)
    if uvs is not None:
        uv_used, uv_faces = np.unique(faces[keep], return_inverse=True)
        mesh.uvs = torch.from_numpy(np.ascontiguousarray(uvs[uv_used], np.float32))
        mesh.uv_faces = torch.from_numpy(uv_faces.reshape(-1, 3).astype(np.int64))
    if colors is not None:
        mesh.vertex_colors = torch.from_numpy(np.ascontiguousarray(colors[first], np.float32))
    if face_colors is not None:
        mesh.face_colors = face_colors.select(keep)
    return mesh


def normalize(mesh: TriangleMesh, extent: float = 0.8) -> TriangleMesh:
    """The mesh moved and scaled, never mirrored, so that its bounding box is centred and max |coordinate| = extent.

    `frame` is composed with the way back. Raises MeshError if the mesh has no extent.
    """
    vertices = mesh.vertices.detach().cpu().numpy().astype(np.float64)
    low, high = (vertices.min(axis=0), vertices.max(axis=0)) if len(vertices) else (np.zeros(3), np.zeros(3))
    half = float((high - low).max()) / 2
    if not half > 0 or not np.isfinite(half):
        raise MeshError(f"{mesh.source_path or 'mesh'}: bounding box {low.tolist()}..{high.tolist()}; want a finite extent")
    centre, shrink = (low + high) / 2, half / extent
    # user = s R (shrink v + centre) + o
    outer = mesh.frame
    frame = Similarity(outer.rotation, outer.scale * shrink, outer.scale * outer.rotation @ centre + outer.offset)
    moved = torch.from_numpy(((vertices - centre) / shrink).astype(np.float32)).to(mesh.vertices.device)
    return replace(mesh, vertices=moved, frame=frame)


def _read(path: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, FaceColors | None, bool]:
    """Positions (V, 3) float64, faces (F, 3), uvs (V, 2) or None, colours (V, 3) or None, colours by face or None, and whether the nodes
    of all parts turn them by Z_UP_NODE.

    All parts are merged, as the file has them.
    """
    if not path.exists():
        raise MeshError(f"{name}: no such file")
    if path.is_dir():
        raise MeshError(f"{name}: is a folder; want a mesh file such as .obj, .glb, .ply, .stl or .off")
    if path.stat().st_size == 0:
        raise MeshError(f"{name}: the file is empty")
    import trimesh

    try:
        scene = trimesh.load(str(path), force="scene", process=False)
    except Exception as error:  # every format of trimesh fails in its own way
        raise MeshError(f"{name}: cannot be read as a mesh ({type(error).__name__}: {error})") from error

    parts, other = [], set()
    for node in scene.graph.nodes_geometry:
        transform, geometry = scene.graph[node]
        part = scene.geometry[geometry]
        if not isinstance(part, trimesh.Trimesh):
            other.add(type(part).__name__)
        elif len(part.faces):
            parts.append((part, np.asarray(transform, np.float64)))
    if not parts:
        if other == {"PointCloud"}:
            raise MeshError(f"{name}: is a point cloud, without faces; want a triangle mesh")
        raise MeshError(f"{name}: has no faces{' (only ' + ', '.join(sorted(other)) + ')' if other else ''}; want a triangle mesh")

    positions, faces, uvs, colors, count, painted = [], [], [], [], 0, []
    for part, transform in parts:
        with np.errstate(invalid="ignore"):  # infinite vertices are reported by the caller
            positions.append(np.asarray(part.vertices, np.float64) @ transform[:3, :3].T + transform[:3, 3])
        part_faces = np.asarray(part.faces, np.int64)
        mirrored = np.linalg.det(transform[:3, :3]) < 0  # a mirroring node turns its faces inside out
        part_faces = part_faces[:, ::-1] if mirrored else part_faces
        faces.append(part_faces + count)
        uvs.append(_part_uvs(part))
        colors.append(_part_colors(part))
        painted.append(_part_face_colors(part, part_faces, linear=path.suffix.lower() in LINEAR_COLOR_SUFFIXES))
        count += len(part.vertices)
    if any(item is None for item in uvs):
        if any(item is not None for item in uvs):
            missing = sum(item is None for item in uvs)
            warnings.warn(f"{name}: {missing} of {len(uvs)} parts lack texture coordinates, so all are ignored", stacklevel=3)
        uvs = None
    if any(item is None for item in colors):
        colors = None
    merged_uvs = None if uvs is None else np.concatenate(uvs)
    merged_colors = None if colors is None else np.concatenate(colors)
    z_up_node = all(np.allclose(transform[:3, :3], Z_UP_NODE, atol=1e-6) for _, transform in parts)
    return np.concatenate(positions), np.concatenate(faces), merged_uvs, merged_colors, _merge_face_colors(painted), z_up_node


def _part_uvs(part) -> np.ndarray | None:
    """(V, 2) texture coordinates of a trimesh part, or None if it has none or they are not all finite."""
    uv = getattr(part.visual, "uv", None)
    if uv is None or np.shape(uv) != (len(part.vertices), 2) or not np.isfinite(uv).all():
        return None
    return np.asarray(uv, np.float64)


def _part_colors(part) -> np.ndarray | None:
    """(V, 3) vertex colours of a trimesh part in [0, 1], or None."""
    if part.visual.kind != "vertex":
        return None
    return np.asarray(part.visual.vertex_colors, np.float64)[:, :3] / 255.0


def _part_face_colors(part, faces: np.ndarray, *, linear: bool) -> tuple[np.ndarray, np.ndarray | None, Any]:
    """Colours and texture coordinates (or None) at the corners of a trimesh part's faces (F, 3), and its picture (or None).

    linear: the file's colours, other than pictures, are linear light.
    """
    display = linear_to_srgb if linear else np.asarray
    visual, blank = part.visual, np.full((len(faces), 3, 3), np.nan, np.float32)
    if visual.kind == "vertex":
        return display(_part_colors(part))[faces], None, None
    if visual.kind == "face":
        return display(np.asarray(visual.face_colors, np.float64)[:, None, :3] / 255).repeat(3, axis=1), None, None
    if visual.kind != "texture":
        return blank, None, None
    picture, factor = _material(visual.material)
    uv = _part_uvs(part)
    picture = None if uv is None else picture
    at_vertices = visual.vertex_attributes.get("color")  # a glTF part may have these beside its material
    if picture is None and factor is None and at_vertices is None:
        return blank, None, None
    color = np.ones((len(part.vertices), 3)) if factor is None else np.tile(factor, (len(part.vertices), 1))
    if at_vertices is not None:
        scale = np.iinfo(at_vertices.dtype).max if at_vertices.dtype.kind in "iu" else 1
        color = color * np.clip(np.asarray(at_vertices[:, :3], np.float64) / scale, 0, 1)
    return display(color)[faces], None if picture is None else uv[faces], picture


def _material(material) -> tuple[Any, np.ndarray | None]:
    """Picture (PIL) and factor (3,) in [0, 1] of a trimesh material, None where the file gives none."""
    from trimesh.visual.material import PBRMaterial, SimpleMaterial, empty_material

    if isinstance(material, PBRMaterial):
        factor = material.baseColorFactor
        return material.baseColorTexture, None if factor is None else np.asarray(factor, np.float64)[:3] / 255
    if not isinstance(material, SimpleMaterial):
        return None, None
    empty = empty_material()  # trimesh's stand-in where a file has texture coordinates and no material
    if material.image is not None and material.image.size == empty.image.size and material.image.tobytes() == empty.image.tobytes():
        return None, None
    if material.image is not None:
        return material.image, None  # exporters write any diffuse colour next to a picture, often black
    given = "kd" in material.kwargs or not np.array_equal(material.diffuse, empty.diffuse)
    return None, np.asarray(material.diffuse, np.float64)[:3] / 255 if given else None


def _merge_face_colors(parts: list[tuple[np.ndarray, np.ndarray | None, Any]]) -> FaceColors | None:
    """The colours of all parts as `_part_face_colors` gives them; None if no part has any."""
    corners = np.concatenate([corners for corners, _, _ in parts]).astype(np.float32)
    if np.isnan(corners).all():
        return None
    pictures, face_picture, uvs = [], [], []
    for part_corners, part_uvs, picture in parts:
        number = -1
        if picture is not None:
            known = [index for index, other in enumerate(pictures) if other is picture]
            number = known[0] if known else len(pictures)
            pictures += [] if known else [picture]
        face_picture.append(np.full(len(part_corners), number, np.int32))
        uvs.append(np.zeros((len(part_corners), 3, 2)) if part_uvs is None else part_uvs)
    return FaceColors(corners, pictures, np.concatenate(face_picture), np.concatenate(uvs).astype(np.float32))


def _weld(positions: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge equal positions and drop unused ones.

    Returns:
        first: (N,) for each welded vertex, the index of its first occurrence in `positions`, ascending.
        welded: (F, 3) faces into the welded vertices.
    """
    used, compact = np.unique(faces, return_inverse=True)
    # + 0.0 turns -0.0 into 0.0, which would otherwise differ as bytes
    rows = np.ascontiguousarray(positions[used] + 0.0).view(np.dtype((np.void, 3 * positions.itemsize))).ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return used[first[order]], rank[inverse][compact].reshape(-1, 3).astype(np.int64)


def _has_area(positions: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(F,) bool: the corners differ and do not lie on one line, up to the precision of float32 files."""
    corners = positions[faces]
    edges = corners - np.roll(corners, 1, axis=1)
    longest = np.square(edges).sum(axis=-1).max(axis=-1)
    doubled_area = np.linalg.norm(np.cross(edges[:, 1], edges[:, 2]), axis=-1)
    return doubled_area > 1e-12 * longest


def sample_surface(mesh: TriangleMesh, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Points spread evenly over the surface.

    Args:
        generator: on the CPU, so that every device draws the same points.
    Returns:
        points: (count, 3) float32.
        faces: (count,) int64, the face that each lies in.
        weights: (count, 3) float32, its barycentric coordinates there.
    """
    corners = mesh.vertices.detach().cpu()[mesh.faces.cpu()]
    edges = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    ends = torch.linalg.cross(*edges).norm(dim=1).double().cumsum(0)
    faces = torch.searchsorted(ends, torch.rand(count, generator=generator, dtype=torch.float64) * ends[-1], right=True)
    faces = faces.clamp(max=len(ends) - 1)
    u, v = torch.rand(2, count, generator=generator)
    root = u.sqrt()  # without the root, points would crowd at the first corner
    weights = torch.stack([1 - root, root * (1 - v), root * v], dim=1)
    points = (corners[faces] * weights[:, :, None]).sum(dim=1)
    device = mesh.vertices.device
    return points.to(device), faces.to(device), weights.to(device)
