"""Baking: the values of a surface's maps for every texel of a texture."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..scene.mesh import TriangleMesh, linear_to_srgb, srgb_to_linear
from ..scene.raster import make_rasterizer
from .atlas import UVAtlas, uv_areas, uv_to_clip
from .files import ExportError
from .tangents import to_tangent_space, vertex_tangents

# (points (N, 3), unit normals (N, 3)), both in the mesh's stored frame and on its device -> the maps there by name, see `CHANNELS`.
MapsFn = Callable[[Tensor, Tensor], dict[str, Tensor]]

# The maps a surface can have: "base_color" (N, 3) display RGB in [0, 1], always; "occlusion", "roughness", "metallic" (N, 1) linear in
# [0, 1]; "normal" (N, 3), the unit shading normal in the stored frame.
CHANNELS = {"base_color": 3, "occlusion": 1, "roughness": 1, "metallic": 1, "normal": 3}

BAND_ROWS = 1024  # rows of the texture that are rasterised at once; bounds the memory
FILL_CHUNK = 2**20  # texels filled at once; bounds the memory


@torch.no_grad()
def bake(
    mesh: TriangleMesh,
    atlas: UVAtlas,
    maps_fn: MapsFn,
    resolution: int = 2048,
    *,
    samples: int = 4,
    chunk: int = 2**16,
    progress: Callable[[float], None] | None = None,
) -> dict[str, np.ndarray]:
    """Evaluate a surface's maps at the surface point of every texel; texels without one take the nearest that has. A face too small
    for the texels' centres has the texel around its middle, if nothing else has.

    Filling all of them, not only a rim, keeps every bilinear or mip-mapped lookup at a seam free of foreign values. Base colours are
    averaged in linear light. Normals are averaged in tangent space (see `tangents`), each sample in its own frame, as a viewer's lookup
    averages texels: a normal that is the surface's own is (0, 0, 1) at creases and rims too.

    Args:
        samples: points per texel, a square number, averaged.
        chunk: points per call of maps_fn.
        progress: called with the share done, in (0, 1].
    Returns:
        the maps that maps_fn gives, each (resolution, resolution, C) float32, row 0 is v = 1: "base_color" display RGB in [0, 1];
        "occlusion", "roughness", "metallic" in [0, 1]; "normal" unit vectors in tangent space, OpenGL's (+y is up in the picture).
    Raises:
        ExportError: no texel's centre lies in any face, an argument is out of range, or maps_fn gives something else than maps.
    """
    side = samples_a_side(resolution, samples)
    if len(mesh.faces) == 0:
        raise ExportError("bake: the mesh has no faces, wanted at least one triangle")
    device = mesh.vertices.device
    rasterizer = make_rasterizer("cpu")  # exact, everywhere, and a fraction of the time the maps take
    uv_faces = torch.from_numpy(np.ascontiguousarray(atlas.uv_faces))
    faces = mesh.faces.cpu()
    surface = torch.cat([mesh.vertices.detach(), mesh.vertex_normals()], dim=1).float().cpu()
    frames = None  # (N, 9) tangent, bitangent and normal of split vertices, and faces into them

    maps: dict[str, np.ndarray] = {}
    count = np.zeros(resolution * resolution, np.uint16)
    bad: dict[str, int] = {}

    def add(rast: Tensor, places: np.ndarray) -> None:
        """One sample in each of the texels `places` (N,), which differ, of the points (N, 4) that a rasterisation saw there."""
        nonlocal maps, frames
        here = rast.view(1, 1, -1, 4)
        points, normals = rasterizer.interpolate(surface, here, faces).view(-1, 6).to(device).split(3, dim=1)
        found = checked_maps(maps_fn(points.contiguous(), _unit(normals)), len(points))
        if not maps:
            maps = {name: np.zeros((resolution * resolution, CHANNELS[name]), np.float32) for name in found}
        if found.keys() != maps.keys():
            raise ExportError(f"maps_fn: found {', '.join(found)} after {', '.join(maps)}, wanted the same maps for all points")
        for name, values in found.items():
            bad[name] = bad.get(name, 0) + int((~values.isfinite().all(dim=1)).sum())
        if "normal" in found:
            frames = frames or _tangent_frames(mesh, atlas)
            frame = rasterizer.interpolate(frames[0], here, frames[1]).view(-1, 9)
            tangent, bitangent, normal = frame.split(3, dim=1)
            found["normal"] = to_tangent_space(found["normal"], normal, tangent, bitangent)
        count[places] += 1
        for name, values in found.items():
            array = srgb_to_linear(values.numpy().clip(0, 1)) if name == "base_color" else values.numpy()
            # A running mean, and no sum: equal values stay what they are, to the last bit.
            mean = maps[name][places]
            maps[name][places] = mean + (array - mean) / count[places, None]

    bands = range(0, resolution, BAND_ROWS)
    drawn = torch.zeros(len(faces), dtype=torch.bool)
    for number, sample in ((number, sample) for number in range(len(bands)) for sample in range(samples)):
        top, height = bands[number], min(BAND_ROWS, resolution - bands[number])
        offset = ((sample % side + 0.5) / side - 0.5, (sample // side + 0.5) / side - 0.5)
        # Both windings are drawn: half of the charts of an atlas are mirrored.
        clip = uv_to_clip(atlas.uvs, resolution, offset)
        clip[..., 1] = (clip[..., 1] + 1) * (resolution / height) - (1 + 2 * top / height)  # these rows alone fill the picture
        rast = rasterizer.rasterize(clip, uv_faces, height, resolution).view(-1, 4)
        covered = (rast[:, 3] > 0).nonzero()[:, 0]
        drawn[rast[covered, 3].long() - 1] = True
        for start in range(0, len(covered), chunk):
            texels = covered[start : start + chunk]
            add(rast[texels], texels.numpy() + top * resolution)
            if progress is not None:
                progress((number * samples + sample + (start + len(texels)) / len(covered)) / (len(bands) * samples))
    # A chart between the texels' centres would otherwise be filled with its neighbour's values.
    small = ~drawn.numpy() & (uv_areas(atlas.uvs, atlas.uv_faces) != 0)
    missed, places = _own_texels(atlas, small, count)
    for start in range(0, len(missed), chunk):
        rows = slice(start, start + chunk)
        middle = torch.tensor([1 / 3, 1 / 3, 0, 0]).repeat(len(missed[rows]), 1)
        middle[:, 3] = torch.from_numpy(missed[rows] + 1)
        add(middle, places[rows])
    for name, texels in bad.items():
        if texels:
            raise ExportError(f"maps_fn {name}: found NaN or infinity at {texels} of {int(count.sum())} points, wanted finite values")
    if not maps:
        raise ExportError("bake: no texel lies in any face, wanted texture coordinates with an area or a higher resolution")
    if progress is not None:
        progress(1.0)

    for start in range(0, len(count), chunk):
        rows = slice(start, start + chunk)
        maps["base_color"][rows] = linear_to_srgb(maps["base_color"][rows])
        if "normal" in maps:
            maps["normal"][rows] = _unit(torch.from_numpy(maps["normal"][rows])).numpy()
    shaped = {name: values.reshape(resolution, resolution, -1) for name, values in maps.items()}
    fill_nearest(list(shaped.values()), count.reshape(resolution, resolution) > 0)
    return shaped


def samples_a_side(resolution: int, samples: int) -> int:
    """The square root of `samples`; ExportError if it is no whole number, or for a resolution below 1."""
    side = math.isqrt(max(samples, 0))
    if samples < 1 or side * side != samples:
        raise ExportError(f"bake samples: found {samples}, wanted a square number such as 1, 4 or 9")
    if resolution < 1:
        raise ExportError(f"bake resolution: found {resolution}, wanted at least 1")
    return side


def checked_maps(found: dict[str, Tensor], points: int) -> dict[str, Tensor]:
    """What maps_fn gave for so many points, float32 on the CPU; ExportError if these are not maps of theirs."""
    if not isinstance(found, dict) or "base_color" not in found:
        names = ", ".join(found) or "none" if isinstance(found, dict) else type(found).__name__
        raise ExportError(f"maps_fn: found {names}, wanted a dict of maps with 'base_color' among them")
    for name, values in found.items():
        if name not in CHANNELS:
            raise ExportError(f"maps_fn: found a map {name!r}, wanted some of {', '.join(CHANNELS)}")
        if tuple(values.shape) != (points, CHANNELS[name]):
            raise ExportError(f"maps_fn {name}: found shape {tuple(values.shape)} at {points} points, wanted ({points}, {CHANNELS[name]})")
    return {name: values.detach().float().cpu() for name, values in found.items()}


def fill_nearest(textures: list[np.ndarray], covered: np.ndarray) -> None:
    """In contiguous textures (H, W, C), replace every texel that is not covered (H, W) bool by the nearest covered one, in place.

    Raises ExportError if none is covered.
    """
    from scipy.ndimage import distance_transform_edt

    if not covered.any():
        raise ExportError("bake: no texel lies in any face, wanted texture coordinates with an area or a higher resolution")
    rows, columns = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    empty = np.flatnonzero(~covered)
    for start in range(0, len(empty), FILL_CHUNK):
        to = empty[start : start + FILL_CHUNK]
        source = rows.ravel()[to].astype(np.int64) * covered.shape[1] + columns.ravel()[to]
        for texture in textures:
            texels = texture.reshape(-1, texture.shape[-1])
            texels[to] = texels[source]


def _own_texels(atlas: UVAtlas, missed: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the faces `missed` (F,) bool those whose middle lies in a texel (R * R,) that has no sample, and that texel; one face a texel."""
    faces, side = np.flatnonzero(missed), math.isqrt(len(count))
    middle = atlas.uvs[atlas.uv_faces[faces]].mean(axis=1)
    column, row = (np.floor(value * side).clip(0, side - 1).astype(np.int64) for value in (middle[:, 0], 1 - middle[:, 1]))
    places, first = np.unique(row * side + column, return_index=True)
    free = count[places] == 0
    return faces[first[free]], places[free]


def _tangent_frames(mesh: TriangleMesh, atlas: UVAtlas) -> tuple[Tensor, Tensor]:
    vertices, normals = mesh.vertices.detach().cpu().numpy(), mesh.vertex_normals().cpu().numpy()
    vertex, _, faces, tangents = vertex_tangents(vertices, mesh.faces.cpu().numpy(), normals, atlas.uvs, atlas.uv_faces)
    normal = normals[vertex].astype(np.float32)
    bitangents = np.cross(normal, tangents[:, :3]) * tangents[:, 3:]
    return torch.from_numpy(np.concatenate([tangents[:, :3], bitangents, normal], axis=1)), torch.from_numpy(faces)


def _unit(vectors: Tensor) -> Tensor:
    """Of unit length; +z where they have none, as `TriangleMesh.vertex_normals`."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-6, vectors / length.clamp(min=1e-12), vectors.new_tensor([0.0, 0.0, 1.0]))
