"""A full disk: records stay whole, nothing dies of it, and what waited goes on."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from darts_async import actor
from darts_async.errors import (
    NO_SPACE_EXIT_CODE,
    PERMANENT_EXIT_CODE,
    CheckpointError,
    ModelError,
    NoSpaceError,
    RewardError,
)
from darts_async.machine import full_disk as disk
from darts_async.machine.full_disk import Patience, Room, append_whole, has_room, is_no_space, room_of
from darts_async.shaper.ledger import LedgerWriter, VersionSeen, read_ledger
from darts_async.telemetry import LogFile
from darts_async.topology.run_files import older_path
from darts_async.wire.atomic_file import replace_file
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.nodes.node_record import NodeRecord, read_node_record, write_node_record
from launcher.nodes.supervisor import ProcessRecord
from launcher.progress.step_merger import StepLine
from launcher.run_dir import json_lines
from launcher.run_dir.place import inode_of
from launcher.run_dir.run_dir import read_record
from launcher.sinks import recorder
from launcher.sinks.recorder import Recorder

FULL = OSError(errno.ENOSPC, "No space left on device")


class FullDisk:
    """Stands in for `os` where files are written: so many bytes are taken, and then no more."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        taken = min(self.left, len(data))
        if not taken:
            raise FULL
        self.left -= taken
        return os.write(descriptor, data[:taken])


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """A disk that takes five bytes."""
    found = FullDisk(5)
    monkeypatch.setattr(disk, "os", found)
    return found


def test_a_record_is_on_the_disk_completely_or_not_at_all(tmp_path: Path, full: FullDisk) -> None:
    path = tmp_path / "records"
    path.write_bytes(b"before")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    with pytest.raises(NoSpaceError, match=r"records cannot be written: no space left on .* MiB free\)"):
        append_whole(descriptor, b"0123456789", path)
    assert path.read_bytes() == b"before"
    full.left = 100
    append_whole(descriptor, b"0123456789", path)
    assert path.read_bytes() == b"before0123456789"
    os.close(descriptor)


def test_a_ledger_on_a_full_disk_ends_in_a_whole_record(tmp_path: Path, full: FullDisk) -> None:
    full.left = 10_000
    ledger = LedgerWriter(tmp_path / "ledger")
    ledger.append([VersionSeen(1)])
    full.left, num_bytes = 5, ledger.num_bytes
    with pytest.raises(NoSpaceError):
        ledger.append([VersionSeen(2)])
    assert ledger.num_bytes == num_bytes == (tmp_path / "ledger").stat().st_size
    ledger.close()
    assert list(read_ledger(tmp_path / "ledger")) == [VersionSeen(1)]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (FULL, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError('Error: IoError(Os { code: 28, message: "No space left on device" })'), True),
        (caused(CheckpointError("a checkpoint cannot be written"), FULL), True),
        (caused(RewardError("importing it raised"), FULL), False),
        (CheckpointError("the text of a model: No space left on device"), False),
        (ExceptionGroup("", [ValueError("x"), ExceptionGroup("", [FULL])]), True),
        (None, False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error: Exception | None, is_it: bool) -> None:
    assert is_no_space(error) is is_it


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([FULL], NO_SPACE_EXIT_CODE),
        ([CheckpointError("torn"), NoSpaceError("full")], NO_SPACE_EXIT_CODE),
        ([NoSpaceError("full"), ModelError("wrong")], PERMANENT_EXIT_CODE),
        ([CheckpointError("torn")], 1),
        ([CheckpointError("torn"), ValueError("ours")], None),
    ],
)
def test_the_exit_code_says_why_a_process_ended(errors: list[Exception], code: int | None) -> None:
    assert actor._exit_code(errors) == code


def test_a_room_is_named_by_its_mount_and_what_is_free(tmp_path: Path) -> None:
    room = room_of(tmp_path / "nothing" / "there")
    assert room.mount.is_mount()
    assert str(Room(Path("/data"), 1 << 19, 8 << 30)) == "no space left on /data (0.5 of 8,192.0 MiB free)"
    assert has_room(tmp_path)
    assert not list(tmp_path.iterdir())


class Clock:
    """Time that passes by sleeping; every second someone frees `freed_bytes`."""

    def __init__(self, freed_bytes: int) -> None:
        self.now_s, self.freed_bytes = 0.0, freed_bytes

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def room_of(self, path: Path) -> Room:
        return Room(path, int(self.now_s) * self.freed_bytes, 1 << 30)


def test_what_needs_room_waits_off_the_loop_says_so_and_is_written_when_there_is_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, patience, said = Clock(freed_bytes=disk.TRIAL_BYTES // 4), Patience(100.0), []
    monkeypatch.setattr(disk, "time", clock)
    monkeypatch.setattr(disk, "room_of", clock.room_of)
    monkeypatch.setattr(clock, "sleep", lambda s: (said.append(patience.hindrance), Clock.sleep(clock, s)))
    tries: list[float] = []

    def write() -> str:
        tries.append(clock.now_s)
        if len(tries) < 3:
            raise FULL
        return "written"

    undone: list[float] = []
    assert patience.write(Path("/data"), write, lambda: undone.append(clock.now_s)) == "written"
    assert tries == [0.0, 4.0, 8.0], "when there was more room than had not been enough"
    assert undone == [0.0, 4.0], "others need the room meanwhile"
    assert all("no space left on /data" in each for each in said)
    assert patience.hindrance == ""


def test_the_wait_for_room_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(freed_bytes=0)
    monkeypatch.setattr(disk, "time", clock)
    monkeypatch.setattr(disk, "room_of", clock.room_of)

    def write() -> None:
        raise FULL

    with pytest.raises(NoSpaceError, match=r"no space left on /data .* for 70 s"):
        Patience(70.0).write(Path("/data"), write, lambda: None)
    assert clock.now_s == 70.0


def test_a_log_leaves_lines_out_rather_than_end_its_process_and_counts_them(tmp_path: Path, full: FullDisk) -> None:
    path = tmp_path / "a.jsonl"
    log = LogFile(path, 10_000)
    for number in range(3):
        log.write(f"line {number}\n")
    assert path.read_text() == ""
    full.left = 1000
    log.write("line 3\n")
    log.write("line 4\n")
    log.close()
    first, *rest = path.read_text().splitlines()
    assert json.loads(first) == {"event": "lines_left_out", "number": 3}
    assert rest == ["line 3", "line 4"]


def test_a_log_in_a_directory_that_takes_no_file_is_left_out(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "missing" / "a.jsonl", 10_000)
    log.write("line\n")
    log.close()
    assert not list(tmp_path.iterdir())


def test_the_launchers_lines_wait_for_room_and_none_is_lost_or_torn(tmp_path: Path, full: FullDisk) -> None:
    found = Recorder(tmp_path, 0.0)
    for step in range(3):
        found.step(StepLine(step, {"reward/mean": 0.5}), 1.0)
    found.resumed(2, [], 1.0)
    assert "metrics.jsonl cannot be written: no space left on" in found.settle()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    full.left = 100_000
    assert found.settle() == ""
    steps = [json.loads(line).get("step") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, None], "and the start of a life"
    assert json.loads((tmp_path / "events.jsonl").read_text())["life"] == 2


def test_the_launchers_lines_are_bounded_while_they_wait(
    tmp_path: Path, full: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_UNWRITTEN", 3)
    found = Recorder(tmp_path, 0.0)
    for step in range(10):
        found.step(StepLine(step, {}), 1.0)
    full.left = 10_000
    found.settle()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [7, 8, 9], "the oldest are left out"


def test_a_file_that_cannot_be_replaced_is_as_it_was_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = ProcessRecord("keeper/a", 1, 1.0, ("a",))
    (tmp_path / "nodes").mkdir()
    write_node_record(tmp_path, "a", NodeRecord(1, inode_of(tmp_path), me))

    def torn(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:1])
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", torn)
        with pytest.raises(NoSpaceError, match=r"a\.json cannot be written: no space left on"):
            write_node_record(tmp_path, "a", NodeRecord(2, inode_of(tmp_path), me))
    assert read_node_record(tmp_path, "a") == NodeRecord(1, inode_of(tmp_path), me)
    assert [path.name for path in (tmp_path / "nodes").iterdir()] == ["a.json"]
    replace_file(tmp_path / "nodes" / "a.json", b"new")
    assert (tmp_path / "nodes" / "a.json").read_bytes() == b"new"


def test_how_a_run_has_ended_is_said_even_where_its_state_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorder.recorded(tmp_path, 1) as ending:
        ending.outcome = RunOutcome("finished", "all steps taken")
        monkeypatch.setattr(Path, "write_bytes", _full)
    assert ending.outcome == RunOutcome("finished", "all steps taken")
    assert ending.unsaid.startswith("state.json cannot be written: no space left on")
    assert read_record(tmp_path).status == "running", "as it would be had the launcher been killed"


def _full(path: Path, data: bytes) -> int:
    raise FULL


def test_a_full_log_becomes_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = LogFile(path, 2000)
    for number in range(1000):
        log.write(f"line {number:04}\n")
        total = sum(each.stat().st_size for each in tmp_path.iterdir())
        assert total <= 2 * (1000 + 10)
    log.close()
    lines = (older_path(path).read_text() + (path.read_text() if path.exists() else "")).splitlines()
    assert lines == [f"line {number:04}" for number in range(1000 - len(lines), 1000)], "the end is there, in order"
    assert len(lines) >= 100
