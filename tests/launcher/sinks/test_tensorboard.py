"""The real TensorBoard: what it serves over HTTP, also after kills."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.launcher.sinks.world import (
    BEGAN_S,
    DEADLINE_S,
    EVALUATIONS,
    HISTORY,
    LAST_STEP_REWARDS,
    FollowedRun,
)

pytestmark = pytest.mark.slow

COUNT = """
import json, sys
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
print(json.dumps(sum(1 for _ in EventFileLoader(sys.argv[1]).Load())))
"""


@contextmanager
def tensorboard(logdir: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a TensorBoard that serves a directory."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if " at http://" in line:
                yield line.split(" at ")[1].split()[0].rstrip("/")
                return
        raise AssertionError("it has ended")
    finally:
        server.terminate()
        server.communicate(timeout=DEADLINE_S)


def scalars(address: str, run: str, tag: str) -> list[tuple[float, int, float]]:
    """(time, step, value) of a curve; none as long as it is not there."""
    try:
        with urllib.request.urlopen(
            f"{address}/data/plugin/scalars/scalars?{urlencode({'run': run, 'tag': tag})}", timeout=DEADLINE_S
        ) as response:
            points: Any = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return []
    return [(at_s, step, round(value, 6)) for at_s, step, value in points]


def test_it_serves_the_last_value_of_each_step_after_kills(tmp_path: Path) -> None:
    with FollowedRun(tmp_path, "tensorboard") as run:
        run.follow_with_a_kill()
        (file,) = (run.run_dir / "tensorboard").glob("events.out.tfevents.*")
        assert run.read_back(COUNT, str(file)) == 1 + len(HISTORY), "one record for each line, after the first"
        with tensorboard(tmp_path / "runs", run.environment) as address:
            name, deadline_s = "arithmetic/tensorboard", time.monotonic() + DEADLINE_S
            while len(scalars(address, name, "evaluation/reward/mean")) < len(EVALUATIONS):
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
            rewards = scalars(address, name, "reward/mean")
            evaluations = scalars(address, name, "evaluation/reward/mean")
    assert [(step, value) for _, step, value in rewards] == LAST_STEP_REWARDS
    assert [(step, value) for _, step, value in evaluations] == EVALUATIONS
    assert evaluations[0][0] == BEGAN_S + 1


def test_a_record_that_a_kill_has_torn_is_written_again(tmp_path: Path) -> None:
    with FollowedRun(tmp_path, "tensorboard", {"tensorboard": {"path": str(tmp_path / "logs")}}) as run:
        run.append(HISTORY)
        run.follow_to_the_end()
        (file,) = (tmp_path / "logs" / "arithmetic").glob("events.out.tfevents.*")
        complete = file.read_bytes()
        file.write_bytes(complete[:-5])
        run.follow_to_the_end()
        assert file.read_bytes() == complete
