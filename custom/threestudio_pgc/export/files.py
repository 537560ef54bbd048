"""Writing files so that a failure never costs the user what was there before."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


class ExportError(ValueError):
    """Something cannot be exported; the message names the file or argument, what was found and what is wanted."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and is removed when it does not.

    Yields:
        the temporary file's path; it exists, is empty, and has `path`'s suffix.
    Raises:
        ExportError: the file cannot be written (no space, no permission, ...); what was at `path` is unchanged.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:50]}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp's files are private to the user; an exported file is an ordinary one
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        kept = "; the file that was there is unchanged" if path.is_file() else ""
        raise ExportError(f"{path}: cannot be written ({_reason(error, path)}){kept}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_bytes(path: str | Path, *parts: bytes) -> Path:
    """Write the parts one after the other, atomically. Raises ExportError as `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for part in parts:
            file.write(part)
        # A full disk may say so only here; better now than after the rename.
        file.flush()
        os.fsync(file.fileno())
    return Path(path)


def require_space(directory: str | Path, needed: int) -> None:
    """Raise ExportError unless `directory`, or the nearest folder above it that exists, has `needed` bytes free."""
    directory = Path(directory).absolute()
    existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ExportError(
            f"{directory}: about {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free; free some space or choose "
            "another folder or a lower resolution"
        )


def _reason(error: OSError, path: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            reason += f", {shutil.disk_usage(path.parent).free / 1e6:.0f} MB free"
    return reason


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
