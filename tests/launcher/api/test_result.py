"""The numbers of a run, as Python code reads them."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.api.result import StepLines, read_result
from launcher.api.run import _Launcher, _words
from launcher.run_dir.run_dir import RunRecord, write_record
from launcher.settings_tree import read_tree


def lines_of(*objects: dict[str, object]) -> StepLines:
    lines = StepLines()
    for each in objects:
        lines.add(each)
    return lines


def test_the_parts_of_a_step_are_put_together_and_a_later_value_wins() -> None:
    lines = lines_of(
        {"type": "step", "step": 0, "loss": 1.0},
        {"type": "step", "step": 0, "stall": 0.1},
        {"type": "resumed", "life": 2},
        {"type": "step", "step": 0, "loss": 2.0},
    )
    assert lines.steps == {0: {"loss": 2.0, "stall": 0.1}}


def test_a_step_is_told_once_and_when_the_next_has_begun() -> None:
    lines = lines_of({"type": "step", "step": 0})
    assert lines.take_complete(is_over=False) == []
    for step in (1, 2, 1, 0):
        lines.add({"type": "step", "step": step})
    assert lines.take_complete(is_over=False) == [0, 1]
    assert lines.take_complete(is_over=False) == []
    assert lines.take_complete(is_over=True) == [2]
    assert lines.take_complete(is_over=True) == []


def test_a_result_is_what_the_directory_says(tmp_path: Path) -> None:
    write_record(tmp_path, RunRecord("stopped", "enough", 1.0, 2.0, os.getpid()))
    evaluation = {"type": "evaluation", "policy_version": 0, "newest_version": 0, "reward": 0.5}
    steps = [{"type": "step", "step": step, "loss": float(step)} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (evaluation, *steps)))
    result = read_result(tmp_path)
    assert (result.status, result.reason, result.model_path) == ("stopped", "enough", None)
    assert result.series("loss") == [0.0, 1.0, 2.0]
    assert [each["reward"] for each in result.evaluations] == [0.5]
    with pytest.raises(KeyError, match=r"no step has 'los'; the metrics are loss"):
        result.series("los")


def test_overrides_keep_every_character() -> None:
    tree = read_tree([(Path("run.yaml"), "name: x")], _words({"prompts.system_prompt": "hi 😀 \u2028é", "seed": 3}))
    assert tree.values == {"name": "x", "prompts": {"system_prompt": "hi 😀 \u2028é"}, "seed": 3}


def test_a_run_with_the_pid_of_an_earlier_one_is_not_taken_for_it(tmp_path: Path) -> None:
    for name, started_at_s in (("old", time.time() - 100), ("new", time.time() + 1)):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, RunRecord("finished", "", started_at_s, None, os.getpid()))
    process = SimpleNamespace(pid=os.getpid(), poll=lambda: 0)
    launcher = _Launcher(cast(Any, process), cast(Any, None))
    assert launcher._run_dir(tmp_path) == tmp_path / "new"
    shutil.rmtree(tmp_path / "new")
    assert launcher._run_dir(tmp_path) is None
