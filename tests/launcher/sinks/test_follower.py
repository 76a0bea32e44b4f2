"""A follower gives each line once, in order, whatever becomes of it or of the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from launcher.sinks import follower
from launcher.sinks.follower import Follower, only_follower, read_memory, write_memory
from launcher.sinks.sink import Point, point_of
from tests.launcher.sinks.world import HISTORY, FollowedRun, step

COLLECTS = "tests.launcher.sinks.fakes:Collects"


def append(run_dir: Path, text: str) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(text)


def lines_of(*steps: int) -> str:
    return "".join(json.dumps(step(number)) + "\n" for number in steps)


def taken(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "collected.jsonl").read_text().splitlines()]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    found = tmp_path / "run"
    (found / "sinks").mkdir(parents=True)
    return found


def following(run_dir: Path) -> Follower:
    return Follower(run_dir, COLLECTS, RunConfig())


def test_it_takes_what_is_complete_and_remembers_it(run_dir: Path) -> None:
    found = following(run_dir)
    assert found.take() == 0, "there is no file yet"
    append(run_dir, lines_of(0, 1) + '{"type": "step", "st')
    assert found.take() == 2, "the last line is torn"
    append(run_dir, 'ep": 2}\n')
    assert found.take() == 1
    found.close()
    append(run_dir, lines_of(3))
    next_one = following(run_dir)
    assert next_one.take() == 1
    next_one.close()
    assert taken(run_dir) == [0, 1, 2, 3]
    assert read_memory(run_dir, COLLECTS).num_lines == 4


def test_a_damaged_line_is_left_out_and_counted(run_dir: Path) -> None:
    append(run_dir, lines_of(0) + "\0\0garbage\n" + lines_of(1))
    found = following(run_dir)
    assert found.take() == 3
    found.close()
    assert taken(run_dir) == [0, 1]


def test_many_lines_are_remembered_in_parts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "LINES_PER_FLUSH", 2)
    append(run_dir, lines_of(0, 1, 2))
    found = following(run_dir)
    assert [found.take() for _ in range(3)] == [2, 1, 0]
    found.close()


def test_a_file_that_has_lost_its_end_is_followed_from_there(run_dir: Path) -> None:
    append(run_dir, lines_of(0, 1, 2))
    found = following(run_dir)
    found.take()
    found.close()
    (run_dir / "metrics.jsonl").write_text(lines_of(0))
    next_one = following(run_dir)
    append(run_dir, lines_of(1))
    assert next_one.take() == 1
    next_one.close()
    assert taken(run_dir) == [0, 1, 2, 1]


def test_a_copy_of_a_run_is_another_one_for_the_service(run_dir: Path, tmp_path: Path) -> None:
    memory = read_memory(run_dir, COLLECTS)
    memory.num_lines = 7
    write_memory(run_dir, COLLECTS, memory)
    shutil.copytree(run_dir, tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    moved, copied = (read_memory(tmp_path / name, COLLECTS) for name in ("moved", "copy"))
    assert (moved.key, moved.num_lines) == (memory.key, 7)
    assert copied.key != memory.key
    assert copied.num_lines == 0


def test_a_run_has_one_follower_for_a_sink(run_dir: Path) -> None:
    with only_follower(run_dir, "wandb"), only_follower(run_dir, "mlflow"):
        refused = pytest.raises(ConfigError, match="already followed for the sink 'wandb' by another process")
        with refused, only_follower(run_dir, "wandb"):
            pass
    with only_follower(run_dir, "wandb"):
        pass


@pytest.mark.slow
def test_it_takes_all_at_the_end_of_its_input_and_closes(tmp_path: Path) -> None:
    with FollowedRun(tmp_path, COLLECTS) as run:
        run.append(HISTORY)
        run.follow_to_the_end()
        lines = (run.run_dir / "metrics.jsonl").read_text()
        assert (run.run_dir / "collected.jsonl").read_text() == lines
        assert (run.run_dir / "closed").exists()


@pytest.mark.slow
def test_a_sink_of_the_users_may_get_again_what_was_not_remembered_and_loses_nothing(tmp_path: Path) -> None:
    steps = [step(number) for number in range(8)]
    with FollowedRun(tmp_path, COLLECTS) as run:
        run.follow_with_a_kill(steps)
        assert taken(run.run_dir) == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sink", "code", "said"),
    [
        ("Refuses", 1, "sink/tests.launcher.sinks.fakes.Refuses: ConnectionError: no server"),
        ("Leaves", 1, "sink/tests.launcher.sinks.fakes.Leaves: SystemExit: 3"),
        ("CannotBeMade", 1, "sink/tests.launcher.sinks.fakes.CannotBeMade: KeyError: 'API_KEY'"),
        ("NotThere", 78, "telemetry.sinks is 'tests.launcher.sinks.fakes:NotThere', but"),
    ],
)
def test_what_a_sink_raises_is_the_last_word_of_its_follower(sink: str, code: int, said: str, tmp_path: Path) -> None:
    with FollowedRun(tmp_path, f"tests.launcher.sinks.fakes:{sink}") as run:
        run.append([step(0)])
        process = run.start()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code
        assert said in output.decode().splitlines()[-1]
        assert run.num_taken == 0


@pytest.mark.parametrize(
    ("line", "point"),
    [
        (
            {"type": "step", "step": 3, "reward/mean": 1, "elapsed_s": 2.0, "unix_s": 5.0},
            Point(3, 5.0, {"reward/mean": 1.0}),
        ),
        (
            {
                "type": "evaluation",
                "policy_version": 4,
                "newest_version": 6,
                "pass@1": 0.5,
                "rewards": [0.0],
                "unix_s": 5.0,
            },
            Point(4, 5.0, {"evaluation/pass@1": 0.5}),
        ),
        ({"type": "resumed", "life": 2, "unix_s": 5.0}, None),
        ({"type": "step", "step": 3}, None),
        ({"type": "step", "step": "three", "reward/mean": 1.0}, None),
        ({"type": "step", "step": 3, "learner/grad_norm": float("nan")}, None),
    ],
)
def test_a_line_is_a_point_on_the_axis_of_steps(line: dict[str, Any], point: Point | None) -> None:
    assert point_of(line) == point
