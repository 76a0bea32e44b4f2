"""Where the lines of metrics go: the interface of a sink, and what keeps one of the user's from harming the run.

`JsonLines` is the sink that every run has, because a run is resumed and reported from its file; it writes at once. A
sink of the user's (`telemetry.sinks`) is made and called in a thread of its own, with a bounded queue before it. One
that raises, hangs or is too slow costs a notice and the lines that it did not take.
"""

import contextlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Protocol

from darts_async.config import RunConfig
from darts_async.errors import NoSpaceError
from darts_async.extensions import SINK, load
from launcher.run_dir.run_dir import append_lines

MAX_UNWRITTEN: Final = 10_000
"""Lines of a file that are kept for a disk that is full; the oldest are left out beyond that."""
MAX_WAITING: Final = 1_000
"""Lines that wait for a sink of the user's; those that come beyond that are left out."""
CLOSE_WITHIN_S: Final = 10.0
"""How long the end of a run waits for the sinks to take what waits, and to close."""


class Sink(Protocol):
    """What takes metrics, made as `NAME(run_dir=Path, config=RunConfig)`.

    Example:
        >>> class Prints:
        ...     def __init__(self, run_dir: Path, config: RunConfig) -> None:
        ...         self.name = config.name
        ...     def write(self, line: dict[str, Any]) -> None:
        ...         print(self.name, line["type"], line.get("step"))
        ...     def close(self) -> None:
        ...         print("the end")
        >>> Prints(Path("."), RunConfig()).write({"type": "step", "step": 3, "reward/mean": 0.5})
        run step 3
    """

    def write(self, line: dict[str, Any]) -> None:
        """A line as it is in `metrics.jsonl`: `type` is `step`, `evaluation` or `resumed`."""

    def close(self) -> None:
        """The run has ended."""


class JsonLines:
    """JSON objects, one per line. What the disk does not take is written before the next line, or by `settle`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: deque[str] = deque(maxlen=MAX_UNWRITTEN)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self._unwritten.append(json.dumps(line))
        self.settle()

    def settle(self) -> str:
        """Write what the disk did not take before. Returns why it still does not, or nothing."""
        try:
            if self._unwritten:
                append_lines(self._path, self._unwritten)
        except NoSpaceError as error:
            return str(error)
        self._unwritten.clear()
        return ""

    def close(self) -> None:
        """Nothing is open."""
        self.settle()


class UserSink:
    """A sink of the user's, in its thread. No call blocks but `join`, and none raises."""

    def __init__(self, name: str, run_dir: Path, config: RunConfig) -> None:
        self._name = name
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_WAITING)
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._num_left_out = self._num_failed = 0
        self._thread = threading.Thread(target=self._serve, args=(run_dir, config), name=f"sink {name}", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Hand a line over, if the sink keeps up."""
        if not self._thread.is_alive():
            return
        try:
            self._lines.put_nowait(dict(line))
        except queue.Full:
            self._num_left_out += 1
            if self._num_left_out == 1:
                self._note(f"is {MAX_WAITING:,} lines late: it does not get those that come now")

    def take_notices(self) -> list[str]:
        """What the user is to be told since the last call."""
        return [self._notices.get() for _ in range(self._notices.qsize())]

    def close(self) -> None:
        """No further lines come."""
        with contextlib.suppress(queue.Empty):
            if self._lines.full():  # no other thread puts lines in, so that this makes room
                self._lines.get_nowait()
        self._lines.put_nowait(None)

    def join(self, deadline_s: float) -> None:
        """Wait until it has closed, or until a moment of the monotonic clock."""
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive():
            self._note(f"did not close within {CLOSE_WITHIN_S:g} s, with {self._lines.qsize()} lines before it")
        if self._num_failed > 1:
            self._note(f"failed at {self._num_failed} lines in all")

    def _serve(self, run_dir: Path, config: RunConfig) -> None:
        try:
            sink: Sink = load(SINK, self._name)(run_dir=run_dir, config=config)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to a user's code: it is reported
            self._note(f"could not be made, and gets no metrics: {type(error).__name__}: {error}")
            return
        while (line := self._lines.get()) is not None:
            self._try(sink.write, line)
        self._try(sink.close)

    def _try(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to a user's code: it is reported
            self._num_failed += 1
            if self._num_failed == 1:
                self._note(f"raised {type(error).__name__}: {error}; the run continues")

    def _note(self, text: str) -> None:
        self._notices.put(f"telemetry.sinks: {self._name} {text}")


def close_all(sinks: Iterable[UserSink]) -> None:
    """Close them at once, and wait for all of them. Blocks for `CLOSE_WITHIN_S` at most."""
    closing, deadline_s = tuple(sinks), time.monotonic() + CLOSE_WITHIN_S
    for sink in closing:
        sink.close()
    for sink in closing:
        sink.join(deadline_s)
