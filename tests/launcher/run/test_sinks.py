"""Sinks of the user's: they get every line, and nothing that they do ends a run."""

import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from darts_async.config import RunConfig
from launcher.progress.step_merger import StepLine
from launcher.sinks import sink
from launcher.sinks.recorder import Recorder
from launcher.sinks.sink import UserSink, close_all


class Collects:
    """Keeps what it gets."""

    lines: ClassVar[list[dict[str, Any]]] = []
    has_begun = threading.Event()
    may_go_on = threading.Event()

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self.lines.clear()

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def close(self) -> None:
        self.lines.append({"type": "closed"})


class Refuses(Collects):
    """Takes no step."""

    def write(self, line: dict[str, Any]) -> None:
        raise ConnectionError("no server")


class Leaves(Collects):
    """Leaves Python."""

    def write(self, line: dict[str, Any]) -> None:
        raise SystemExit(3)


class Hangs(Collects):
    """Waits."""

    def write(self, line: dict[str, Any]) -> None:
        self.has_begun.set()
        self.may_go_on.wait(60)


class CannotBeMade(Collects):
    """Lacks something."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        raise KeyError("API_KEY")


def made(name: str, run_dir: Path) -> UserSink:
    return UserSink(f"{__name__}:{name}", run_dir, RunConfig())


def test_it_gets_the_lines_of_the_file(tmp_path: Path) -> None:
    collecting = made("Collects", tmp_path)
    recorder = Recorder(tmp_path, 10.0, sinks=(collecting,))
    recorder.step(StepLine(3, {"reward/mean": 0.5, "learner/grad_norm": float("nan")}), 12.0)
    recorder.resumed(2, [], 13.0)
    close_all([collecting])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert Collects.lines == [*lines, {"type": "closed"}]
    assert lines[0] == {"type": "step", "step": 3, "reward/mean": 0.5, "elapsed_s": 2.0}
    assert recorder.sink_notices() == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Refuses", ["raised ConnectionError: no server; the run continues", "failed at 2 lines in all"]),
        ("Leaves", ["raised SystemExit: 3; the run continues", "failed at 2 lines in all"]),
        ("CannotBeMade", ["could not be made, and gets no metrics: KeyError: 'API_KEY'"]),
        ("NotThere", ["could not be made, and gets no metrics: ExtensionError: telemetry.sinks is "]),
    ],
)
def test_one_that_fails_is_a_notice(name: str, told: list[str], tmp_path: Path) -> None:
    failing = made(name, tmp_path)
    failing.write({"type": "step", "step": 0})
    failing.write({"type": "step", "step": 1})
    close_all([failing])
    notices = failing.take_notices()
    assert len(notices) == len(told)
    for notice, text in zip(notices, told, strict=True):
        assert f"telemetry.sinks: {__name__}:{name} {text}" in notice


def test_one_that_hangs_loses_lines_and_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "MAX_WAITING", 2)
    monkeypatch.setattr(sink, "CLOSE_WITHIN_S", 0.01)
    hanging = made("Hangs", tmp_path)
    hanging.write({"type": "step", "step": 0})
    assert Hangs.has_begun.wait(60)
    for step in range(1, 5):
        hanging.write({"type": "step", "step": step})
    close_all([hanging])
    late, unclosed = hanging.take_notices()
    assert "is 2 lines late: it does not get those that come now" in late
    assert "did not close within 0.01 s, with 2 lines before it" in unclosed
    Hangs.may_go_on.set()
