"""A headless Chromium for tests of pages: DevTools over pipes, with nothing installed beside the browser."""

import base64
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    ),
)
LIMIT = 120.0  # seconds for one answer, on a machine that does other things too


def executable() -> str | None:
    """The browser that is installed, or the one of `JAXCL_BROWSER`."""
    return next(
        (path for name in (os.environ.get("JAXCL_BROWSER"), *NAMES) if name and (path := shutil.which(name))), None
    )


class Page:
    """One page of a browser.

    Attributes:
      errors: what the page has written to its console as an error or a warning, or has thrown.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._number = write, read, b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer of the browser."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str, width: int, dark: bool = False, height: int = 900) -> None:
        """Loads a page in a window of this size, to its end."""
        self.errors.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        end = time.monotonic() + LIMIT
        while not self.value("document.readyState === 'complete' && location.href !== 'about:blank'"):
            assert time.monotonic() < end, url
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """Of JavaScript, awaited, as JSON gives it back."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: pathlib.Path) -> None:
        """Of the whole page, also what is below the window."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._read, 1 << 20)
            assert block, "the browser has ended"
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        found = json.loads(message)
        parameters = found.get("params", {})
        if found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif found.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif found.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(str(parameters["args"]))
        elif found.get("method") == "Network.loadingFailed":
            self.errors.append(parameters["errorText"])
        return found


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A page of a browser of its own, which ends with it."""
    program = executable()
    assert program is not None
    theirs, write = os.pipe()
    read, mine = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        redirected = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{mine}', "bash", *command]  # the numbers that it expects
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(redirected, pass_fds=(theirs, mine), **quiet)
        os.close(theirs)
        os.close(mine)
        try:
            yield Page(write, read)
        finally:
            os.close(write)
            os.close(read)
            process.terminate()
            process.wait(timeout=60)
