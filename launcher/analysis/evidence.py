"""Checks the ledger against the other files of a run directory, so that a missing ledger does not pass an audit.

    metrics.jsonl     reports no step that the ledger does not know
    checkpoints/      has no version that the ledger does not explain
    shaper.journal    refers to no more records than the ledger has

A resumed run may continue from an earlier point. The ledger then says so (`RunReopened`, with the number of the life).
So files from before the newest life in the ledger are not compared with it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from darts_async.shaper.durable.journal import FoundJournal
from darts_async.shaper.durable.recovery import seen_by
from darts_async.shaper.ledger import FoundLedger, RunReopened
from darts_async.topology.run_files import CHECKPOINTS_DIR, JOURNAL_FILE, METRICS_FILE
from launcher.analysis.audit_books import Books, Finding
from launcher.progress.run_view import REWARD_METRIC
from launcher.run_dir.json_lines import read_lines
from launcher.run_dir.run_dir import RunRecord


def evidence_against(
    run_dir: Path, ledger: FoundLedger, books: Books, journal: FoundJournal, record: RunRecord | None
) -> Iterator[Finding]:
    """What the other files show and the ledger does not.

    Args:
        journal: read before the ledger.
        record: the state of the run, if it can be read.
    """
    if ledger.damaged_at is not None:
        yield Finding("byte of the ledger from which on it cannot be read", (ledger.damaged_at,))
    num_steps, life = known_steps(ledger, books), newest_life(ledger)
    unknown = {step for step in reported_steps(read_lines(run_dir / METRICS_FILE).objects, life) if step >= num_steps}
    yield Finding(f"steps in {METRICS_FILE} that the ledger does not know", tuple(unknown))
    versions = set(_checkpoints(run_dir, record if record is not None and record.life == life > 1 else None))
    later = {version for version in versions if version > num_steps}
    yield Finding(f"versions in {CHECKPOINTS_DIR}/ that the ledger does not explain", tuple(later))
    if record is None or record.status != "finished":
        yield from _journal_findings(run_dir, journal, ledger)


def known_steps(ledger: FoundLedger, books: Books) -> int:
    """Steps that the ledger can explain: completed steps, and steps for which at least one group was shipped."""
    shipped = max((step for steps in books.shipped.values() for step in steps), default=-1)
    return max(len(books.history), shipped + 1, books.brought.num_steps)


def newest_life(ledger: FoundLedger) -> int:
    """The number of the life that wrote the end of the ledger."""
    return max((record.life for record in ledger.records if isinstance(record, RunReopened)), default=1)


def reported_steps(lines: Iterable[dict[str, Any]], life: int) -> set[int]:
    """The steps that the shaper has reported in this life of the run, or in a later one."""
    steps, current = set(), 1
    for line in lines:
        if line["type"] == "resumed" and isinstance(line.get("life"), int):
            current = line["life"]
        is_shapers = line["type"] == "step" and REWARD_METRIC in line and isinstance(line.get("step"), int)
        if is_shapers and current >= life:
            steps.add(line["step"])
    return steps


def _checkpoints(run_dir: Path, since: RunRecord | None) -> Iterator[int]:
    """The versions of all checkpoints, or of those written in this life of the run."""
    for path in (run_dir / CHECKPOINTS_DIR).glob("step-*"):
        version = path.name.removeprefix("step-")
        if version.isdigit() and (since is None or path.stat().st_mtime >= since.started_at_s):
            yield int(version)


def _journal_findings(run_dir: Path, journal: FoundJournal, ledger: FoundLedger) -> Iterator[Finding]:
    if journal.fault and (ledger.records or (run_dir / JOURNAL_FILE).exists()):
        yield Finding(f"byte from which on the journal cannot be read: {journal.fault}", (journal.num_bytes,))
    if journal.head is not None and seen_by(journal.head, ledger) is None:
        seen = journal.head.place.num_records
        yield Finding("records, by their number, that the journal has seen written and the ledger lacks", (seen,))
