"""Texture coordinates: the user's where they can hold a texture, else charts from xatlas, or projections where that takes too long."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..scene.mesh import TriangleMesh
from ..scene.raster import make_rasterizer
from .atlas import UVAtlas, uv_areas, uv_to_clip
from .box_projection import box_projection
from .files import ExportError

OUTSIDE_LIMIT = 1e-4  # how far beyond [0, 1] rounding may put a coordinate
OVERLAP_LIMIT = 0.02  # share of the UV area that may be covered twice
COLLAPSED_LIMIT = 0.01  # share of the surface that may have (almost) no texture
COLLAPSED_DENSITY = 1e-3  # "almost none": this fraction of the mean UV area per surface area
COVERAGE_LIMIT = 0.01  # least share of the texture in use
OVERLAP_RESOLUTION = 1024
PACKING_RESOLUTION = 1024
CHARTS_PER_SURFACE = 100
POLL_SECONDS = 0.1
WORKER = Path(__file__).with_name("xatlas_worker.py")


def usable_uvs(mesh: TriangleMesh) -> tuple[bool, str]:
    """Whether the mesh's own texture coordinates give every part of the surface texels of its own.

    Returns:
        (True, "") or (False, why not).
    """
    if mesh.uvs is None or mesh.uv_faces is None:
        return False, "the mesh has no texture coordinates"
    uvs, uv_faces = mesh.uvs.detach().cpu().numpy(), mesh.uv_faces.cpu().numpy()
    if uv_faces.shape != tuple(mesh.faces.shape):
        return False, f"{len(uv_faces)} faces have texture coordinates, {len(mesh.faces)} faces exist"
    if len(uv_faces) == 0:
        return False, "the mesh has no faces"
    if uv_faces.min() < 0 or uv_faces.max() >= len(uvs):
        return False, f"faces refer to texture coordinates {uv_faces.min()}..{uv_faces.max()}, but there are {len(uvs)}"
    used = uvs[np.unique(uv_faces)].astype(np.float64)
    if not np.isfinite(used).all():
        return False, "texture coordinates are NaN or infinite"
    low, high = used.min(axis=0), used.max(axis=0)
    if (low < -OUTSIDE_LIMIT).any() or (high > 1 + OUTSIDE_LIMIT).any():
        return False, f"texture coordinates reach from {low.round(3).tolist()} to {high.round(3).tolist()}, beyond [0, 1]"

    areas, surface = np.abs(uv_areas(uvs, uv_faces)), _surface_areas(mesh)
    total, total_surface = areas.sum(), surface.sum()
    if total < COVERAGE_LIMIT:
        return False, f"texture coordinates use {total:.2%} of the texture"
    collapsed = surface[areas * total_surface < COLLAPSED_DENSITY * total * surface].sum() / total_surface
    if collapsed > COLLAPSED_LIMIT:
        return False, f"{collapsed:.1%} of the surface has no area in the texture"
    overlap = 1 - _covered_area(uvs, uv_faces) / total
    if overlap > OVERLAP_LIMIT:
        return False, f"{overlap:.1%} of the texture coordinates lie over others"
    return True, ""


def unwrap(
    mesh: TriangleMesh,
    *,
    padding: int = 2,
    resolution: int = 2048,
    time_limit: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> UVAtlas:
    """Cut the surface into charts with xatlas and pack them into the unit square; with `box_projection` where xatlas fails.

    Charts are kept below 1/100 of the surface: ten times faster than xatlas' defaults on dense meshes, and less stretched.

    xatlas cannot be interrupted, crashes on some meshes (two triangles can be enough), and lays parts of finely divided cylinders and
    cones over each other. So it runs in a process of its own, which takes half a second to start and ends at the limit, and what it
    finds is judged by `usable_uvs`.

    Args:
        padding: texels kept free between charts, at least, in a texture of `resolution`.
        time_limit: seconds for xatlas, None for as long as it takes.
        progress: called with the share of the time limit that has passed, since xatlas does not tell how far it is; with 1 at the end.
    Warns:
        UserWarning: xatlas was ended at the limit, crashed, or found nothing usable, so that coordinates are those of `box_projection`.
    Raises:
        ExportError: the mesh has no faces or no area, or `time_limit` is not above 0.
    """
    if time_limit is not None and not time_limit > 0:
        raise ExportError(f"unwrap time_limit: found {time_limit}, wanted seconds above 0, or None for no limit")
    if len(mesh.faces) == 0:
        raise ExportError("unwrap: the mesh has no faces, wanted at least one triangle")
    vertices, faces = mesh.vertices.detach().cpu().numpy().astype(np.float32), mesh.faces.cpu().numpy()
    area = float(_surface_areas(mesh).sum())
    if not (area > 0 and np.isfinite(area)):
        raise ExportError(f"unwrap: the mesh has a surface of {area}, wanted a positive finite one")
    # Packing takes long at full resolution, and the charts' borders are the same at half of it.
    packing_resolution = min(resolution, PACKING_RESOLUTION)
    # xatlas treats the resolution as a wish: the atlas comes out up to 1.4 times as large, which shrinks the padding
    packing_padding = int(np.ceil(1.5 * padding * packing_resolution / resolution))
    arguments = vertices, faces, area / CHARTS_PER_SURFACE, packing_resolution, packing_padding
    try:
        uvs, uv_faces, size = _run_xatlas(*arguments, time_limit, progress)
        # Atlases are seldom square; one scale for both axes keeps the texels on the surface square.
        uvs = (uvs * (size / size.max())).clip(0, 1).astype(np.float32)
        atlas = UVAtlas(uvs, _with_left_out(vertices, faces, uvs, uv_faces.astype(np.int64)), "xatlas")
        usable, reason = usable_uvs(replace(mesh, uvs=torch.from_numpy(atlas.uvs), uv_faces=torch.from_numpy(atlas.uv_faces)))
        if not usable:
            raise _NoAtlas(f"xatlas found nothing usable ({reason})")
    except _NoAtlas as failure:
        warnings.warn(f"unwrap: {failure}; texture coordinates are projections along the axes instead, with more seams", stacklevel=2)
        atlas = box_projection(mesh, padding, resolution)
    if progress is not None:
        progress(1.0)
    return atlas


def atlas_for(
    mesh: TriangleMesh,
    *,
    resolution: int = 2048,
    time_limit: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[UVAtlas, str]:
    """The user's texture coordinates where usable, else new ones; and why they were not usable ("" where they were).

    `time_limit`, `progress`, warnings and errors are those of `unwrap`.
    """
    usable, reason = usable_uvs(mesh)
    if usable:
        return UVAtlas(mesh.uvs.detach().cpu().numpy(), mesh.uv_faces.cpu().numpy(), "user"), ""
    return unwrap(mesh, resolution=resolution, time_limit=time_limit, progress=progress), reason


class _NoAtlas(Exception):
    """xatlas gave no usable atlas; says why."""


def _run_xatlas(
    vertices: np.ndarray,
    faces: np.ndarray,
    max_chart_area: float,
    resolution: int,
    padding: int,
    time_limit: float | None,
    progress: Callable[[float], None] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`xatlas_worker.run_xatlas` in a process of its own. Raises _NoAtlas if xatlas refuses, crashes or is ended at the limit."""
    limit = math.inf if time_limit is None else time_limit
    begun = time.monotonic()
    values = {"max_chart_area": max_chart_area, "resolution": resolution, "padding": padding, "seconds": limit}
    # Not through multiprocessing, which would run the caller's own program once more.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # A file and no pipe: `communicate` forgets what it has not yet written to one when its time is up.
    with tempfile.TemporaryFile() as packed:
        np.savez(packed, vertices=vertices, faces=faces, **values)
        packed.seek(0)
        pipes = {"stdin": packed, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, str(WORKER)], env=environment, **pipes)
    try:
        while True:
            passed = time.monotonic() - begun
            if passed >= limit:
                raise _NoAtlas(f"xatlas was not done with {len(faces)} faces after {limit:g} s")
            if progress is not None:
                progress(passed / limit)
            try:
                output, errors = process.communicate(timeout=min(POLL_SECONDS, limit - passed))
                break
            except subprocess.TimeoutExpired:
                pass
    finally:  # also where the user interrupts us
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            pipe.close()
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise _NoAtlas(f"xatlas ended with status {process.returncode} on {len(faces)} faces ({''.join(said) or 'no message'})")
    result = np.load(io.BytesIO(output))
    if "error" in result:
        raise _NoAtlas(f"xatlas refused {len(faces)} faces ({result['error']})")
    if result["uv_faces"].shape != faces.shape:
        raise _NoAtlas(f"xatlas returned {len(result['uv_faces'])} of {len(faces)} faces")
    return result["uvs"], result["uv_faces"], result["size"]


def _with_left_out(vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray, uv_faces: np.ndarray) -> np.ndarray:
    """Faces that xatlas takes for degenerate lie at the texture's corner, in whatever is there: each gets one texture coordinate of the
    nearest vertex of another face, and so its colour."""
    from scipy.spatial import cKDTree

    left_out = uv_areas(uvs, uv_faces) == 0
    if not left_out.any() or left_out.all():
        return uv_faces
    _, nearest = cKDTree(vertices[faces[~left_out]].reshape(-1, 3)).query(vertices[faces[left_out]].mean(axis=1))
    uv_faces[left_out] = uv_faces[~left_out].reshape(-1)[nearest, None]
    return uv_faces


def _surface_areas(mesh: TriangleMesh) -> np.ndarray:
    a, b, c = np.moveaxis(mesh.vertices.detach().cpu().numpy().astype(np.float64)[mesh.faces.cpu().numpy()], 1, 0)
    return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=-1)


def _covered_area(uvs: np.ndarray, uv_faces: np.ndarray) -> float:
    """Area of the unit square that lies under at least one face, by counting texels of the faces' bounding box."""
    used = uvs[np.unique(uv_faces)]
    low = used.min(axis=0)
    extent = used.max(axis=0) - low
    clip = uv_to_clip((uvs - low) / extent, OVERLAP_RESOLUTION)
    ids = make_rasterizer("cpu").rasterize(clip, torch.from_numpy(uv_faces), OVERLAP_RESOLUTION, OVERLAP_RESOLUTION)[..., 3]
    return float((ids > 0).float().mean()) * float(extent[0]) * float(extent[1])
