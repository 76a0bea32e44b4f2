"""A shaper takes the place of another: in the same life of a run, from the journal to the last word; in another life of
it, from whatever the disk has kept.

In the same life only a process has died. What was written is there, and the peers continue from it: if journal and
ledger do not fit together, no guess is safe, and the run has to be ended first.

In another life all processes are new, and any of the files may have lost its end with the power, or its contents. What
can be taken up, the best first:

    the journal        if it can be read, and the newest checkpoint follows from it. Records of the ledger that follow
                       after its last input are taken back, and those that are missing are written
    the checkpoint     by what the shaper gave to it: what is later is void, and what was open then is asked again
    nothing            the run begins again, and all records are void

A life that has begun may find that its learner comes back at a checkpoint older than any group it knows, because the
later ones are damaged. Then another life begins at once, by itself (`protocol.TakeUpAgain`): so any checkpoint that is
kept is enough, at any time.

Where the ledger has lost records that were written before the place at which the shaper continues, they are lost for
good: it says so, with their sums, and what was open is asked again.
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
    """Where the process before stood when it died, in the same life of the run.

    What was decided is decided again, and what of it is missing in the ledger is written there. Nothing is sent.

    Raises:
        DataError: journal or ledger is not what this life has written.
    """
    if found.head is None or found.fault:
        raise DataError(f"{found.fault}; end the run and take it up again: darts-launch resume {ledger.path.parent}")
    replayable = ReplayableState.of(found.head, make_state)
    ledger.catch_up(found.head.ledger_bytes, _replayed(replayable, found))
    return replayable


@dataclass(frozen=True, slots=True)
class NewestCheckpoint:
    """Of a run that is taken up again."""

    policy_version: int
    shared: Shared | None
    """None if it has nothing of the shaper."""


def newest_checkpoint(run_dir: Path) -> NewestCheckpoint | None:
    """The newest checkpoint whose part of the shaper is whole, or empty. Whether the rest of it is whole is for the
    learner to say, which reads it.

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
        except FileNotFoundError:  # the learner begins meanwhile, and has found it damaged
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
    """To be written to the ledger."""
    outputs: list[Output]
    """To be sent after that."""
    source: str


def take_up_again(
    journal: FoundJournal,
    ledger: FoundLedger,
    checkpoint: NewestCheckpoint | None,
    make_state: MakeState,
    *,
    life: int,
    now_s: float,
) -> TakenUp:
    """Go on in another life, from its moment `now_s` on if no earlier one is known. `journal` is to hold nothing where
    it is not to be used."""
    replayable, records, source = _from_journal(journal, ledger, checkpoint, make_state, life)
    if replayable is None:
        replayable, records, source = _from_checkpoint(ledger, checkpoint, make_state, life, now_s)
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
    """What counted in the ledger when this head was taken; None if the ledger has lost some of it. What was written
    after that may be void in the meantime, or have made this void: a run starts over, and dies before the next head."""
    return ledger.until(head.ledger_bytes, head.place.num_records, head.firsts)


def _from_checkpoint(
    ledger: FoundLedger, checkpoint: NewestCheckpoint | None, make_state: MakeState, life: int, now_s: float
) -> tuple[ReplayableState, list[AnyRecord], str]:
    replayable = ReplayableState(make_state, life=life)
    replayable.lineage, replayable.now_s = ledger.counted.lineage, now_s
    if checkpoint is None or checkpoint.shared is None:  # if there is one, the learner says what it has
        return replayable, _recorded(replayable.begin_again()), "nothing"
    replayable.now_s = checkpoint.shared.now_s
    ready = LearnerReady(checkpoint.policy_version)
    outputs = replayable.start_over(ready, checkpoint.shared, replayable.now_s)
    return replayable, _recorded(outputs), f"the checkpoint of version {checkpoint.policy_version}"


def _replayed(replayable: ReplayableState, journal: FoundJournal) -> list[AnyRecord]:
    return _recorded([output for given in journal.inputs for output in replayable.take(given)])


def _recorded(outputs: list[Output]) -> list[AnyRecord]:
    return [output for output in outputs if not isinstance(output, SendTo | Forget)]
