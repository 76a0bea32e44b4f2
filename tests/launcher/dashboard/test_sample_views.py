"""Groups as rows of bars, and one sample with its tokens."""

from pathlib import Path

import pytest

from darts_async.errors import ConfigError
from launcher.analysis.rollouts import RunRollouts
from launcher.dashboard.access import RefusedError
from launcher.dashboard.sample_views import group_rows, numbers_of, sample_view
from tests.launcher.analysis.test_rollouts import write
from tests.test_rollouts import rollout


@pytest.fixture
def reader(tmp_path: Path) -> RunRollouts:
    write(
        tmp_path,
        [
            rollout("7/0", text="clear \x1b[2J\u202e", tokens=["cl", "ear"], logprobs=[-0.5, -1.0], versions=[2, 3]),
            rollout("7/1", outcome="cancelled", why="survivor", length=40, metadata={"a": {"b\u202e": 1}}),
            rollout("9/0", prompt="q" * 1000, reward=1.0),
        ],
    )
    return RunRollouts(tmp_path)


def test_a_group_has_what_its_bars_need_and_no_responses(reader: RunRollouts) -> None:
    assert numbers_of(reader) == {"train": [3], "held-out": []}
    first, second = group_rows(reader, "train", "3")
    assert (first["group_id"], second["group_id"]) == (7, 9)
    assert first["samples"][1] == {
        **{"sample": "7/1", "length": 40, "outcome": "cancelled", "why": "survivor", "reward": None, "selected": False}
    }
    assert len(second["prompt"]) == 300
    assert "text" not in str(first)


def test_a_sample_has_everything_and_hides_nothing(reader: RunRollouts) -> None:
    found = sample_view(reader, "train", "3", "7/0")
    assert found["text"] == "clear \\u001b[2J\\u202e"
    assert (found["tokens"], found["logprobs"], found["versions"]) == (["cl", "ear"], [-0.5, -1.0], [2, 3])
    assert sample_view(reader, "train", "3", "7/1")["metadata"] == {"a": {"b\\u202e": 1}}


@pytest.mark.parametrize(
    ("kind", "number", "sample", "status"),
    [
        ("poem", "3", "7/0", 400),
        ("train", "-1", "7/0", 400),
        ("train", "9" * 5000, "7/0", 400),
        ("train", "3", "8/0", 404),
    ],
)
def test_what_is_not_there_is_refused(reader: RunRollouts, kind: str, number: str, sample: str, status: int) -> None:
    with pytest.raises(RefusedError) as refused:
        sample_view(reader, kind, number, sample)
    assert refused.value.status == status


def test_a_step_without_samples_and_a_damaged_file_are_named(reader: RunRollouts) -> None:
    with pytest.raises(ConfigError, match="no samples of step 4"):
        group_rows(reader, "train", "4")
    (reader.run_dir / "samples" / "train-000004.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(RefusedError, match="train-000004"):
        group_rows(reader, "train", "4")
