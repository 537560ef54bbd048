"""xatlas as a program of its own, which can be ended at any time and whose crash ends nothing else.

Imports numpy and xatlas only, so that such a process starts in a fraction of a second.
"""

from __future__ import annotations

import io
import math
import signal
import sys

import numpy as np
import xatlas

SIGNAL_DELAY = 5  # seconds after its limit at which a process that nobody ended ends itself


def run_xatlas(vertices: np.ndarray, faces: np.ndarray, max_chart_area: float, resolution: int, padding: int):
    """Texture coordinates (T, 2) float32 in [0, 1] of the atlas' width and height, faces (F, 3) into them, and that size in texels.

    Args:
        vertices: (V, 3) float32. faces: (F, 3).
        max_chart_area: in units of the surface.
        resolution, padding: texels. xatlas treats the first as a wish.
    Raises:
        RuntimeError: xatlas refuses the mesh.
    """
    charts = xatlas.ChartOptions()
    charts.max_chart_area = max_chart_area
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding = resolution, padding
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices, faces.astype(np.uint32))
    atlas.generate(charts, packing)
    _, uv_faces, uvs = atlas.get_mesh(0)
    return uvs, uv_faces, (atlas.width, atlas.height)


def main() -> None:
    """An .npz of the arguments and `seconds`, the limit, from standard input; one of the results, or of the `error`, to standard output."""
    given = np.load(io.BytesIO(sys.stdin.buffer.read()))
    seconds = float(given["seconds"])
    if hasattr(signal, "alarm") and seconds < 2**30:
        # Nobody may be left to end this process. xatlas holds the interpreter's lock, so a thread could not watch over that; the default
        # action of this signal ends the process even then.
        signal.alarm(math.ceil(seconds) + SIGNAL_DELAY)
    try:
        uvs, uv_faces, size = run_xatlas(
            given["vertices"], given["faces"], float(given["max_chart_area"]), int(given["resolution"]), int(given["padding"])
        )
        results = {"uvs": uvs, "uv_faces": uv_faces, "size": np.array(size)}
    except RuntimeError as error:
        results = {"error": np.array(str(error))}
    packed = io.BytesIO()
    np.savez(packed, **results)
    sys.stdout.buffer.write(packed.getbuffer())


if __name__ == "__main__":
    main()
