"""Runs whose disk is full for a while: a real file system of a few MiB."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launched import DEADLINE_S, LaunchedRun
from tests.support.small_disk import small_disk, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]


def test_a_run_does_not_begin_on_a_full_disk_and_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "runs", 1) as disk:
        disk.fill()
        with LaunchedRun(tmp_path, "scripted.yaml", {}) as run:
            assert run.process.wait(DEADLINE_S) == 1
            assert "the run cannot begin" in run.output
            assert "o space left on" in run.output
            assert "Traceback" not in run.output


def test_a_run_waits_for_room_says_so_and_goes_on_with_nothing_lost(tmp_path: Path) -> None:
    settings = {
        "roles": {"shaper": {"restart": {"intensity": {"max": 1}}}},
        "learner": {"steps": 100, "checkpoint_every": 10},
        "telemetry": {"status_every_s": 0.1},
    }
    with small_disk(tmp_path / "runs", 64) as disk, LaunchedRun(tmp_path, "scripted.yaml", settings) as run:

        def waits(word: str, change: Callable[[], None]) -> None:
            number = run.output.count(word)
            change()
            run.wait_until(lambda: run.output.count(word) > number)

        for num_steps in (5, 25, 45):  # more often than the shaper may die
            run.wait_for_steps(num_steps)
            waits("restarts once there is space", disk.fill)
            disk.empty()
        run.wait_for_steps(65)

        def fills_and_gives() -> None:
            waits("restarts once there is space", disk.fill)
            disk.give(3 << 20)  # enough for the shaper, and no checkpoint

        waits("learner/0 waits for space", fills_and_gives)  # before the space is given, or after it
        assert f"no space left on {tmp_path / 'runs'} (0.0 of 64.0 MiB free)" in run.output
        disk.empty()
        assert run.end() == 0, run.output
        run.assert_clean()
        assert {event["process"] for event in run.events("ended")} == {"shaper/0"}
        assert {line["step"] for line in run.lines("metrics.jsonl") if line["type"] == "step"} == set(range(100))
