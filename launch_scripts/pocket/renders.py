"""The training set: pictures of textured shapes from the cameras distillation uses, with depth and normals, in seeded, resumable chunks."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "custom"))

from threestudio_pgc.diffusion.control import normal_control
from threestudio_pgc.scene.cameras import Cameras, fovy_from_focal, look_at_cameras
from threestudio_pgc.scene.gbuffer import GBuffer, render_gbuffer
from threestudio_pgc.scene.mesh import TriangleMesh, builtin_mesh_names, load_mesh, normalize
from threestudio_pgc.scene.raster import make_rasterizer

from .captions import plain_caption, sample_caption, sample_look, view_name
from .shapes import Shape, shapes
from .textures import Surface, paint

SIZE = 128
SUPERSAMPLE = 2
LOOKS_PER_VIEW = 4
VIEWS_PER_CHUNK = 32
CAPTIONS_PER_IMAGE = 4
CAPTIONS_PER_NORMAL_MAP = 8  # the first half name a look, which a normal map does not show, the others the shape alone
BUNDLED_EVERY = 4  # each fourth chunk shows the bundled meshes, which users will texture first
BUNDLED_WEIGHTS = {"bunny": 1.0, "teapot": 1.0, "vase": 0.4, "knot": 0.25, "lettered": 0.2}


def bundled_shapes() -> list[Shape]:
    """The bundled meshes named in `BUNDLED_WEIGHTS` that are present."""
    out = []
    for name in sorted(set(builtin_mesh_names()) & set(BUNDLED_WEIGHTS)):
        mesh = normalize(load_mesh(f"builtin:{name}"))
        out.append(Shape(name, mesh.vertices.numpy(), mesh.faces.numpy(), name == "vase", BUNDLED_WEIGHTS[name]))
    return out


@dataclass
class View:
    """Geometry of one view at SIZE * SUPERSAMPLE pixels, kept for the masked pixels only."""

    mask: np.ndarray  # (H, W) bool
    position: np.ndarray  # (N, 3)
    normal: np.ndarray  # (N, 3)
    facing: np.ndarray  # (N,) cosine between normal and the direction to the camera
    control: np.ndarray  # (SIZE, SIZE) float32: near 1, far end of the object 0.2, background 0
    normal_control: np.ndarray  # (SIZE, SIZE, 3) float32 in [0, 1]: `normal_control` in the convention "opengl"


def shrink(image: np.ndarray) -> np.ndarray:
    """Mean over SUPERSAMPLE x SUPERSAMPLE blocks of (H, W, ...)."""
    h, w = image.shape[:2]
    return image.reshape(h // SUPERSAMPLE, SUPERSAMPLE, w // SUPERSAMPLE, SUPERSAMPLE, *image.shape[2:]).mean((1, 3))


def sample_camera(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """(elevation, azimuth, distance, focal) in the ranges of distillation; mostly long focal lengths, which fill the frame."""
    focal = rng.uniform(0.95, 1.35) if rng.random() < 0.8 else rng.uniform(0.7, 0.95)
    return rng.uniform(-10, 45), rng.uniform(-180, 180), rng.uniform(2.0, 2.5), focal


@torch.no_grad()
def render_buffers(mesh: TriangleMesh, cameras: list[tuple[float, float, float, float]], backend) -> tuple[Cameras, GBuffer]:
    """Cameras and G-buffer, at SIZE * SUPERSAMPLE pixels, of some draws of `sample_camera`."""
    elevation, azimuth, distance, focal = (torch.tensor(values, dtype=torch.float32) for values in zip(*cameras))
    batch = look_at_cameras(elevation, azimuth, distance, fovy_from_focal(focal))
    return batch, render_gbuffer(mesh, batch, SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE, backend, silhouette="none")


def render_normal_maps(mesh: TriangleMesh, cameras: list[tuple[float, float, float, float]], backend) -> np.ndarray:
    """Pictures (N, SIZE, SIZE, 3) float32 in [0, 1] of the world-space normals n: (n + 1) / 2 on flat grey, 0.5.

    In world space a side's colour tells from where it is seen, which keeps a distilled shape from having several fronts. The silhouette is
    the mean of colour and grey: n is zero where the G-buffer is empty.
    """
    _, g = render_buffers(mesh, cameras, backend)
    return np.stack([shrink(normal) for normal in (0.5 + 0.5 * g.normal).numpy()])


def render_views(mesh: TriangleMesh, cameras: list[tuple[float, float, float, float]], backend) -> list[View]:
    batch, g = render_buffers(mesh, cameras, backend)
    normals = normal_control(g.view_normal, g.opacity, "opengl").numpy()
    out = []
    for k in range(len(cameras)):
        mask = g.mask[k].numpy()
        position, normal = g.position[k].numpy()[mask], g.normal[k].numpy()[mask]
        to_camera = batch.positions[k].numpy() - position
        facing = (normal * to_camera).sum(-1) / np.linalg.norm(to_camera, axis=-1)
        depth = g.depth[k, ..., 0].numpy()
        near, far = (depth[mask].min(), depth[mask].max()) if mask.any() else (0.0, 1.0)
        control = np.where(mask, 1.0 - 0.8 * (depth - near) / max(far - near, 1e-6), 0.0)
        out.append(View(mask, position, normal, facing, shrink(control).astype(np.float32), shrink(normals[k])))
    return out


def background(rng: np.random.Generator) -> np.ndarray:
    """(SIZE * SUPERSAMPLE)^2 x 3 flat or, one time in six, a gradient."""

    def color():
        return np.full(3, rng.uniform(0.0, 1.0)) if rng.random() < 0.65 else rng.uniform(0.0, 1.0, 3)

    side = SIZE * SUPERSAMPLE
    if rng.random() > 1 / 6:
        return np.broadcast_to(color(), (side, side, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    t = np.clip(0.5 + np.cos(angle) * x + np.sin(angle) * y, 0, 1)[..., None]
    return color() * (1 - t) + color() * t


def shade(view: View, albedo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Picture (SIZE, SIZE, 3) float in [0, 1]. Half of the pictures are bare albedo, as distillation renders; the rest is mildly lit."""
    if rng.random() < 0.5:
        color = albedo
    else:
        top = rng.uniform(0.0, 0.3)
        light = rng.uniform(0.72, 0.95) + rng.uniform(0.1, 0.35) * np.abs(view.facing) + top * (view.normal[:, 2] * 0.5)
        color = albedo * light[:, None]
    image = np.array(background(rng), dtype=np.float32)
    image[view.mask] = color
    return np.clip(shrink(image), 0, 1)


def draw_groups(rng: np.random.Generator, pool: list[Shape], views: int):
    """Yields (first, shape, mesh, cameras): shape and cameras of the views from `first` on, four views of one shape to share its set-up."""
    weights = np.array([shape.weight for shape in pool])
    for first in range(0, views, 4):
        shape = pool[int(rng.choice(len(pool), p=weights / weights.sum()))]
        mesh = TriangleMesh(torch.as_tensor(shape.vertices, dtype=torch.float32), torch.as_tensor(shape.faces))
        yield first, shape, mesh, [sample_camera(rng) for _ in range(min(4, views - first))]


def make_chunk(index: int, seed: int, pool: list[Shape], backend, views: int = VIEWS_PER_CHUNK):
    """Renders of chunk `index`: images (views * LOOKS_PER_VIEW, SIZE, SIZE, 3) uint8, control (views, SIZE, SIZE) and normals
    (views, SIZE, SIZE, 3) uint8, and one record an image.

    A chunk depends on (seed, index) alone, so neither the number of workers nor an interruption changes the set.
    """
    rng = np.random.default_rng((seed, index))
    images = np.empty((views * LOOKS_PER_VIEW, SIZE, SIZE, 3), np.uint8)
    control = np.empty((views, SIZE, SIZE), np.uint8)
    normals = np.empty((views, SIZE, SIZE, 3), np.uint8)
    records = []
    for first, shape, mesh, cameras in draw_groups(rng, pool, views):
        for offset, (camera, view) in enumerate(zip(cameras, render_views(mesh, cameras, backend))):
            control[first + offset] = np.rint(view.control * 255)
            normals[first + offset] = np.rint(view.normal_control * 255)
            surface = Surface(view.position, view.normal * np.sign(view.facing + 0.3)[:, None], shape.samples, shape.radius)
            for k in range(LOOKS_PER_VIEW):
                look, row = sample_look(rng), (first + offset) * LOOKS_PER_VIEW + k
                image = shade(view, paint(look, surface, int(rng.integers(8))), rng)
                blurry = bool(rng.random() < 0.03)
                if blurry:
                    image = gaussian_filter(image, (3.0, 3.0, 0))
                images[row] = np.rint(image * 255)
                word = view_name(camera[0], camera[1])
                captions = [sample_caption(look, shape.name, word, blurry, rng) for _ in range(CAPTIONS_PER_IMAGE)]
                records.append({"look": asdict(look), "shape": shape.name, "view": word, "blurry": blurry, "captions": captions})
    return images, control, normals, records


def make_normal_chunk(index: int, seed: int, pool: list[Shape], backend, views: int = VIEWS_PER_CHUNK):
    """Normal maps (views, SIZE, SIZE, 3) uint8 of chunk `index` and one record each; depends on (seed, index) alone."""
    rng = np.random.default_rng((seed, index))
    images, records = np.empty((views, SIZE, SIZE, 3), np.uint8), []
    for first, shape, mesh, cameras in draw_groups(rng, pool, views):
        images[first : first + len(cameras)] = np.rint(render_normal_maps(mesh, cameras, backend) * 255)
        for elevation, azimuth, _, _ in cameras:
            word, half = view_name(elevation, azimuth), CAPTIONS_PER_NORMAL_MAP // 2
            captions = [sample_caption(sample_look(rng), shape.name, word, False, rng) for _ in range(half)]
            captions += [plain_caption(shape.name, word, rng) for _ in range(half)]
            records.append({"shape": shape.name, "view": word, "captions": captions})
    return images, records


def make_data(directory: Path, views: int, seed: int, worker: int = 0, workers: int = 1, per_chunk: int = VIEWS_PER_CHUNK) -> None:
    """Writes this worker's share of the textured views under `directory`/chunks."""

    def make(index, pool, backend):
        images, control, normals, records = make_chunk(index, seed, pool, backend, per_chunk)
        return {"images": images, "control": control, "normals": normals, "records": json.dumps(records)}

    write_chunks(directory, make, -(-views // per_chunk), worker, workers)


def make_normal_data(directory: Path, views: int, seed: int, per_chunk: int, worker: int = 0, workers: int = 1) -> None:
    """Writes this worker's share of the normal maps under `directory`/chunks."""

    def make(index, pool, backend):
        images, records = make_normal_chunk(index, seed, pool, backend, per_chunk)
        return {"images": images, "records": json.dumps(records)}

    write_chunks(directory, make, -(-views // per_chunk), worker, workers)


def write_chunks(directory: Path, make, chunks: int, worker: int, workers: int) -> None:
    """Writes this worker's share of the chunks, the arrays of make(index, pool, backend), under `directory`/chunks; keeps what is there."""
    torch.set_num_threads(1)
    folder = directory / "chunks"
    folder.mkdir(parents=True, exist_ok=True)
    backend, pools = make_rasterizer("cpu"), (shapes(), bundled_shapes())
    if not pools[1]:
        print("data: no bundled mesh found, their chunks are left for a later run", flush=True)
    start, done, mine = time.time(), 0, list(range(worker, chunks, workers))
    for chunk in mine:
        path = folder / f"{chunk:05d}.npz"
        pool = pools[chunk % BUNDLED_EVERY == BUNDLED_EVERY - 1]
        if path.exists() or not pool:
            continue
        arrays = make(chunk, pool, backend)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, **arrays)
        partial.rename(path)
        done += 1
        if worker == 0 and done % 10 == 0:
            rate = done / (time.time() - start)
            speed, left = rate * len(arrays["images"]) * workers, (len(mine) - done) / rate
            print(f"data: {done}/{len(mine)} chunks, {speed:.0f} img/s, {left:.0f} s left", flush=True)


def pack_data(directory: Path) -> int:
    """Joins the arrays of the chunks into one file each, as images.npy, and records.json; returns the number of images."""
    arrays: dict[str, list[np.ndarray]] = {}
    records = []
    for path in sorted((directory / "chunks").glob("[0-9]*[0-9].npz")):
        with np.load(path) as part:
            records += json.loads(str(part["records"]))
            for name in set(part.files) - {"records"}:
                arrays.setdefault(name, []).append(part[name])
    for name, parts in arrays.items():
        np.save(directory / f"{name}.npy", np.concatenate(parts))
    (directory / "records.json").write_text(json.dumps(records))
    return len(records)


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Contact sheet of uint8 images (N, H, W, 3), N a multiple of `columns`."""
    n, h, w, _ = images.shape
    rows = images.reshape(n // columns, columns, h, w, 3).swapaxes(1, 2)
    return Image.fromarray(rows.reshape(n // columns * h, columns * w, 3))
