"""What is at which address of the dashboard.

(nothing)                                    the page; beside it its style, its scripts and its icon
start                                        the charts, and the list of runs
updates?run=NAME&run=...                     an event stream of what is new: see `updates`
samples?run=NAME&kind=train&number=12        the groups of a step; `held-out`: of the evaluation of a version
sample?run=NAME&kind=...&number=...&sample=7/3    everything about one sample
settings?run=NAME                            config.yaml as text
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from darts_async.errors import ConfigError
from darts_async.topology.outcomes import OUTCOMES
from darts_async.topology.run_files import CONFIG_FILE
from launcher.analysis.rollouts import RunRollouts
from launcher.dashboard.access import PageRequest, RefusedError
from launcher.dashboard.charts import CHARTS
from launcher.dashboard.plain import encoded
from launcher.dashboard.runs import ShownRuns
from launcher.dashboard.sample_views import group_rows, sample_view
from launcher.dashboard.updates import RunUpdates
from launcher.terminal import printable

PAGE_FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "style.css": ("style.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "samples.js": ("samples.js", "text/javascript; charset=utf-8"),
    "sections.js": ("sections.js", "text/javascript; charset=utf-8"),
    "dom.js": ("dom.js", "text/javascript; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
"""{path: (file of the package, its type)}"""
MAX_RUNS = 8
"""Runs side by side."""
_LIST_EVERY = 5
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole reply."""

    body: bytes
    content_type: str = _JSON
    status: int = 200


@dataclass(slots=True)
class Stream:
    """A reply that continues while the client stays."""

    runs: ShownRuns
    updates: list[RunUpdates]
    _num_looks: int = 0
    _listed: list[dict[str, Any]] = field(default_factory=list)

    def new(self) -> Iterator[bytes]:
        """The messages since the last call."""
        if self._num_looks % _LIST_EVERY == 0 and (listed := self.runs.listed()) != self._listed:
            self._listed = listed
            yield encoded({"runs": listed})
        self._num_looks += 1
        for update in self.updates:
            for message in update.new():
                yield encoded(message)


class Answers:
    """Answers requests that `access` has let through."""

    def __init__(self, runs: ShownRuns) -> None:
        self._runs = runs
        page = files("launcher.dashboard") / "page"
        self._files = {path: Answer((page / name).read_bytes(), kind) for path, (name, kind) in PAGE_FILES.items()}
        self._routes: dict[str, Callable[[PageRequest], Answer | Stream]] = {
            "start": self._start,
            "updates": self._updates,
            "samples": self._samples,
            "sample": self._sample,
            "settings": self._settings,
        }

    def to(self, request: PageRequest) -> Answer | Stream:
        """The answer.

        Raises:
            RefusedError: there is nothing at this address.
            ConfigError: what it is about is not there, or cannot be read.
        """
        if (file := self._files.get(request.path)) is not None:
            return file
        if (route := self._routes.get(request.path)) is not None:
            return route(request)
        raise RefusedError(404, "there is nothing at this address")

    def _start(self, request: PageRequest) -> Answer:
        charts = msgspec.to_builtins(CHARTS)
        found = {"charts": charts, "outcomes": OUTCOMES, "max_runs": MAX_RUNS, "runs": self._runs.listed()}
        return Answer(encoded(found))

    def _updates(self, request: PageRequest) -> Stream:
        names = list(dict.fromkeys(request.all("run")))
        if len(names) > MAX_RUNS:
            raise RefusedError(400, f"{len(names)} runs are asked for; at most {MAX_RUNS} are shown side by side")
        return Stream(self._runs, [RunUpdates(name, self._run_dir(name)) for name in names])

    def _samples(self, request: PageRequest) -> Answer:
        return Answer(encoded(group_rows(self._reader(request), request.one("kind"), request.one("number"))))

    def _sample(self, request: PageRequest) -> Answer:
        where = request.one("kind"), request.one("number"), request.one("sample")
        return Answer(encoded(sample_view(self._reader(request), *where)))

    def _settings(self, request: PageRequest) -> Answer:
        path = self._run_dir(request.one("run")) / CONFIG_FILE
        try:
            text = path.read_text("utf-8", errors="replace")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        return Answer(printable(text).encode(), "text/plain; charset=utf-8")

    def _reader(self, request: PageRequest) -> RunRollouts:
        return RunRollouts(self._run_dir(request.one("run")))

    def _run_dir(self, name: str) -> Path:
        found = self._runs.found().get(name)
        if found is None:
            raise RefusedError(404, "there is no run of this name")
        return found
