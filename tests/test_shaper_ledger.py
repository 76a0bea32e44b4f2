"""The ledger survives a torn tail."""

from pathlib import Path

import pytest

from darts_async.shaper.ledger import (
    AnyRecord,
    GroupDropped,
    GroupOpened,
    GroupShipped,
    LearnerRewound,
    LedgerWriter,
    RunReopened,
    SampleEnded,
    SamplePlaced,
    StepCommitted,
    StepsUndone,
    VersionSeen,
    WeightsAcknowledged,
    read_ledger,
)

RECORDS: list[AnyRecord] = [
    WeightsAcknowledged("generator/0", 1, 0),
    GroupOpened(0, 7, "train", 10, 0, 1),
    SamplePlaced(3, "generator/0", 1),
    SampleEnded(3, "trained", "committed", 42, 0, 1, 1, 0.5),
    SampleEnded(4, "cancelled", "survivor", 7, None, None, None, None),
    GroupShipped(0, 1),
    GroupDropped(1, "kept_learner_waiting"),
    StepCommitted(1, (0,)),
    LearnerRewound(1),
    StepsUndone(1),
    RunReopened(1),
    VersionSeen(2),
]


def write(path: Path, records: list[AnyRecord]) -> None:
    writer = LedgerWriter(path)
    writer.append(records)
    writer.close()


def test_records_come_back_as_they_were_and_are_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, RECORDS[:2])
    write(path, RECORDS[2:])
    assert list(read_ledger(path)) == RECORDS


@pytest.mark.parametrize("torn_bytes", [1, 5, 10])
def test_reading_stops_at_a_torn_tail(tmp_path: Path, torn_bytes: int) -> None:
    path = tmp_path / "ledger"
    write(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-torn_bytes])
    assert list(read_ledger(path)) == RECORDS[:-1]
