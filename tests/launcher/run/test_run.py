"""Whole runs of the launcher: real processes, real sockets, fake work."""

import asyncio
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import structlog
from rich.console import Console
from typer.testing import CliRunner

import launcher.commands.cli
from darts_async.config import RunConfig
from darts_async.topology.plan import ProcessSpec, RunPlan, read_plan
from darts_async.topology.run_files import KEYS_DIR
from darts_async.transport import create_run_keys
from launcher.display.summary import Summary, summary_screen
from launcher.display.view import PlainDisplay
from launcher.lifecycle.lifecycle import Limits, RunOutcome
from launcher.plan.plan import link_addresses, plan_run
from launcher.preflight.preflight import link_ports
from launcher.progress.run_view import RunView
from launcher.run.interrupts import caught_signals
from launcher.run.run import PreparedRun, run
from launcher.run_dir.run_dir import create_run_dir, read_record, write_inputs, write_summary
from tests import ROOT

LIMITS = Limits(finish_s=10.0, stop_s=10.0, grace_s=0.2)


class Prepared:
    """A run of fake processes, ready to be carried out. `behaviours` maps process names to how they behave."""

    def __init__(self, tmp_path: Path, behaviours: dict[str, str], limits: Limits) -> None:
        learner = {"steps": 3, "groups_per_step": 2}
        self.config = RunConfig.model_validate({"runs_dir": str(tmp_path), "name": "fake", "learner": learner})
        self.run_dir = create_run_dir(self.config)
        addresses = link_addresses("127.0.0.1", link_ports(self.config))
        plan = plan_run(self.config, self.run_dir, addresses)
        self.plan = faked(plan, behaviours)
        self.limits = limits
        self.output = io.StringIO()

    def carry_out(self) -> tuple[RunOutcome, Summary]:
        write_inputs(self.run_dir, self.config, self.plan)
        create_run_keys(self.run_dir / KEYS_DIR, self.plan.endpoints())
        display = PlainDisplay(Console(file=self.output, width=120))
        return asyncio.run(run_caught(self.config, self.plan, self.run_dir, display, self.limits))

    def metrics(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


async def run_caught(*given: Any) -> tuple[RunOutcome, Summary]:
    """As the command line does it."""
    with caught_signals() as signals:
        return await run(PreparedRun(*given, signals))


def assert_nothing_is_left(run_dir: Path) -> None:
    node = json.loads((run_dir / "nodes" / "local.json").read_text())
    pids = {event["pid"] for event in events_of(run_dir) if event["type"] == "started"}
    for pid in pids | {node["keeper"]["pid"], node["agent"]["pid"]}:
        assert not psutil.pid_exists(pid)


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def faked(plan: RunPlan, behaviours: dict[str, str]) -> RunPlan:
    specs = (_faked(spec, behaviours.get(spec.name, "good")) for spec in plan.processes)
    return msgspec.structs.replace(plan, processes=tuple(specs))


def _faked(spec: ProcessSpec, behaviour: str) -> ProcessSpec:
    argv = (sys.executable, "-m", "tests.fakes.process", *spec.argv[5:], "--behaviour", behaviour)
    env = {**spec.env, "PYTHONPATH": str(ROOT)}
    return msgspec.structs.replace(spec, argv=argv, env=env, start_timeout_s=0.5 if behaviour == "mute" else 60.0)


def prepare(tmp_path: Path, behaviours: dict[str, str] | None = None, limits: Limits = LIMITS) -> Prepared:
    return Prepared(tmp_path, behaviours or {}, limits)


def shown(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(renderable)
    return console.export_text()


@pytest.mark.slow
def test_a_run_goes_to_its_end_and_accounts_for_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(tmp_path)
    status_at_summary: list[str] = []

    def write(run_dir: Path, summary: msgspec.Struct) -> None:
        status_at_summary.append(read_record(run_dir).status)
        write_summary(run_dir, summary)

    monkeypatch.setattr("launcher.run.run.write_summary", write)
    outcome, summary = prepared.carry_out()
    assert status_at_summary == ["running"], "a run that has ended has its summary, whatever dies in between"
    assert outcome == RunOutcome("finished", "all steps taken")
    assert_nothing_is_left(prepared.run_dir)
    assert read_record(prepared.run_dir).status == "finished"
    steps = [line for line in prepared.metrics() if line["type"] == "step"]
    assert [line["step"] for line in steps] == [0, 1, 2]
    assert all("loss" in line and "reward/pool_mean" in line for line in steps)
    assert summary.tokens is not None
    assert summary.tokens.balanced
    assert summary.tokens.decoded == 3000
    assert summary.gain is not None
    assert summary.gain.reward == pytest.approx(0.5)
    assert json.loads((prepared.run_dir / "summary.json").read_text())["status"] == "finished"
    assert prepared.output.getvalue().count("step ") == 3
    assert not structlog.is_configured(), "what the launcher logs goes to its file, while it runs"
    assert "add up to the 3,000 tokens" in shown(summary_screen(summary))


class InterruptedDisplay(PlainDisplay):
    """Ctrl-C when a process has been started."""

    def refresh(self, view: RunView, now_s: float) -> None:
        events = Path(view.run_dir) / "events.jsonl"
        if not self.was_interrupted and events.exists() and '"started"' in events.read_text():
            self.was_interrupted = True
            os.kill(os.getpid(), signal.SIGINT)

    was_interrupted = False


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_process_that_was_being_started_at_ctrl_c_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.launcher.run.test_run.PlainDisplay", InterruptedDisplay)
    prepared = prepare(tmp_path, limits=Limits(stop_s=600.0, grace_s=0.2))
    outcome, summary = prepared.carry_out()
    assert outcome == RunOutcome("stopped", "stopped by Ctrl-C")
    started = [event["process"] for event in events_of(prepared.run_dir) if event["type"] == "started"]
    assert started[-1] not in {row.name for row in summary.processes}, "it was ended before it could report"
    assert_nothing_is_left(prepared.run_dir)


@pytest.mark.slow
def test_a_process_that_dies_at_once_fails_the_run_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviours = {"generator/0": "dies", "shaper/0": "idle", "learner/0": "idle"}
    monkeypatch.setattr(launcher.commands.cli, "plan_run", lambda *inputs: faked(plan_run(*inputs), behaviours))
    file = tmp_path / "fake.yaml"
    file.write_text(f"name: fake\nruns_dir: {tmp_path}\nprompts:\n  num_train: 16\n")
    result = CliRunner().invoke(launcher.commands.cli.app, [str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "fake failed: 0 of 100 steps" in result.output
    assert "the run failed: generator/0 ended with exit code 3" in result.output
    assert "the sky is falling" in result.output
    [run_dir] = tmp_path.glob("fake-*")
    record = read_record(run_dir)
    assert (record.status, record.reason) == (
        "failed",
        "generator/0 ended with exit code 3: the sky is falling: it failed before it ever served",
    )
    assert_nothing_is_left(run_dir)


@pytest.mark.slow
def test_a_process_that_listens_to_nothing_is_killed_and_fails_a_finished_run(tmp_path: Path) -> None:
    limits = Limits(finish_s=0.5, stop_s=0.5, grace_s=0.1)
    prepared = prepare(tmp_path, {"reward/0": "deaf"}, limits)
    outcome, _ = prepared.carry_out()
    assert outcome.status == "failed"
    assert outcome.culprit is not None
    assert "did not leave within" in outcome.reason
    assert_nothing_is_left(prepared.run_dir)


@pytest.mark.slow
def test_a_process_that_never_reports_fails_the_run_at_its_own_deadline(tmp_path: Path) -> None:
    limits = Limits(finish_s=0.5, stop_s=0.2, grace_s=0.1)
    prepared = prepare(tmp_path, {"reward/0": "mute", "shaper/0": "idle"}, limits)
    outcome, _ = prepared.carry_out()
    assert outcome.culprit == "reward/0"
    assert outcome.reason == "reward/0 did not report within 0.5 s (roles.reward.start_timeout_s)"
    assert_nothing_is_left(prepared.run_dir)


class SignalWhenNoticed(PlainDisplay):
    """Sends a signal to this process, as a user would, once the first evaluation is shown."""

    def __init__(self, console: Console, number: signal.Signals, times: int) -> None:
        super().__init__(console)
        self._number, self._times = number, times

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith("held-out"):
            for _ in range(self._times):
                os.kill(os.getpid(), self._number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "times", "reason"),
    [
        (signal.SIGINT, 1, "stopped by Ctrl-C"),
        (signal.SIGTERM, 2, "stopped by SIGTERM"),
    ],
)
def test_a_signal_stops_the_run_in_order_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, times: int, reason: str
) -> None:
    prepared = prepare(tmp_path, {"learner/0": "idle"})

    def display(console: Console) -> PlainDisplay:
        return SignalWhenNoticed(console, number, times)

    monkeypatch.setattr(sys.modules[__name__], "PlainDisplay", display)
    outcome, summary = prepared.carry_out()
    assert (outcome.status, outcome.reason) == ("stopped", reason)
    assert read_record(prepared.run_dir).status == "stopped"
    assert summary.status == "stopped"
    assert_nothing_is_left(prepared.run_dir)


def test_a_plan_in_the_run_directory_reads_back_as_it_was(tmp_path: Path) -> None:
    prepared = prepare(tmp_path)
    write_inputs(prepared.run_dir, prepared.config, prepared.plan)
    plan: RunPlan = read_plan(prepared.run_dir)
    assert plan == prepared.plan
