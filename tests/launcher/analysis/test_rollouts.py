"""What is asked of the rollouts of a run, and what is said where there is no answer."""

import re
from pathlib import Path

import pytest

from darts_async.errors import ConfigError
from darts_async.rollouts import FileName, Rollout, encode_rollouts
from darts_async.topology.run_files import SAMPLES_DIR
from launcher.analysis.rollouts import Query, RunRollouts
from tests.test_rollouts import rollout


def write(run_dir: Path, rollouts: list[Rollout]) -> None:
    directory = run_dir / SAMPLES_DIR
    directory.mkdir(exist_ok=True)
    (directory / str(FileName(rollouts[0].kind, rollouts[0].step))).write_bytes(encode_rollouts(rollouts))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two steps, a third of which only a group that came to nothing is there, and an evaluation."""
    write(
        tmp_path,
        [
            rollout("1/0", step=0, text="one", reward=1.0, length=5),
            rollout("1/1", step=0, text="two", reward=0.0, length=9),
            rollout("1/2", step=0, text="three", outcome="cancelled", why="survivor", length=40),
        ],
    )
    write(
        tmp_path,
        [
            rollout("4/0", step=1, text="four", reward=0.5, length=7, prompt_id=2),
            rollout("4/1", step=1, text="five", reward=0.5, length=3, prompt_id=2),
            rollout("5/0", step=1, text="six", outcome="filtered", why="reward_timeout", length=3),
        ],
    )
    write(tmp_path, [rollout("6/0", step=2, text="seven", outcome="stale", why="kept_learner_waiting")])
    write(tmp_path, [rollout("0/0", kind="held-out", step=0, outcome="evaluated", reward=0.0, text="held out")])
    return tmp_path


def found(run_dir: Path, **query: object) -> list[str]:
    return [each.sample for each in RunRollouts(run_dir).find(Query(**query))]  # type: ignore[arg-type]


def test_the_newest_step_is_one_that_was_trained_on(run_dir: Path) -> None:
    assert RunRollouts(run_dir).newest("train") == 1
    assert found(run_dir) == ["4/0", "4/1", "5/0"]
    assert found(run_dir, limit=2) == ["4/0", "4/1"]
    assert found(run_dir, number=2) == ["6/0"]


def test_a_run_in_which_nothing_was_trained_on_shows_what_came_to_nothing(tmp_path: Path) -> None:
    write(tmp_path, [rollout("6/0", step=0, outcome="filtered", why="reward_raised")])
    assert found(tmp_path) == ["6/0"]


def test_the_best_and_the_worst_have_a_reward_and_of_equal_ones_the_shorter_is_better(run_dir: Path) -> None:
    assert found(run_dir, order="best") == ["4/1", "4/0"]
    assert found(run_dir, order="worst", number=0) == ["1/1", "1/0"]


def test_a_filter_looks_through_all_steps_the_newest_first(run_dir: Path) -> None:
    assert found(run_dir, cancelled=True) == ["1/2"]
    assert found(run_dir, failed=True) == ["5/0"]
    assert found(run_dir, failed=True, cancelled=True) == ["5/0", "1/2"]
    assert found(run_dir, prompt_id=1) == ["6/0", "5/0", "1/0", "1/1", "1/2"]
    assert found(run_dir, pattern=re.compile("^f")) == ["4/0", "4/1"]
    assert found(run_dir, pattern=re.compile("e"), order="best") == ["1/0", "4/1"]
    assert found(run_dir, cancelled=True, number=1) == []


def test_evaluations_are_asked_for_by_version(run_dir: Path) -> None:
    assert found(run_dir, kind="held-out") == found(run_dir, kind="held-out", number=0) == ["0/0"]


def test_a_step_that_is_not_there_is_named_with_those_that_are(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"no samples of step 7; there are those of 0 to 2$"):
        found(run_dir, number=7)
    (run_dir / SAMPLES_DIR / "train-000001.jsonl.gz").unlink()
    with pytest.raises(ConfigError, match=r"there are those of 0, 2$"):
        found(run_dir, number=7)
    with pytest.raises(ConfigError, match="an evaluation of version 3; there are those of 0"):
        found(run_dir, number=3, kind="held-out")


@pytest.mark.parametrize("query", [{}, {"cancelled": True}, {"kind": "held-out"}, {"number": 3}])
def test_a_run_without_samples_says_so(tmp_path: Path, query: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="no samples of"):
        found(tmp_path, **query)


def test_a_damaged_file_is_named_and_left_out(run_dir: Path) -> None:
    path = run_dir / SAMPLES_DIR / "train-000001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:30])
    reader = RunRollouts(run_dir)
    assert [each.sample for each in reader.find(Query(prompt_id=1))] == ["6/0", "1/0", "1/1", "1/2"]
    assert list(reader.damaged) == ["train-000001.jsonl.gz"]
