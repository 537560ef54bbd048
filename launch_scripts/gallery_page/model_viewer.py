"""Google's <model-viewer> for the pages: fetched from the npm registry once, checked against a pinned hash, kept in the user's cache."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

VERSION = "4.4.0"
# The registry's own "integrity" of this version's tarball.
SHA512 = "8z1SB5sPlzKoak5mdx/D31brBakPYm3Qi31EfAucHAUrtrHHCbabypkKvSwReYhUpPaxyJ46oT47uWE/hrs1Zw=="
SCRIPT = "model-viewer-umd.min.js"
_TARBALL = f"model-viewer-{VERSION}.tgz"
_TIMEOUT_S = 30


class ModelViewer(NamedTuple):
    """script: the UMD build, which runs as a classic script, since module scripts do not load from disk. licence: its text."""

    script: bytes
    licence: bytes


def model_viewer(file: Path | None = None) -> ModelViewer:
    """The viewer: from `file`, with the package's LICENSE beside it or one level above; else from the cache; else from the registry.

    Raises:
        ValueError: says what was found and what to do, e.g. with no network.
    """
    if file is not None:
        return _local(file)
    cached = cache_folder() / _TARBALL
    if cached.is_file() and _is_pinned(data := cached.read_bytes()):
        return _unpacked(data)
    data = _download(cached)
    from threestudio_pgc.export.files import ExportError, write_bytes

    try:
        write_bytes(cached, data)
    except ExportError as error:
        print(f"not kept for next time: {error}")
    return _unpacked(data)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "threestudio_pgc"


def _download(cached: Path) -> bytes:
    registry = (os.environ.get("npm_config_registry") or "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/@google/model-viewer/-/{_TARBALL}"
    otherwise = (
        f"on a machine with a network run `npm pack @google/model-viewer@{VERSION}` and put the file at {cached} (as {_TARBALL}), "
        f"or give --model-viewer the package's dist/{SCRIPT}"
    )
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            data = response.read()
    except (OSError, ValueError) as error:  # urllib's own errors are OSErrors; a malformed address is a ValueError
        raise ValueError(f"{url}: cannot be fetched ({error}); {otherwise}") from error
    if not _is_pinned(data):
        found = base64.b64encode(hashlib.sha512(data).digest()).decode()
        raise ValueError(f"{url}: found {len(data)} bytes of sha512 {found}, wanted {SHA512}; {otherwise}")
    return data


def _is_pinned(data: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == SHA512


def _unpacked(data: bytes) -> ModelViewer:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return ModelViewer(*(archive.extractfile(f"package/{name}").read() for name in (f"dist/{SCRIPT}", "LICENSE")))


def _local(file: Path) -> ModelViewer:
    if not file.is_file():
        raise ValueError(f"--model-viewer: found no file {file}, wanted the package's dist/{SCRIPT}")
    script = file.read_bytes()
    if b"typeof exports" not in script[:500] or b"model-viewer" not in script:
        raise ValueError(f"--model-viewer: found another kind of file in {file}, wanted the package's dist/{SCRIPT}")
    for folder in (file.parent, file.resolve().parents[1]):
        if (folder / "LICENSE").is_file():
            return ModelViewer(script, (folder / "LICENSE").read_bytes())
    raise ValueError(f"--model-viewer: found no LICENSE beside {file} or one level above, wanted the package's, to go with the script")
