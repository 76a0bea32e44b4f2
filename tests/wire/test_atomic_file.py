"""Files that survive a power loss: nothing gets a name before its contents are on the disk."""

import os
from pathlib import Path

import pytest

from darts_async.shaper.durable.journal import Journal
from darts_async.shaper.durable.replayable_state import ReplayableState, Ticked
from darts_async.topology.run_files import JOURNAL_FILE
from darts_async.wire.atomic_file import replace_file
from tests.shaper.durable.test_journal import make_state


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was flushed and renamed, in order."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        calls.append(("rename", path.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return calls


def test_a_file_is_flushed_before_it_gets_its_name_and_the_name_after_that(
    tmp_path: Path, done: list[tuple[str, str]]
) -> None:
    replace_file(tmp_path / "state", b"new")
    assert done == [("flush", "state.new"), ("rename", "state.new"), ("flush", tmp_path.name)]
    assert (tmp_path / "state").read_bytes() == b"new"


def test_a_journal_is_flushed_before_it_takes_the_place_of_another(tmp_path: Path, done: list[tuple[str, str]]) -> None:
    journal, replayable = Journal(tmp_path / JOURNAL_FILE), ReplayableState(make_state)
    journal.begin(replayable.to_head(0))
    assert done == [("flush", "shaper.new"), ("rename", "shaper.new"), ("flush", tmp_path.name)]
    journal.prepare(replayable.to_head(0))
    work = journal.flusher()
    journal.append([Ticked(1.0)])
    done.clear()
    work()
    assert done == [("flush", "shaper.journal"), ("flush", "shaper.new"), ("flush", tmp_path.name)]
    journal.replace()
    journal.close()
