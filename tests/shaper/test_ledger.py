"""The ledger survives a torn tail."""

import tracemalloc
from pathlib import Path

import pytest

from darts_async.protocol import sample_id_of
from darts_async.shaper.ledger import (
    AnyRecord,
    BroughtForward,
    GroupDropped,
    GroupOpened,
    GroupShipped,
    LearnerRewound,
    LedgerWriter,
    Lineage,
    Position,
    RunReopened,
    SampleEnded,
    SamplePlaced,
    StepCommitted,
    TakenBack,
    VersionSeen,
    WeightsAcknowledged,
    read_ledger,
    scan_ledger,
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
    RunReopened(1, 2),
    BroughtForward(9, 1, 2, {"trained": 3}, {"trained": 30}),
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


def test_reading_stops_at_any_damage_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, RECORDS)
    data = path.read_bytes()
    whole = scan_ledger(path)
    assert (list(whole.records), whole.num_bytes, whole.damaged_at) == (RECORDS, len(data), None)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        found = scan_ledger(path)
        assert list(found.records) == RECORDS[: len(found.records)]
        assert found.damaged_at == found.num_bytes <= place
    assert scan_ledger(tmp_path / "nowhere").records[:] == []


def test_what_was_taken_back_is_void_and_the_numbers_go_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    life_2 = [TakenBack(2), RunReopened(0, 2), VersionSeen(5)]
    write(path, [*map(VersionSeen, range(4)), *life_2])
    found = scan_ledger(path)
    assert list(found.records) == [VersionSeen(0), VersionSeen(1), RunReopened(0, 2), VersionSeen(5)]
    assert (found.counted.num_void, found.counted.lineage.num_records, found.counted.lineage.firsts) == (
        2,
        4,
        {1: 0, 2: 2},
    )
    assert [found.counted.lineage.holds(Position(1, place)) for place in range(5)] == [True, True, True, False, False]
    assert [found.counted.lineage.holds(Position(2, place)) for place in range(6)] == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]
    assert not found.counted.lineage.holds(Position(3, 4))
    write(path, [TakenBack(1), RunReopened(0, 3)])
    found = scan_ledger(path)
    assert list(found.records) == [VersionSeen(0), RunReopened(0, 3)]
    assert not found.counted.lineage.holds(Position(2, 2)), "none of the records of that life counts any more"
    assert found.counted.lineage.holds(Position(1, 1))


def test_after_sums_the_numbers_go_on_after_the_lost_records(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, [VersionSeen(0), BroughtForward(50, 1, 2, {}, {}), RunReopened(1, 2), VersionSeen(3), TakenBack(52)])
    found = scan_ledger(path)
    assert list(found.records) == [VersionSeen(0), BroughtForward(50, 1, 2, {}, {}), RunReopened(1, 2)]
    assert found.counted.lineage.num_records == 52
    assert not found.counted.lineage.holds(Position(1, 1)), "whether that was before the loss is not known"
    assert found.counted.lineage.holds(Position(2, 52))


def test_a_lineage_counts_what_a_ledger_holds() -> None:
    lineage = Lineage()
    for record in RECORDS[:5]:
        lineage.take(record)
    assert lineage.num_records == 5


def test_a_sample_of_a_long_run_takes_less_than_a_hundred_bytes(tmp_path: Path) -> None:
    """Opened in groups of ten, placed, ended, eight of them trained. The numbers are those of step 10,000."""
    path, first = tmp_path / "ledger", 320_000
    for group_id in range(first, first + 100):
        ids = [sample_id_of(group_id, index) for index in range(10)]
        ends = [SampleEnded(i, "trained", "committed", 1733, 10_000, 10_002, 10_003, 1.0) for i in ids[:8]]
        write(
            path,
            [
                GroupOpened(group_id, 54_321, "train", 10, 10_000, group_id),
                *(SamplePlaced(sample_id, "generator/12", 2) for sample_id in ids),
                *(SampleEnded(i, "cancelled", "survivor", 1733, 10_000, 10_002, None, None) for i in ids[8:]),
                GroupShipped(group_id, 10_003),
                *ends,
            ],
        )
    write(path, [StepCommitted(10_003, tuple(range(first, first + 100)))])
    assert 80 < path.stat().st_size / 1000 < 100


def test_a_ledger_that_was_read_takes_little_more_memory_than_its_file(tmp_path: Path) -> None:
    """And 8 bytes for each record twice: written, and counted. As objects it was twelve times the file."""
    path = tmp_path / "ledger"
    write(path, [SamplePlaced(sample_id, "generator/0", 1) for sample_id in range(1 << 40, (1 << 40) + 3000)])
    scan_ledger(path)
    tracemalloc.start()
    found = scan_ledger(path)
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.records) == 3000
    assert held_bytes < 1.2 * path.stat().st_size + 2 * 8 * 3000


def test_what_is_counted_after_the_file_was_read_is_compared_with_what_was_read(tmp_path: Path) -> None:
    """A journal tells the same again, then something else; neither changes what was read."""
    path = tmp_path / "ledger"
    write(path, [VersionSeen(version) for version in range(5)])
    found, at = scan_ledger(path), scan_ledger(path).written.begin(3)
    replayed = found.until(at, 3, {1: 0})
    assert replayed is not None
    assert found.counted.corrected_to(replayed) == [TakenBack(3)]
    replayed.take(VersionSeen(3))
    assert found.counted.corrected_to(replayed) == [TakenBack(4)]
    replayed.take(VersionSeen(40))
    replayed.take(VersionSeen(41))
    assert found.counted.corrected_to(replayed) == [TakenBack(4), VersionSeen(40), VersionSeen(41)]
    replayed.take(TakenBack(2))
    replayed.take(VersionSeen(42))
    assert found.counted.corrected_to(replayed) == [TakenBack(2), VersionSeen(42)]
    assert replayed.num_void == 4
    assert list(found.records) == [VersionSeen(version) for version in range(5)]
    assert found.until(at - 1, 3, {1: 0}) is None
