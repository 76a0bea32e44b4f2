"""The history of one sample or group: all its records in the ledger and in the journal, in order.

    darts-launch story RUN_DIR 7            group 7
    darts-launch story RUN_DIR 7/3          sample 3 of group 7
    darts-launch story RUN_DIR sample/28675 the sample with this id, as the audit names it

The ledger covers a run from its beginning. The journal has a head, with what the shaper knew of a sample then, and the
messages to the shaper since.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts_async.errors import ConfigError
from darts_async.protocol import (
    SAMPLES_PER_GROUP_LIMIT,
    SampleCancelled,
    SampleFinished,
    SampleRejected,
    SampleScored,
    ScoreFailed,
    TokensDecoded,
    group_id_of,
    sample_id_of,
)
from darts_async.shaper.durable.journal import FoundJournal, read_journal
from darts_async.shaper.durable.replayable_state import Heard
from darts_async.shaper.ledger import (
    AnyRecord,
    FoundLedger,
    GroupDropped,
    GroupOpened,
    GroupShipped,
    SampleEnded,
    SamplePlaced,
    StepCommitted,
    scan_ledger,
)
from darts_async.topology.run_files import JOURNAL_FILE, LEDGER_FILE


@dataclass(frozen=True, slots=True)
class Subject:
    """What a story is about: a group, or one sample of it."""

    group_id: int
    sample_id: int | None = None

    def is_about(self, sample_id: int) -> bool:
        return sample_id == self.sample_id if self.sample_id is not None else group_id_of(sample_id) == self.group_id

    def __str__(self) -> str:
        return f"group {self.group_id}" if self.sample_id is None else f"sample {_name(self.sample_id)}"


@dataclass(frozen=True, slots=True)
class Line:
    """One event."""

    source: str
    """`ledger` or `journal`."""
    text: str
    is_void: bool = False
    """The run was resumed from an earlier point, so this no longer counts."""


def parse_subject(text: str) -> Subject:
    """Read `GROUP`, `GROUP/INDEX` or `sample/ID`.

    Raises:
        ConfigError: the text has another form.

    Example:
        >>> parse_subject("7/3")
        Subject(group_id=7, sample_id=28675)
    """
    head, slash, tail = text.partition("/")
    if head == "sample" and tail.isdecimal():
        return Subject(group_id_of(int(tail)), int(tail))
    if head.isdecimal() and not slash:
        return Subject(int(head))
    if head.isdecimal() and tail.isdecimal() and int(tail) < SAMPLES_PER_GROUP_LIMIT:
        return Subject(int(head), sample_id_of(int(head), int(tail)))
    raise ConfigError(f"{text!r} names no sample or group: give GROUP, GROUP/INDEX or sample/ID, for example 7 or 7/3")


def read_story(run_dir: Path, subject: Subject) -> list[Line]:
    """All that the files of a run have about it. Raises `ConfigError` if they have nothing, or cannot be read."""
    try:
        journal, ledger = read_journal(run_dir / JOURNAL_FILE), scan_ledger(run_dir / LEDGER_FILE)
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be read: {error}; check that you may read its files") from error
    lines = [*of_ledger(ledger, subject), *of_journal(journal, subject)]
    if not lines:
        last = max((r.group_id for r in ledger.records if isinstance(r, GroupOpened)), default=None)
        known = "has no group" if last is None else f"has groups up to {last}"
        raise ConfigError(f"{run_dir} has nothing about {subject}: its ledger {known}")
    return lines


def of_ledger(ledger: FoundLedger, subject: Subject) -> Iterator[Line]:
    """The records about it, including void ones."""
    counting = {ledger.records.begin(number) for number in range(len(ledger.records))}
    for number, record in enumerate(ledger.written):
        text = _of_record(record, subject)
        if text:
            yield Line("ledger", text, is_void=ledger.written.begin(number) not in counting)


def of_journal(journal: FoundJournal, subject: Subject) -> Iterator[Line]:
    """What the shaper knew about it at the beginning of the journal, and the messages since."""
    if journal.head is not None:
        for group in journal.head.snapshot.work.groups:
            if group.group_id == subject.group_id:
                samples = [sample for sample in group.samples if subject.is_about(sample.sample_id)]
                yield from (Line("journal", f"known: {sample.story()}") for sample in samples)
    for given in journal.inputs:
        if isinstance(given, Heard):
            for text in _of_message(given.message, subject):
                yield Line("journal", f"{given.now_s:.3f} s: {given.peer} says: {text}")


def _of_record(record: AnyRecord, subject: Subject) -> str:
    match record:
        case GroupOpened(group_id=subject.group_id):
            return (
                f"opened for prompt {record.prompt_id} with {record.num_samples} samples to {record.purpose}; "
                f"no token is older than version {record.floor}"
            )
        case GroupShipped(group_id=subject.group_id, step=step):
            return f"its group was shipped to the learner for step {step}"
        case GroupDropped(group_id=subject.group_id, reason=reason):
            return f"its group was dropped: {reason}"
        case StepCommitted(step=step, group_ids=group_ids) if subject.group_id in group_ids:
            return f"step {step} was completed with its group in the gradient"
        case SamplePlaced(sample_id=sample_id) if subject.is_about(sample_id):
            return f"{_name(sample_id)} was given to {record.generator} (incarnation {record.incarnation})"
        case SampleEnded(sample_id=sample_id) if subject.is_about(sample_id):
            return _of_end(record)
    return ""


def _of_end(record: SampleEnded) -> str:
    has_tokens = record.oldest_version is not None
    versions = f" of versions {record.oldest_version} to {record.newest_version}" if has_tokens else ""
    reward = "no reward" if record.reward is None else f"reward {record.reward:g}"
    step = "" if record.step is None else f" in step {record.step}"
    end = f"{_name(record.sample_id)} ended {record.outcome}{step} ({record.reason or 'no reason'})"
    return f"{end}: {record.num_tokens} tokens{versions}, {reward}"


def _of_message(message: Any, subject: Subject) -> Iterator[str]:
    match message:
        case TokensDecoded(sample_ids=ids, num_tokens=counts, policy_version=version):
            for sample_id, count in zip(ids.tolist(), counts.tolist(), strict=True):
                if subject.is_about(sample_id):
                    yield f"{_name(sample_id)} has {count} more tokens of version {version}"
        case SampleFinished(sample_id=sample_id) if subject.is_about(sample_id):
            yield f"{_name(sample_id)} is complete ({message.finish_reason}) with {message.num_tokens} tokens"
        case SampleCancelled(sample_id=sample_id) if subject.is_about(sample_id):
            yield f"{_name(sample_id)} is cancelled with {message.num_tokens} tokens"
        case SampleRejected(sample_id=sample_id) if subject.is_about(sample_id):
            yield f"{_name(sample_id)} is rejected: {message.error}"
        case SampleScored(sample_id=sample_id) if subject.is_about(sample_id):
            yield f"{_name(sample_id)} has the reward {message.reward:g}"
        case ScoreFailed(sample_id=sample_id) if subject.is_about(sample_id):
            yield f"the reward of {_name(sample_id)} failed ({message.kind}): {message.error}"


def _name(sample_id: int) -> str:
    return f"{group_id_of(sample_id)}/{sample_id % SAMPLES_PER_GROUP_LIMIT}"
