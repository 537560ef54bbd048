"""Headless Chromium, driven over the DevTools protocol through a pair of pipes: no port, no library, no WebSocket.

with Browser(tmp_path) as browser:
    browser.open(page.as_uri())
    browser.wait_for("document.querySelectorAll('.loaded').length === 4")
    browser.screenshot(Path("page.png"))

The pictures of pages in docs/images are made by it, after clicks on what the selectors name:

    python -m tests.launch_scripts.browser outputs/compare/pocket/gallery/index.html docs/images/gallery.png
    python -m tests.launch_scripts.browser outputs/study/study.html docs/images/study.png "#start" ".option:nth-child(2) button"
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Chromium reads commands from descriptor 3 and answers on 4. They are put there after the fork, from numbers that cannot be 3 or 4.
_START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
# WebGL by the system's OpenGL, in software where there is no GPU; where there is none either, Chromium falls back to SwiftShader, its own
# and slower.
_OPTIONS = (
    "--headless=new --no-sandbox --disable-dev-shm-usage --remote-debugging-pipe --no-first-run --mute-audio --hide-scrollbars "
    "--use-gl=angle --use-angle=gl-egl --ignore-gpu-blocklist --enable-unsafe-swiftshader"
).split()
_KEY_CODES = {"Tab": 9, "Escape": 27, "PageUp": 33, "PageDown": 34, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def chromium() -> str | None:
    """Path of the browser, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class BrowserError(RuntimeError):
    """Chromium refused a command, a script threw, or a condition did not come true in time."""


class Browser:
    """One page in one browser. `requests` are the addresses it asked for, `complaints` its uncaught errors and console errors."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900):
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True, exist_ok=True)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._count, self._buffer, self._session = 0, b"", None
        pipes = [*os.pipe(), *os.pipe()]
        theirs_in, self._to, self._from, theirs_out = (fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 10) for pipe in pipes)
        for pipe in pipes:
            os.close(pipe)
        command = [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), chromium(), *_OPTIONS]
        command += [f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network"):
                self.send(f"{domain}.enable")
            self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def send(self, method: str, timeout: float = 30, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        deadline = time.monotonic() + timeout
        while True:
            answer = self._receive(deadline - time.monotonic(), method)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]
            self._note(answer)

    def open(self, address: str) -> None:
        failure = self.send("Page.navigate", url=address).get("errorText")
        if failure:
            raise BrowserError(f"{address}: {failure}")
        self.wait_for("document.readyState === 'complete'")

    def reload(self) -> None:
        # Marks the old document, which answers until the new one is there.
        self.evaluate("window.old = true")
        self.send("Page.reload")
        self.wait_for("!window.old && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Its value, awaited if it is a promise, as JSON."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise BrowserError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return found["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 30) -> Any:
        """Ask again until the value is true in JavaScript's sense; returns it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if value := self.evaluate(expression):
                return value
            time.sleep(0.05)
        raise BrowserError(f"{expression}: still {value!r} after {timeout} s; the page complained: {self.complaints}")

    def center(self, selector: str) -> tuple[float, float]:
        """Window coordinates of an element, scrolled into sight."""
        script = (
            f"(() => {{ const found = document.querySelector({json.dumps(selector)}); if (!found) return null;"
            " found.scrollIntoView({block: 'center', behavior: 'instant'}); const box = found.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        found = self.evaluate(script)
        if found is None:
            raise BrowserError(f"{selector}: found no such element")
        return tuple(found)

    def click(self, selector: str) -> None:
        self.drag(selector, 0, 0)

    def drag(self, selector: str, across: float, down: float, moves: int = 5) -> None:
        """Press the left button in the element's centre, move by so many pixels, and release it."""
        x, y = self.center(selector)
        self._mouse("mousePressed", x, y)
        for step in range(1, moves + 1 if across or down else 0):
            self._mouse("mouseMoved", x + across * step / moves, y + down * step / moves)
        self._mouse("mouseReleased", x + across, y + down)

    def wheel(self, selector: str, down: float) -> None:
        x, y = self.center(selector)
        self.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=down)

    def press(self, key: str) -> None:
        """A key of _KEY_CODES, by the name that JavaScript has for it."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEY_CODES[key])

    def resize(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """A PNG of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def downloaded(self, pattern: str, timeout: float = 15) -> Path:
        """The file in `downloads` that matches, once it is complete."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.evaluate("1")  # takes in what the browser reports meanwhile
            found = [file for file in self.downloads.glob(pattern) if file.suffix != ".crdownload" and file.stat().st_size]
            if found:
                return found[0]
            time.sleep(0.05)
        raise BrowserError(f"{pattern}: found {[file.name for file in self.downloads.iterdir()]} after {timeout} s")

    def _mouse(self, kind: str, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=int(kind != "mouseReleased"), clickCount=1)

    def _receive(self, seconds: float, method: str) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise BrowserError(f"{method}: no answer in time")
            data = os.read(self._from, 1 << 20)
            if not data:
                raise BrowserError(f"{method}: chromium has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"][:300])
        elif event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.complaints.append(" ".join(str(item.get("value", item.get("description"))) for item in parameters["args"]))


def loaded_images(page: Path) -> int:
    """Number of images that the browser shows on the page. The page itself is not changed."""
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        # Beside nothing else: a picture the page merely refers to is not found there.
        copy = Path(folder) / "page.html"
        copy.write_bytes(page.read_bytes())
        browser.open(copy.as_uri())
        return browser.evaluate("[...document.images].filter(image => image.complete && image.naturalWidth > 0).length")


def main(page: str, picture: str, *clicks: str) -> None:
    """Save a picture of a page of ours, once the models in its window are shown, after clicks on the selectors."""
    shown = (
        "[...document.querySelectorAll('.stage')].every(s => s.matches('.loaded, .empty') || s.getBoundingClientRect().top > innerHeight)"
    )
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder), 1440, 800) as browser:
        browser.open(Path(page).resolve().as_uri())
        for selector in clicks:
            browser.wait_for(shown, 60)
            browser.click(selector)
        browser.wait_for(shown, 60)
        time.sleep(1.5)  # the bar over a model that has loaded fades
        print(browser.screenshot(Path(picture)))


if __name__ == "__main__":
    main(*sys.argv[1:])
