"""Is anything lost, whatever fails? Many simulated runs, each with faults of its own.

    python -m bench.chaos [--runs 10000] [--first 0] [--workers 2] [--out FILE.md]
    python -m bench.chaos --only SEED

Each run is drawn from its seed: settings, kills, frozen processes, cut links, lost, repeated, late and overtaking
frames, broken and hung broadcasts, outages that take the ends of files, full disks, processes that talk nonsense (see
`darts_async.simulation.chaos`). It has to end in time, with its invariants intact on the way, and its ledger is then
audited as `darts-launch audit` does: what an outage has taken may be missing in it, if it says so by its sums, and
nothing else. A run that does not pass is a line of the table, and exit code 1.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from bench.results import conditions
from darts_async.protocol import group_id_of
from darts_async.shaper.durable.journal import read_journal
from darts_async.shaper.ledger import scan_ledger
from darts_async.simulation.chaos.plan import draw_plan
from darts_async.simulation.chaos.run import ChaosError, ChaosReport, run_chaos
from darts_async.topology.run_files import JOURNAL_FILE, LEDGER_FILE
from launcher.analysis.audit import evidence_against
from launcher.analysis.audit_books import Books, Finding, audit

BATCH = 50
"""Runs of one task of a worker."""


@dataclass
class Tally:
    """What came of many runs."""

    runs: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    staleness: Counter[int] = field(default_factory=Counter)
    virtual_s: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """Take in the tally of others."""
        for mine, theirs in (
            (self.runs, other.runs),
            (self.kills, other.kills),
            (self.faults, other.faults),
            (self.outcomes, other.outcomes),
        ):
            mine.update(theirs)
        self.staleness.update(other.staleness)
        self.virtual_s += other.virtual_s
        self.failures |= other.failures


def judged_run(seed: int) -> ChaosReport:
    """The run of a seed. Raises what `run_chaos` does, and `ChaosError` for what the audit finds."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as home:
        report = run_chaos(draw_plan(seed), Path(home))
        ledger, journal = scan_ledger(Path(home) / LEDGER_FILE), read_journal(Path(home) / JOURNAL_FILE)
        books = Books.of(ledger.records)
        found = evidence_against(Path(home), ledger, books, journal, None)
        against = [each for each in found if each.ids]
    steps = None if report.is_stopped else report.config.learner.steps
    findings = [*audit(books, report.config, is_over=True, num_steps=steps), *against, *_unexplained(report, books)]
    if findings:
        raise ChaosError(f"the audit finds {findings}")
    first = books.brought.num_steps  # of the steps before, no record is left: the power took them
    if report.model is None:
        return report
    # Of a run that was stopped, the learner may have taken a step that the shaper had given up; `resume` tells of it.
    made_of = report.model.history[: len(books.history)] if report.is_stopped else report.model.history
    if _sorted(made_of[first:]) != _sorted(books.history[first:]):
        raise ChaosError(f"the model was made of {report.model.history}, the ledger says {books.history}")
    trained = {(group_id_of(record.sample_id), record.step) for record in books.trained()}
    if trained != {(group_id, step) for step, ids in enumerate(made_of) for group_id in ids if step >= first}:
        raise ChaosError("the samples in the model are not those that the ledger calls trained")
    return report


def _unexplained(report: ChaosReport, books: Books) -> Iterator[Finding]:
    """What the end of the run says otherwise, and what is gone though no file has lost anything."""
    outcomes = Counter(books.brought.samples_by_outcome) + Counter(record.outcome for record in books.ended())
    for outcome in outcomes.keys() | report.finished.samples_by_outcome.keys():
        told = report.finished.samples_by_outcome.get(outcome, 0)
        if outcomes[outcome] != told:
            yield Finding(
                f"samples that have {outcome}, by the ledger and by the end of the run", (outcomes[outcome], told)
            )
    is_damaged = any(name.startswith((JOURNAL_FILE, LEDGER_FILE, "checkpoints")) for name in report.faults)
    if books.before is not None and not is_damaged:
        yield Finding("groups of which the ledger has only the sums", tuple(range(books.brought.next_group_id)))


def _sorted(history: Iterable[tuple[int, ...]]) -> list[list[int]]:
    return [sorted(group_ids) for group_ids in history]


def run_many(seeds: range) -> Tally:
    """Runs one after the other."""
    tally = Tally()
    for seed in seeds:
        try:
            report = judged_run(seed)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure of that run
            tally.runs["failed"] += 1
            tally.failures[seed] = f"{type(error).__name__}: {str(error)[:500]}"
            continue
        tally.runs["stopped early" if report.is_stopped else "to the last step"] += 1
        tally.kills.update(report.kills)
        tally.faults.update(report.faults)
        tally.outcomes.update(report.finished.samples_by_outcome)
        tally.staleness.update(report.finished.tokens_by_staleness)
        tally.virtual_s += report.duration_s
    return tally


def silence() -> None:
    """What the processes log of their faults is not printed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def batches(first: int, runs: int) -> Iterator[range]:
    """Seeds by the batch."""
    for start in range(first, first + runs, BATCH):
        yield range(start, min(start + BATCH, first + runs))


def main() -> None:
    """Make the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, help="one seed, with its traceback")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.only is not None:
        report = judged_run(arguments.only)
        print(draw_plan(arguments.only), report.kills, report.faults, report.finished, sep="\n")
        return
    tally, began_s, num_done = Tally(), time.monotonic(), 0
    with ProcessPoolExecutor(arguments.workers, initializer=silence) as pool:
        for part in pool.map(run_many, batches(arguments.first, arguments.runs)):
            tally.add(part)
            num_done = tally.runs.total()
            for seed, reason in part.failures.items():
                print(f"seed {seed}: {reason}", flush=True)
            if num_done % 500 == 0:
                print(f"{num_done} runs, {len(tally.failures)} failed", flush=True)
    text = table(arguments, tally, time.monotonic() - began_s)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    sys.exit(1 if tally.failures else 0)


def table(arguments: argparse.Namespace, tally: Tally, wall_s: float) -> str:
    """The results as Markdown."""
    kills_at = {name: n for name, n in tally.faults.items() if name.startswith("killed at ")}
    others = {name: n for name, n in tally.faults.items() if name not in kills_at}
    lines = [
        f"{conditions('chaos')} {wall_s:,.0f} s of the clock, {tally.virtual_s:,.0f} s simulated.",
        "",
        f"{tally.runs.total():,} runs: {tally.runs['to the last step']:,} to the last step, "
        f"{tally.runs['stopped early']:,} stopped early on purpose, **{tally.runs['failed']:,} failed**.",
        f"{sum(tally.outcomes.values()):,} samples drawn, each ended once: "
        + ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(tally.outcomes.items()))
        + ".",
        "Trained tokens by how many versions old they were: "
        + ", ".join(f"{age}: {n:,}" for age, n in sorted(tally.staleness.items()))
        + " (bounds of 0 to 3, by the run).",
        "",
        "| processes killed | times |",
        "|---|---|",
        *(f"| {role} | {n:,} |" for role, n in sorted(tally.kills.items())),
        "",
        "| of these, at a named point | times |",
        "|---|---|",
        *(f"| {name.removeprefix('killed at ')} | {n:,} |" for name, n in sorted(kills_at.items())),
        "",
        "| other faults | times |",
        "|---|---|",
        *(f"| {name} | {n:,} |" for name, n in sorted(others.items())),
    ]
    lines += [f"\nSeed {seed}: {reason}" for seed, reason in sorted(tally.failures.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
