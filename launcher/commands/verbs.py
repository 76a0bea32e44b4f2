"""The verbs for an existing run, live or over. They work from any terminal.

RUN_DIR is the directory of a run in `--runs-dir`. Its default is the newest live run for verbs that ask a launcher, and
the newest run, live or over, for verbs that read its files. A verb says which run it has found.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from darts_async.errors import ConfigError
from darts_async.topology.plan import read_plan
from darts_async.topology.roles import LAUNCHER, keeper_name
from darts_async.topology.run_files import LOGS_DIR, SINKS_DIR, TRACE_FILE
from launcher.analysis.audit import AuditReport, audit_run
from launcher.analysis.report import REPORT_FILE, write_report
from launcher.analysis.story import Line, parse_subject, read_story
from launcher.analysis.tracing import export, report_screen
from launcher.commands.template import run_template
from launcher.control.control_socket import NotRunningError
from launcher.control.find_run import ask_run, find_run, has_launcher, names_of, not_live, record_of
from launcher.control.requests import Done, GetStatus, Refused, Request, RestartProcess, RunState, StopRun
from launcher.display.status import status_screen
from launcher.run_dir.logs import log_tails
from launcher.run_dir.run_dir import RunRecord
from launcher.sinks.follower import process_name as sink_process
from launcher.terminal import Screen, show_error, write_json, write_line

FAILED, BAD_INPUT = 1, 2
_POLL_S = 0.2
_MAX_IDS = 20

LiveRun = Annotated[Path | None, typer.Argument(metavar="RUN_DIR", help="The run. Default: the newest live run.")]
AnyRun = Annotated[Path | None, typer.Argument(metavar="RUN_DIR", help="The run. Default: the newest run.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Directory in which to look for the newest run.")]
Process = Annotated[str, typer.Argument(metavar="ROLE[/N]", help="One process, or all of a role.")]
RUNS = Path("runs")


def status(
    run_dir: AnyRun = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Show the state of a run: steps, processes, notices."""
    with bad_input():
        found = the_run(run_dir, runs_dir, is_live=False)
        try:
            state = ask_run(found, GetStatus())
        except NotRunningError as error:
            _show_ended(found, error, as_json=as_json)
            return
    assert isinstance(state, RunState)
    if as_json:
        write_json(msgspec.json.encode(state))
    else:
        Screen().print(status_screen(state))


def restart(process: Process, run_dir: LiveRun = None, runs_dir: RunsDir = RUNS) -> None:
    """Restart a process of a live run, all of a role, or the agent of a node."""
    with bad_input():
        found = the_run(run_dir, runs_dir)
        names_of(read_plan(found), process)
        write_line(_asked(found, RestartProcess(process)))


def down(
    run_dir: LiveRun = None,
    runs_dir: RunsDir = RUNS,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds to wait for the end.")] = 120.0,
) -> None:
    """End a live run in order, as Ctrl-C does, and wait until it has ended."""
    with bad_input():
        found = the_run(run_dir, runs_dir)
        before = record_of(found)
        is_asked = _stop(found)
        deadline_s = time.monotonic() + timeout_s
        while has_launcher(found) and not _has_ended(record := record_of(found), before):
            if time.monotonic() >= deadline_s:
                late = f"{found} has not ended within {timeout_s:g} s; its launcher is pid {record.launcher_pid}"
                show_error(late)
                raise typer.Exit(FAILED)
            time.sleep(_POLL_S)
            is_asked = is_asked or _stop(found, may_be_gone=True)
        if (record := record_of(found)).status == "running":
            raise not_live(found, NotRunningError(f"no launcher is running in {found}"))
    write_line(f"{found}: {record.status}: {record.reason}")


def _has_ended(record: RunRecord, before: RunRecord) -> bool:
    """Whether the record is new: until it takes requests, a resuming launcher keeps the record of the previous life."""
    return record.status == "finished" or (record.status != "running" and record != before)


def _stop(run_dir: Path, *, may_be_gone: bool = False) -> bool:
    """Ask the launcher to stop the run. Returns whether it heard: while it starts or ends it takes no requests."""
    try:
        reply = ask_run(run_dir, StopRun("stopped by darts-launch down"))
    except NotRunningError as error:
        if not may_be_gone and not has_launcher(run_dir):
            raise not_live(run_dir, error) from error
        return False
    if isinstance(reply, Refused):
        raise ConfigError(reply.reason)
    return True


def logs(
    process: Process,
    run_dir: AnyRun = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show new lines until the run ends.")] = False,
    num_lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Earlier lines to show of each file.")] = 20,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Show what processes have logged and printed."""
    with bad_input():
        found = the_run(run_dir, runs_dir, is_live=False)
        tails = log_tails(found / LOGS_DIR, _logged_names(found, process))
        for tail in tails:
            for line in tail.skip_to_last(num_lines):
                write_line(line)
        is_live = follow
        while is_live:  # and once more after its end
            is_live = goes_on(found)
            for tail in tails:
                for line in tail.new_lines():
                    write_line(line)
            time.sleep(_POLL_S if is_live else 0.0)


def audit(
    run_dir: AnyRun = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Check that no sample was lost, trained on twice or too stale. Shows the ids and exits with 1 otherwise."""
    with bad_input():
        report = audit_run(the_run(run_dir, runs_dir, is_live=False))
    write_json(msgspec.json.encode(report)) if as_json else Screen().print(_audit_text(report))
    if report.findings:
        raise typer.Exit(FAILED)


def story(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN_DIR|GROUP|GROUP/INDEX|sample/ID", help="The run, and a group or a sample."),
    ],
    runs_dir: RunsDir = RUNS,
) -> None:
    """Show the complete history of one sample or group, from the ledger and the journal."""
    with bad_input():
        *run, subject = words
        if len(run) > 1:
            raise ConfigError(f"expected [RUN_DIR] and a group or sample, found {len(words)} words: {' '.join(words)}")
        found = the_run(Path(run[0]) if run else None, runs_dir, is_live=False)
        lines = read_story(found, parse_subject(subject))
    Screen().print(_story_text(lines), soft_wrap=True)


def trace(
    run_dir: AnyRun = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write. Default: RUN_DIR/trace.json.")] = None,
    since_s: Annotated[float | None, typer.Option("--since", min=0.0, help="Seconds since the run began.")] = None,
    until_s: Annotated[float | None, typer.Option("--until", min=0.0, help="Seconds since the run began.")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write a timeline of every process for Perfetto, and show how busy each process was."""
    with bad_input():
        found = the_run(run_dir, runs_dir, is_live=False)
        exported = export(found, out or found / TRACE_FILE, since_s, until_s)
    Screen().print(report_screen(exported))


def report(
    run_dir: AnyRun = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write. Default: RUN_DIR/report.html.")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write a page about a run: rewards, lengths, staleness, outcomes, idle time. Needs the extra `report`."""
    with bad_input():
        found = the_run(run_dir, runs_dir, is_live=False)
        file = out or found / REPORT_FILE
        write_report(found, file)
    write_line(f"{file} is written")


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The file to write.")] = Path("cluster.yaml"),
) -> None:
    """Write a file with the settings, their defaults and their meanings."""
    with bad_input():
        try:
            with file.open("x", encoding="utf-8") as new:
                new.write(run_template())
        except FileExistsError as error:
            raise ConfigError(f"{file} exists: give another name, or remove it") from error
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
    write_line(f"{file} is written; try: darts-launch {file}")


VERBS: tuple[Callable[..., None], ...] = (status, restart, down, logs, audit, story, trace, report, init)


def _logged_names(run_dir: Path, process: str) -> tuple[str, ...]:
    """The names whose logs to show: processes, the launcher, the keeper of a node, or the follower of a sink."""
    plan = read_plan(run_dir)
    sinks = (sink_process(path.stem) for path in (run_dir / SINKS_DIR).glob("*.json"))
    others = (LAUNCHER, *map(keeper_name, plan.nodes), *sinks)
    return (process,) if process in others else names_of(plan, process)


def _asked(run_dir: Path, request: Request) -> str:
    """The launcher's account of what it did. Raises `ConfigError` if it refused or cannot be asked."""
    try:
        reply = ask_run(run_dir, request)
    except NotRunningError as error:
        raise not_live(run_dir, error) from error
    if isinstance(reply, Refused):
        raise ConfigError(reply.reason)
    assert isinstance(reply, Done)
    return reply.text


def goes_on(run_dir: Path) -> bool:
    """Whether more may be logged. A launcher that was killed leaves the record as it was, but holds no lock."""
    return record_of(run_dir).status == "running" and has_launcher(run_dir)


def _show_ended(run_dir: Path, error: NotRunningError, *, as_json: bool) -> None:
    record = record_of(run_dir)
    if record.status == "running":
        raise not_live(run_dir, error)
    if as_json:
        write_json(msgspec.json.encode(record))
    else:
        write_line(f"{run_dir}: {record.status}: {record.reason}")


def _audit_text(report: AuditReport) -> Text:
    samples = f"{report.num_samples:,} samples were started in {report.num_groups:,} groups"
    text = Text(f"{report.run_dir} ({report.status})\n", overflow="fold")
    text.append(f"{samples}, {report.num_ended:,} have ended, {report.num_trained:,} were trained on\n")
    if report.num_taken_back:
        text.append(f"{report.num_taken_back:,} records are void: the run was resumed from an earlier point\n")
    if report.num_only_in_sums:
        text.append(f"{report.num_only_in_sums:,} samples are only in sums: the ledger had lost its end\n")
    if not report.findings:
        return text.append("✓ ", "green").append("no sample was lost, trained on twice or too stale")
    for finding in report.findings:
        shown, more = finding.ids[:_MAX_IDS], len(finding.ids) - _MAX_IDS
        text.append("✗ ", "red").append(f"{len(finding.ids)} {finding.rule}: {', '.join(map(str, shown))}")
        text.append(f" and {more} more\n" if more > 0 else "\n")
    return text


def _story_text(lines: list[Line]) -> Text:
    texts = [
        Text.assemble((f"{line.source:8}", "dim"), line.text, (" (void)" if line.is_void else "", "yellow"))
        for line in lines
    ]
    return Text("\n").join(texts)


def the_run(run_dir: Path | None, runs_dir: Path, *, is_live: bool = True) -> Path:
    """The run that a verb means. Says which, if the user did not. Raises `ConfigError` if there is none."""
    found = find_run(run_dir, runs_dir, is_live=is_live)
    if run_dir is None:
        Screen(stderr=True).print(Text(str(found), style="dim"), soft_wrap=True)
    return found


def split_words(words: list[str]) -> tuple[Path | None, list[str]]:
    """`[RUN_DIR] [NAME=VALUE]...`, in any order: the run, if it is named, and the settings."""
    run = next((word for word in words if "=" not in word or Path(word).is_dir()), None)
    return (None, words) if run is None else (Path(run), [word for word in words if word is not run])


@contextmanager
def bad_input() -> Iterator[None]:
    """Shows a `ConfigError` and exits with code 2."""
    try:
        yield
    except ConfigError as error:
        show_error(str(error))
        raise typer.Exit(BAD_INPUT) from error
