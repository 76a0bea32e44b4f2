"""Audits a run directory: checks its ledger by itself (`audit_books`) and against the other files (`evidence`).

The audit reads a directory in any state as far as possible: of a run that was killed, that cannot be resumed, or whose
files have lost their ends. The tokens of the ledger must equal those of the summary, which the engines counted.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from darts_async.errors import ConfigError
from darts_async.shaper.durable.journal import read_journal
from darts_async.shaper.ledger import FoundLedger, scan_ledger
from darts_async.topology.run_files import CONFIG_FILE, JOURNAL_FILE, LEDGER_FILE, SUMMARY_FILE
from launcher.analysis.audit_books import Books, Finding, audit
from launcher.analysis.evidence import evidence_against
from launcher.config_file import load_config
from launcher.control.find_run import known_record
from launcher.display.summary import Summary

__all__ = ["AuditReport", "Books", "Finding", "audit", "audit_run"]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The numbers of what was checked, and the findings."""

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
    """Samples whose ends are in these books and in all earlier ones."""
    return len(books.endings) + _num_ended(books.before) if books is not None else 0


def _unbalanced(run_dir: Path, books: Books) -> list[Finding]:
    try:
        summary = msgspec.json.decode((run_dir / SUMMARY_FILE).read_bytes(), type=Summary)
    except FileNotFoundError:
        return []  # the run is live, or its launcher was killed
    except msgspec.MsgspecError as error:
        return [Finding(f"bytes of {SUMMARY_FILE}, which cannot be read: {error}", (_size(run_dir / SUMMARY_FILE),))]
    if summary.tokens is None:
        return []
    in_ledger = sum(books.brought.tokens_by_outcome.values()) + sum(record.num_tokens for record in books.ended())
    strays = summary.tokens.accounted - in_ledger  # from a generator that had lost the sample: no record has them
    findings = (
        []
        if summary.tokens.balanced
        else [Finding("tokens decoded and not accounted for", (summary.tokens.decoded - summary.tokens.accounted,))]
    )
    if not 0 <= strays <= summary.tokens.by_outcome["lost"]:
        findings.append(Finding("tokens of the summary that are not in the ledger", (strays,)))
    return findings


def _size(path: Path) -> int:
    return path.stat().st_size
