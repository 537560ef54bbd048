"""A page in a real browser, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_COUNT = """<script>
addEventListener("load", () => {
  document.body.dataset.loadedImages = [...document.images].filter(image => image.complete && image.naturalWidth > 0).length
})
</script>"""


def chromium() -> str | None:
    """Path of the browser, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def loaded_images(page: Path) -> int | None:
    """Number of images a headless Chromium shows on the page; None without a Chromium. The page itself is not changed."""
    browser = chromium()
    if browser is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        # Beside nothing else: a picture the page merely refers to is not found there.
        copy = Path(folder) / "page.html"
        copy.write_bytes(page.read_bytes() + _COUNT.encode())
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}/profile"]
        command += ["--dump-dom", "--virtual-time-budget=5000", copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    found = re.search(r'<body[^>]* data-loaded-images="(\d+)"', done.stdout)
    if found is None:
        raise RuntimeError(f"chromium: exit status {done.returncode}, no count in the page; {done.stderr[-500:]}")
    return int(found[1])
