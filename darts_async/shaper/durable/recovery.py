"""A new shaper continues from the files of the one before.

In the same life of a run only the shaper has died. Its files are complete, and its peers continue from them. If journal
and ledger contradict each other, no guess is safe, and the run has to be ended first.

In another life all processes are new, and any file may have lost its end, or all of its contents. The shaper continues
from the best of these:

    the journal        if it can be read and explains the newest checkpoint. Later records of the ledger become void,
                       and missing records are written
    the checkpoint     from the shaper's part of it. Later records become void, and open groups are asked again
    nothing            the run begins again, and all records become void

During a life, the learner may come back at a checkpoint that is older than any group the shaper knows, because later
checkpoints are damaged. Then another life begins by itself (`protocol.TakeUpAgain`). So any kept checkpoint is enough.

If the ledger has lost records from before the point at which the shaper continues, the shaper records their sums, and
groups that were open are asked again.
"""

from dataclasses import dataclass
from pathlib import Path

from darts_async.errors import DataError
from darts_async.protocol import LearnerReady
from darts_async.shaper.durable.journal import FoundJournal
from darts_async.shaper.durable.replayable_state import (
    JournalHead,
    MakeState,
    Reopened,
    ReplayableState,
    Shared,
    decode_shared,
)
from darts_async.shaper.ledger import AnyRecord, Counted, FoundLedger, LedgerWriter
from darts_async.shaper.outbox import Forget, Output, SendTo
from darts_async.topology.run_files import CHECKPOINTS_DIR, SHAPER_STATE_FILE


def take_up(found: FoundJournal, ledger: LedgerWriter, make_state: MakeState) -> ReplayableState:
    """The state in which the shaper died, in the same life of the run.

    The decisions are made again, and their records are written where the ledger lacks them. Nothing is sent.

    Raises:
        DataError: journal or ledger was not written by this life.
    """
    if found.head is None or found.fault:
        raise DataError(f"{found.fault}; end the run and take it up again: darts-launch resume {ledger.path.parent}")
    replayable = ReplayableState.of(found.head, make_state)
    ledger.catch_up(found.head.ledger_bytes, _replayed(replayable, found))
    return replayable


@dataclass(frozen=True, slots=True)
class NewestCheckpoint:
    """The newest checkpoint of a run that continues in another life."""

    policy_version: int
    shared: Shared | None
    """The shaper's part; None if it is empty."""


def newest_checkpoint(run_dir: Path) -> NewestCheckpoint | None:
    """The newest checkpoint whose shaper part is complete or empty. The learner checks the other parts.

    Raises:
        OSError: a file is there and cannot be read.
    """
    found = {
        int(path.parent.name.removeprefix("step-")): path
        for path in (run_dir / CHECKPOINTS_DIR).glob(f"step-*/{SHAPER_STATE_FILE}")
        if path.parent.name.removeprefix("step-").isdigit()
    }
    for version, path in sorted(found.items(), reverse=True):
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # the learner has just found it damaged, and renamed it
            continue
        shared = decode_shared(data)
        if shared is not None or not data:
            return NewestCheckpoint(version, shared)
    return None


@dataclass(frozen=True, slots=True)
class TakenUp:
    """Where a shaper continues in another life."""

    replayable: ReplayableState
    records: list[AnyRecord]
    """Records to write to the ledger."""
    outputs: list[Output]
    """Messages to send after that."""
    source: str


def take_up_again(
    journal: FoundJournal,
    ledger: FoundLedger,
    checkpoint: NewestCheckpoint | None,
    make_state: MakeState,
    *,
    life: int,
    now_s: float,
    make_before: MakeState | None = None,
) -> TakenUp:
    """Continue in another life. `now_s` is the time if no file has one. Pass an empty `journal` to ignore it.
    `make_before` makes a state under the settings of the journal, if they are not those of `make_state`."""
    replayable, records, source = _from_journal(journal, ledger, checkpoint, make_before or make_state, life)
    if replayable is None:
        replayable, records, source = _from_checkpoint(ledger, checkpoint, make_state, life, now_s)
    else:
        replayable.continue_with(make_state)
    outputs = replayable.take(Reopened(replayable.now_s, life))
    return TakenUp(replayable, records + _recorded(outputs), outputs, source)


def _from_journal(
    journal: FoundJournal,
    ledger: FoundLedger,
    checkpoint: NewestCheckpoint | None,
    make_state: MakeState,
    life: int,
) -> tuple[ReplayableState | None, list[AnyRecord], str]:
    if journal.head is None:
        return None, [], ""
    replayable = ReplayableState.of(journal.head, make_state)
    replayed = _replayed(replayable, journal)
    is_better = checkpoint is not None and checkpoint.shared is not None
    if checkpoint is not None and is_better and not replayable.state.explains(checkpoint.policy_version):
        return None, [], ""
    counted = seen_by(journal.head, ledger)
    if counted is not None:
        for record in replayed:
            counted.take(record)
        return replayable, ledger.counted.corrected_to(counted), "journal"
    replayable.life = life
    replayable.lineage.num_records = max(replayable.lineage.num_records, ledger.counted.lineage.num_records)
    ready = LearnerReady(replayable.state.num_steps)
    return replayable, _recorded(replayable.start_over(ready, None, replayable.now_s)), "journal, without the ledger"


def seen_by(head: JournalHead, ledger: FoundLedger) -> Counted | None:
    """The valid records of the ledger when this head was written; None if the ledger has lost some of them. Later
    records cannot be used: they may be void, or make earlier ones void, if the run has started over since."""
    return ledger.until(head.ledger_bytes, head.place.num_records, head.firsts)


def _from_checkpoint(
    ledger: FoundLedger, checkpoint: NewestCheckpoint | None, make_state: MakeState, life: int, now_s: float
) -> tuple[ReplayableState, list[AnyRecord], str]:
    replayable = ReplayableState(make_state, life=life)
    replayable.lineage, replayable.now_s = ledger.counted.lineage, now_s
    if checkpoint is None or checkpoint.shared is None:  # a checkpoint without it: the learner reports its version
        return replayable, _recorded(replayable.begin_again()), "nothing"
    replayable.now_s = checkpoint.shared.now_s
    ready = LearnerReady(checkpoint.policy_version)
    outputs = replayable.start_over(ready, checkpoint.shared, replayable.now_s)
    return replayable, _recorded(outputs), f"the checkpoint of version {checkpoint.policy_version}"


def _replayed(replayable: ReplayableState, journal: FoundJournal) -> list[AnyRecord]:
    return _recorded([output for given in journal.inputs for output in replayable.take(given)])


def _recorded(outputs: list[Output]) -> list[AnyRecord]:
    return [output for output in outputs if not isinstance(output, SendTo | Forget)]
