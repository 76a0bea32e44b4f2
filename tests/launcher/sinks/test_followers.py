"""Followers are started again with a bound, and nothing that they do raises."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from darts_async.config import RunConfig
from darts_async.errors import NO_SPACE_EXIT_CODE, PERMANENT_EXIT_CODE
from launcher.sinks import followers
from launcher.sinks.followers import MAX_FAILURES, MAX_WAIT_S, Attempts, Followers
from tests.launcher.sinks.world import DEADLINE_S, step

FAKES = "tests.launcher.sinks.fakes"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "run"
    (found / "logs").mkdir(parents=True)
    (found / "metrics.jsonl").write_text("".join(json.dumps(step(number)) + "\n" for number in range(5)))
    monkeypatch.setattr(followers, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    return found


def test_deaths_without_a_line_in_between_are_bounded() -> None:
    attempts = Attempts()
    waits = [attempts.died(-9, has_taken=False) for _ in range(MAX_FAILURES)]
    assert None not in waits[:-1]
    assert waits[-1] is None
    attempts = Attempts()
    assert None not in [attempts.died(-9, has_taken=True) for _ in range(100)]


def test_a_full_disk_is_waited_for_and_a_mistake_is_not_repeated() -> None:
    attempts = Attempts()
    assert {attempts.died(NO_SPACE_EXIT_CODE, has_taken=False) for _ in range(100)} == {MAX_WAIT_S}
    assert attempts.died(PERMANENT_EXIT_CODE, has_taken=True) is None


@pytest.mark.slow
async def test_one_that_is_killed_is_started_again_and_loses_nothing(run_dir: Path) -> None:
    name = f"{FAKES}:DiesOnce"
    async with Followers(run_dir, RunConfig(), [name], close_within_s=None) as found:
        deadline_s = time.monotonic() + DEADLINE_S
        while not (notices := found.take_notices()):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.02)
    text = "has failed and is started again: its follower was killed (SIGKILL); no metrics are lost"
    assert notices == [f"the sink {name} {text}"]
    assert not found.unserved
    collected = [json.loads(line)["step"] for line in (run_dir / "collected.jsonl").read_text().splitlines()]
    assert collected == [0, 1, 0, 1, 2, 3, 4], "the first two were not yet remembered"


@pytest.mark.slow
async def test_one_that_fails_each_time_is_given_up_with_the_command_that_gives_it_the_rest(run_dir: Path) -> None:
    refuses, collects = f"{FAKES}:Refuses", f"{FAKES}:Collects"
    async with Followers(run_dir, RunConfig(), [refuses, collects], close_within_s=None) as found:
        pass
    first, last = found.take_notices()
    assert "has failed and is started again: ConnectionError: no server" in first
    advice = f"`darts-launch follow {run_dir} --sink {refuses}` gives it the rest"
    assert last == f"the sink {refuses} gets no further metrics: ConnectionError: no server; {advice}"
    assert found.unserved == {refuses}
    assert len((run_dir / "collected.jsonl").read_text().splitlines()) == 5, "another sink is not touched"


@pytest.mark.slow
async def test_one_that_hangs_is_not_waited_for(run_dir: Path) -> None:
    name = f"{FAKES}:Hangs"
    async with Followers(run_dir, RunConfig(), [name], close_within_s=0.5) as found:
        pass
    (notice,) = found.take_notices()
    assert "did not finish within 0.5 s; `darts-launch follow" in notice
    assert found.unserved == {name}


@pytest.mark.slow
async def test_a_mistake_is_told_once(run_dir: Path) -> None:
    name = f"{FAKES}:NotThere"
    async with Followers(run_dir, RunConfig(), [name], close_within_s=None) as found:
        pass
    (notice,) = found.take_notices()
    assert "gets no further metrics: telemetry.sinks is" in notice
    assert "has no 'NotThere'" in notice
