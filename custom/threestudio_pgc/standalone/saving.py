"""Writing results: every file appears whole or not at all, and a full disk is reported by name."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .misc import get_rank

no_space = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SavingError(OSError):
    """A file that could not be written. The message names the file and what is still there."""

    def __str__(self) -> str:  # OSError would put the number in front
        return str(self.strerror)


def temporary_path(path: str | os.PathLike) -> Path:
    """Where `atomic_write` collects a file before it takes its name: in the same folder, hence on the same disk."""
    path = Path(path)
    return path.with_name(f".{path.stem}.part{get_rank()}{path.suffix}")


@contextmanager
def atomic_replace(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` when the block ends well, else remove it and keep the old file.

    Raises:
        SavingError: the disk is full, or the file cannot be written for another reason of the system's.
    """
    path, part = Path(path), temporary_path(path)
    done = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
        done = True
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        kept = f"the file from before is kept: {path}" if path.is_file() else "no file of that name was there before"
        reason = "no space left on the disk" if cause.errno in no_space else (cause.strerror or str(cause))
        raise SavingError(cause.errno, f"could not save {path}: {reason}; {kept}") from error
    finally:
        if not done:
            with suppress(OSError):
                part.unlink()


def _system_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch.save reports a full disk as a RuntimeError on top of it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Like `open(path, "wb")`, but the file appears only once all of it is on the disk. Raises SavingError."""
    with atomic_replace(path) as part, open(part, "wb") as file:
        yield file
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # not every file system can
                raise


def to_numpy(data: Any) -> Any:
    """Tensors to arrays, inside lists and dicts too."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        return data.float().numpy() if data.is_floating_point() else data.numpy()
    if isinstance(data, dict):
        return {key: to_numpy(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [to_numpy(value) for value in data]
    return data


def rgb_image(img: Any, data_format: str = "CHW", data_range: Sequence[float] = (0, 1)) -> np.ndarray:
    """(H,W,3) uint8 from an (3,H,W) or (H,W,3) array or tensor with values in `data_range`; one channel is repeated."""
    image = np.asarray(to_numpy(img))
    if image.ndim != 3 or data_format not in ("CHW", "HWC"):
        raise ValueError(f"an rgb image has 3 dimensions, CHW or HWC; found shape {image.shape} as {data_format!r}")
    image = np.transpose(image, (1, 2, 0)) if data_format == "CHW" else image
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"an rgb image has 1 or 3 channels, found {image.shape[-1]}")
    return _bytes(np.broadcast_to(image, (*image.shape[:2], 3)), data_range)


def grayscale_image(img: Any, data_range: Sequence[float] | None = None, cmap: str | None = "jet") -> np.ndarray:
    """(H,W,3) uint8 from an (H,W) array: gray (`cmap` None) or blue to red ("jet"). `data_range` None: that of the image."""
    image = np.asarray(to_numpy(img), dtype=np.float64)
    if image.ndim != 2:
        raise ValueError(f"a grayscale image has 2 dimensions, found shape {image.shape}")
    finite = image[np.isfinite(image)]
    if data_range is None:
        data_range = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    low, high = data_range
    share = np.clip((np.nan_to_num(image, nan=low) - low) / (high - low), 0, 1) if high > low else np.zeros_like(image)
    if cmap is None:
        return _bytes(np.repeat(share[..., None], 3, axis=-1), (0, 1))
    if cmap == "jet":
        return _bytes(np.clip(1.5 - np.abs(4 * share[..., None] - np.array([3.0, 2.0, 1.0])), 0, 1), (0, 1))
    raise ValueError(f"cmap is None or 'jet', found {cmap!r}")


def _bytes(image: np.ndarray, data_range: Sequence[float]) -> np.ndarray:
    low, high = data_range
    share = np.nan_to_num((image.astype(np.float64) - low) / (high - low))
    return (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)


class SaverMixin:
    """Saving for systems. File names are relative to the run's `save` folder. All return the path.

    Every process writes what it is told to, since Lightning shares out the views of a test among them; videos are put together
    by the first one, when all have arrived.

    `name` and `step` also send a picture to TensorBoard under that name.
    """

    _save_dir: str | None = None

    def set_save_dir(self, save_dir: str) -> None:
        self._save_dir = str(save_dir)

    def get_save_dir(self) -> str:
        if self._save_dir is None:
            raise ValueError("the folder to save to is not set: call set_save_dir first")
        return self._save_dir

    def get_save_path(self, filename: str) -> str:
        """Path of `filename` under the save folder; its folders exist afterwards."""
        path = os.path.join(self.get_save_dir(), filename)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def convert_data(self, data: Any) -> Any:
        return to_numpy(data)

    def _write_png(self, filename: str, image: np.ndarray, name: str | None, step: int | None) -> str:
        from PIL import Image

        path = self.get_save_path(filename)
        with atomic_write(path) as file:
            Image.fromarray(image).save(file, format=_image_format(filename))
        for logger in getattr(self, "loggers", None) or ():
            if name and hasattr(logger.experiment, "add_image"):
                logger.experiment.add_image(name, image, global_step=step, dataformats="HWC")
        return path

    def save_rgb_image(
        self, filename: str, img: Any, data_format: str = "CHW", data_range=(0, 1), name: str | None = None, step: int | None = None
    ) -> str:
        return self._write_png(filename, rgb_image(img, data_format, data_range), name, step)

    def save_grayscale_image(
        self, filename: str, img: Any, data_range=None, cmap: str | None = "jet", name: str | None = None, step: int | None = None
    ) -> str:
        return self._write_png(filename, grayscale_image(img, data_range, cmap), name, step)

    def save_image(self, filename: str, img: Any) -> str:
        """Save an (H,W,3) or (H,W) uint8 array as it is."""
        image = np.asarray(to_numpy(img))
        if image.dtype != np.uint8:
            raise ValueError(f"save_image takes uint8 values, found {image.dtype}")
        return self._write_png(filename, image, None, None)

    def save_image_grid(
        self,
        filename: str,
        imgs: Sequence[Any],
        align: str | int | tuple[int, int] = "min",
        name: str | None = None,
        step: int | None = None,
        texts: Sequence[str] | None = None,
    ) -> str:
        """Pictures side by side in one file.

        Args:
            imgs: one row, a list of `{"type": "rgb" | "grayscale", "img": array or tensor, "kwargs": {...}}` with the keywords
                of `save_rgb_image` and `save_grayscale_image`; or a list of such rows.
            align: height and width all are resized to: "min" or "max" of those given, a number or a pair.
            texts: one line each, written in the top left corner.
        """
        rows = [imgs] if imgs and isinstance(imgs[0], dict) else list(imgs)
        if not rows or not all(rows):
            raise ValueError("an image grid needs at least one image in every row")
        pictures = [[_picture(entry) for entry in row] for row in rows]
        height, width = _common_size([picture for row in pictures for picture in row], align)
        lines = [np.concatenate([_resize(picture, height, width) for picture in row], axis=1) for row in pictures]
        widest = max(line.shape[1] for line in lines)
        lines = [np.pad(line, ((0, 0), (0, widest - line.shape[1]), (0, 0))) for line in lines]
        image = np.concatenate(lines, axis=0)
        return self._write_png(filename, _write_texts(image, texts) if texts else image, name, step)

    def save_data(self, filename: str, data: Any) -> str:
        """An array as .npy, a dict of arrays as .npz."""
        data = to_numpy(data)
        path = self.get_save_path(filename + ("" if filename.endswith((".npy", ".npz")) else ".npz" if isinstance(data, dict) else ".npy"))
        with atomic_write(path) as file:
            np.savez(file, **data) if isinstance(data, dict) else np.save(file, data)
        return path

    def save_state_dict(self, filename: str, data: Any) -> str:
        path = self.get_save_path(filename)
        with atomic_write(path) as file:
            torch.save(data, file)
        return path

    def save_json(self, filename: str, payload: Any) -> str:
        path = self.get_save_path(filename)
        with atomic_write(path) as file:
            file.write((json.dumps(_json(to_numpy(payload)), indent=2) + "\n").encode())
        return path

    def save_file(self, filename: str, src_path: str) -> str:
        """A copy of another file."""
        path = self.get_save_path(filename)
        with open(src_path, "rb") as source, atomic_write(path) as file:
            shutil.copyfileobj(source, file)
        return path

    def save_mesh(self, filename: str, v_pos: Any, t_pos_idx: Any, v_tex: Any = None, t_tex_idx: Any = None) -> str:
        """Vertices (V,3) and faces (F,3) in the format that the suffix names. UV coordinates, if given, must be per vertex."""
        import trimesh

        visual = None
        if v_tex is not None:
            if t_tex_idx is not None and not np.array_equal(to_numpy(t_tex_idx), to_numpy(t_pos_idx)):
                raise ValueError("save_mesh needs one UV coordinate per vertex; split the vertices at seams first")
            visual = trimesh.visual.TextureVisuals(uv=to_numpy(v_tex))
        mesh = trimesh.Trimesh(to_numpy(v_pos), to_numpy(t_pos_idx), visual=visual, process=False)
        path = self.get_save_path(filename)
        exported = mesh.export(file_type=Path(filename).suffix.lstrip("."))
        with atomic_write(path) as file:
            file.write(exported if isinstance(exported, bytes) else exported.encode())
        return path

    def save_img_sequence(
        self,
        filename: str,
        img_dir: str,
        matcher: str,
        save_format: str = "mp4",
        fps: int = 30,
        name: str | None = None,
        step: int | None = None,
    ) -> str:
        """A video (`mp4`) or animation (`gif`) of the pictures in a folder.

        Args:
            filename: result; the suffix is added where it is missing.
            img_dir: folder under the save folder.
            matcher: regular expression of the file names; its first group is the number they are sorted by.
        """
        if save_format not in ("mp4", "gif"):
            raise ValueError(f"save_format is 'mp4' or 'gif', found {save_format!r}")
        filename = filename if filename.endswith(save_format) else f"{filename}.{save_format}"
        path = self.get_save_path(filename)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # the pictures are shared out among the processes
        if get_rank() != 0:
            return path
        folder = Path(self.get_save_dir()) / img_dir
        matches = [(re.search(matcher, entry.name), entry) for entry in folder.iterdir()] if folder.is_dir() else []
        frames = sorted((int(match.group(1)), entry) for match, entry in matches if match)
        if not frames:
            raise ValueError(f"no picture in {folder} matches {matcher!r}")
        write_video(path, (entry for _, entry in frames), fps)
        return path


def write_video(path: str | os.PathLike, pictures: Iterator[str | os.PathLike], fps: int) -> None:
    """Encode picture files as .mp4 or .gif. Odd sizes lose their last row or column in .mp4, which H.264 cannot hold."""
    import imageio.v2 as imageio

    gif = str(path).endswith(".gif")
    options = {"duration": 1000 / fps, "loop": 0} if gif else {"fps": fps, "macro_block_size": 1, "quality": 8}
    with atomic_replace(path) as part, imageio.get_writer(part, format="GIF" if gif else "FFMPEG", mode="I", **options) as writer:
        for picture in pictures:
            frame = np.asarray(imageio.imread(picture))[..., :3]
            height, width = frame.shape[:2]
            writer.append_data(frame if gif else frame[: height - height % 2, : width - width % 2])


def _image_format(filename: str) -> str:
    suffix = Path(filename).suffix.lower()
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    if suffix not in formats:
        raise ValueError(f"{filename}: pictures are saved as {', '.join(formats)}")
    return formats[suffix]


def _picture(entry: dict) -> np.ndarray:
    makers = {"rgb": rgb_image, "grayscale": grayscale_image}
    if entry.get("type") not in makers:
        raise ValueError(f"the type of an image in a grid is one of {', '.join(makers)}; found {entry.get('type')!r}")
    return makers[entry["type"]](entry["img"], **dict(entry.get("kwargs") or {}))


def _common_size(pictures: list[np.ndarray], align: str | int | tuple[int, int]) -> tuple[int, int]:
    if align in ("min", "max"):
        choose = min if align == "min" else max
        return choose(p.shape[0] for p in pictures), choose(p.shape[1] for p in pictures)
    if isinstance(align, int):
        return align, align
    if isinstance(align, (tuple, list)) and len(align) == 2:
        return int(align[0]), int(align[1])
    raise ValueError(f"align is 'min', 'max', a number or (height, width); found {align!r}")


def _resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def _write_texts(image: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    for line, text in enumerate(texts):
        draw.text((3, 2 + 12 * line), str(text), fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)


def _json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return value
