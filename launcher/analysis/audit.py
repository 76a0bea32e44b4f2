"""Audits a run directory: checks its ledger by itself (`audit_books`), and against the other files. So a missing ledger
does not pass.

    metrics.jsonl     reports no step that the ledger does not know
    checkpoints/      has no version that the ledger does not explain
    shaper.journal    refers to no more records than the ledger has
    summary.json      has as many tokens, which the engines counted

A resumed run may continue from an earlier point. The ledger then says so (`RunReopened`, with the number of the life).
So files from before the newest life in the ledger are not compared with it.

The audit reads a directory in any state as far as possible: of a run that was killed, that cannot be resumed, or whose
files have lost their ends.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from darts_async.errors import ConfigError
from darts_async.shaper.durable.journal import FoundJournal, read_journal
from darts_async.shaper.durable.recovery import seen_by
from darts_async.shaper.ledger import FoundLedger, RunReopened, scan_ledger
from darts_async.topology.run_files import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    JOURNAL_FILE,
    LEDGER_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
)
from launcher.analysis.audit_books import Books, Finding, audit
from launcher.config_file import load_config
from launcher.control.find_run import known_record
from launcher.display.summary import Summary
from launcher.progress.run_view import REWARD_METRIC
from launcher.run_dir.json_lines import read_lines
from launcher.run_dir.run_dir import RunRecord


@dataclass(frozen=True, slots=True)
class AuditReport:
    run_dir: str
    status: str
    num_groups: int
    num_samples: int
    num_ended: int
    num_trained: int
    findings: list[Finding]
    num_taken_back: int = 0
    """Records that are void, because the run was resumed from an earlier point."""
    num_only_in_sums: int = 0
    """Samples whose records are lost; only their sums are known."""


def audit_run(run_dir: Path) -> AuditReport:
    """Check the ledger of a run. Raises `ConfigError` if a file cannot be read at all, or the settings are gone."""
    record, config = known_record(run_dir), load_config(run_dir / CONFIG_FILE)
    try:
        journal = read_journal(run_dir / JOURNAL_FILE)  # before the ledger, which then has at least as many records
        ledger = scan_ledger(run_dir / LEDGER_FILE)
        books = Books.of(ledger.records)
        num_steps = config.learner.steps if record is not None and record.status == "finished" else None
        is_over = record is not None and record.status != "running"
        findings = [
            *audit(books, config, is_over=is_over, num_steps=num_steps),
            *evidence_against(run_dir, ledger, books, journal, record),
            *_unbalanced(run_dir, books),
        ]
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be audited: {error}; check that you may read its files") from error
    return AuditReport(
        run_dir=str(run_dir),
        status=record.status if record is not None else "not known",
        findings=[Finding(found.rule, tuple(sorted(found.ids))) for found in findings if found.ids],
        **_counts(ledger, books),
    )


def _counts(ledger: FoundLedger, books: Books) -> dict[str, int]:
    sums = books.brought.samples_by_outcome
    num_before = sum(sums.values())
    return {
        "num_groups": books.brought.next_group_id + len(books.opened),
        "num_samples": num_before + len(books.drawn),
        "num_ended": num_before + len(books.endings),
        "num_trained": sums.get("trained", 0) + sum(1 for _ in books.trained()),
        "num_taken_back": ledger.counted.num_void,
        "num_only_in_sums": max(0, num_before - _num_ended(books.before)),
    }


def _num_ended(books: Books | None) -> int:
    return len(books.endings) + _num_ended(books.before) if books is not None else 0


def _unbalanced(run_dir: Path, books: Books) -> list[Finding]:
    try:
        summary = msgspec.json.decode((run_dir / SUMMARY_FILE).read_bytes(), type=Summary)
    except FileNotFoundError:
        return []  # the run is live, or its launcher was killed
    except msgspec.MsgspecError as error:
        num_bytes = (run_dir / SUMMARY_FILE).stat().st_size
        return [Finding(f"bytes of {SUMMARY_FILE}, which cannot be read: {error}", (num_bytes,))]
    if summary.tokens is None:
        return []
    in_ledger = sum(books.brought.tokens_by_outcome.values()) + sum(record.num_tokens for record in books.ended())
    strays = summary.tokens.accounted - in_ledger  # from a generator that had lost the sample: no record has them
    findings = (
        []
        if summary.tokens.balanced
        else [Finding("tokens decoded and not accounted for", (summary.tokens.decoded - summary.tokens.accounted,))]
    )
    if not 0 <= strays <= summary.tokens.by_outcome["abandoned"]:
        findings.append(Finding("tokens of the summary that are not in the ledger", (strays,)))
    return findings


# --- the other files -----------------------------------------------------------------------------------------


def evidence_against(
    run_dir: Path, ledger: FoundLedger, books: Books, journal: FoundJournal, record: RunRecord | None
) -> Iterator[Finding]:
    """What the other files show and the ledger does not. The journal was read before the ledger."""
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
