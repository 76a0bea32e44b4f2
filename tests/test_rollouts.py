"""Files of rollouts: what is written is read, a damaged one is refused, and which two samples show the range."""

import gzip
import importlib
from pathlib import Path
from typing import Any

import pytest

from darts_async.rollouts import (
    FileName,
    Rollout,
    best_and_worst,
    encode_rollouts,
    groups_of,
    parse_name,
    read_rollouts,
    rollout_files,
)


def rollout(sample: str = "7/0", **fields: Any) -> Rollout:
    """A sample, its own group and index apart from what is given."""
    group_id, index = map(int, sample.split("/"))
    given = {"kind": "train", "step": 3, "prompt_id": 1, "prompt": "1 +1 =", "text": "2", "outcome": "trained"} | fields
    return Rollout(sample=sample, group_id=group_id, sample_index=index, **given)


def test_what_is_written_is_read_and_the_same_rollouts_are_the_same_bytes(tmp_path: Path) -> None:
    some = [
        rollout("7/0", text="naïve\n\u202e", tokens=["na", "", "ïve"], logprobs=[-0.5, 0.0, -1e-4], reward=0.25),
        rollout("7/1", outcome="cancelled", reward=None, metadata={"a": [1, {"b": None}]}),
    ]
    path = tmp_path / str(FileName("train", 3))
    path.write_bytes(encode_rollouts(some))
    assert read_rollouts(path) == some
    assert encode_rollouts(some) == encode_rollouts(some) == path.read_bytes()
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == 2, "a line is a sample, whatever its text"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"\x00" + data[1:],
        lambda data: data[:20] + bytes([data[20] ^ 255]) + data[21:],
        lambda data: gzip.compress(b'{"kind":"train"}\n'),
        lambda data: gzip.compress(b"\xff\xfe\n"),
    ],
    ids=["half", "a byte short", "head", "flipped", "of another version", "no text"],
)
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "train-000003.jsonl.gz"
    path.write_bytes(damage(encode_rollouts([rollout(f"7/{index}") for index in range(9)])))
    with pytest.raises(ValueError, match=r"\S"):
        read_rollouts(path)


def test_files_are_found_by_kind_and_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("train-000010", "train-000009", "train-1000000", "held-out-000008"):
        (tmp_path / f"{name}.jsonl.gz").touch()
    for name in ("train-000011.jsonl.gz.new", "train-x.jsonl.gz", "notes.txt"):
        (tmp_path / name).touch()
        assert parse_name(name) is None
    assert list(rollout_files(tmp_path, "train")) == [9, 10, 1_000_000]
    assert list(rollout_files(tmp_path, "held-out")) == [8]
    assert rollout_files(tmp_path / "missing", "train") == {}
    assert parse_name(str(FileName("held-out", 8))) == FileName("held-out", 8)


def test_the_two_that_show_the_range_are_by_reward_and_else_by_length() -> None:
    good, bad = rollout("7/0", reward=1.0, length=9), rollout("7/1", reward=0.0, length=5)
    long, unscored = rollout("7/2", reward=1.0, length=30), rollout("7/3", outcome="cancelled", length=99)
    assert best_and_worst([unscored, bad, long, good]) == [good, bad]
    assert best_and_worst([long, unscored, good]) == [good, long]
    assert best_and_worst([unscored, good]) == [good]
    assert best_and_worst([]) == []


def test_samples_are_grouped_as_they_come() -> None:
    some = [rollout("7/0"), rollout("7/1"), rollout("8/0"), rollout("7/2")]
    assert [[each.sample for each in group] for group in groups_of(some)] == [["7/0", "7/1"], ["8/0"], ["7/2"]]


def test_a_failed_reward_is_not_one_of_zero() -> None:
    assert rollout(outcome="filtered", why="reward_timeout").has_failed
    assert rollout(outcome="filtered", why="rejected_by_engine").has_failed
    assert not rollout(outcome="filtered", why="not_selected", reward=0.0).has_failed


@pytest.mark.slow
def test_a_file_is_a_table_for_pandas(tmp_path: Path) -> None:
    pandas = importlib.import_module("pandas")
    path = tmp_path / str(FileName("train", 3))
    path.write_bytes(encode_rollouts([rollout("7/0", reward=0.5, tokens=["a", ""]), rollout("7/1", reward=None)]))
    table = pandas.read_json(path, lines=True)
    assert list(table.columns) == list(Rollout.__struct_fields__)
    assert table.reward.mean() == 0.5, "what is missing is no zero"
    assert table.tokens[0] == ["a", ""]
