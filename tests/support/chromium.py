"""A real browser without a window, told what to do by its debugging protocol over a pipe.

The protocol is JSON objects, each with a zero byte after it: commands with an `id`, replies with the same, and events.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 60.0
_TICK_S = 0.05
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # it refuses to run as root with its own sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)


class Chromium:
    """A browser with one page. Use as a context manager. Skips the test where none is installed.

    Its profile and its temporary files are in a directory that is removed.
    """

    def __init__(self) -> None:
        program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
        if program is None:
            pytest.skip("no chromium is installed: apt-get install chromium")
        self._next_id, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="browser", dir="/tmp")  # it makes a socket: a short path
        to_read, self._writes = os.pipe()
        self._reads, to_write = os.pipe()
        words = [program, *_OPTIONS, f"--user-data-dir={self._temporary.name}/profile", "about:blank"]
        # It reads from descriptor 3 and writes to 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write} >/dev/null 2>&1', "bash", *words]
        environment = os.environ | {"TMPDIR": self._temporary.name, "HOME": self._temporary.name}
        self._process = subprocess.Popen(
            shell, pass_fds=(to_read, to_write), env=environment, start_new_session=True, stdin=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)

    def __enter__(self) -> "Chromium":
        try:
            self._attach()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attach(self) -> None:
        [page] = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser, and remove what it has left."""
        os.close(self._writes)  # without its pipe it ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(DEADLINE_S)
        os.close(self._reads)
        self._temporary.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The reply to a command. What happens meanwhile is kept in `events`."""
        self._next_id += 1
        session = {"sessionId": self._session} if self._session else {}
        command = {"id": self._next_id, "method": method, "params": parameters, **session}
        os.write(self._writes, json.dumps(command).encode() + b"\0")
        while (message := self._message()).get("id") != self._next_id:
            self.events.append(message)
        assert "error" not in message, (method, message["error"])
        result: dict[str, Any] = message["result"]
        return result

    def _message(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + DEADLINE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"the browser says nothing within {DEADLINE_S:g} s"
            part = os.read(self._reads, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page; of a promise what it becomes."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait_until(self, expression: str) -> None:
        """Until an expression holds in the page."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline_s, (
                expression,
                self.complaints(),
                self.evaluate("document.body.innerText"),
            )
            time.sleep(_TICK_S)

    def open(self, url: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=url)

    def look(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Make the window so large, and prefer a colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> bytes:
        """Take a picture of the window, as PNG."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data

    def complaints(self) -> list[str]:
        """Errors and warnings of the page since it was opened: exceptions, the console, refused or failed loads."""
        self.call("Runtime.evaluate", expression="0")  # take in what has happened
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    found.append(str(parameters["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                    found.append(str(parameters["args"]))
                case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                    found.append(str(parameters["entry"]))
        return found

    def addresses(self) -> set[str]:
        """All addresses that the page has asked for."""
        sent = [
            each["params"]["request"]["url"] for each in self.events if each["method"] == "Network.requestWillBeSent"
        ]
        return set(sent)
