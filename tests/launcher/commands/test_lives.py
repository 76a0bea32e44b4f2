"""A run that takes itself up again: what comes between two of its lives ends it."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from darts_async.config import RunConfig
from darts_async.topology.plan import RunPlan
from launcher.analysis.earlier_lives import NO_PAST, Past, held
from launcher.commands import cli
from launcher.control.control_socket import serving_requests
from launcher.control.requests import Done, Reply, Request, StopRun
from launcher.display.summary import Summary, summarise
from launcher.lifecycle.lifecycle import RunOutcome
from launcher.plan.plan import link_addresses, plan_run
from launcher.progress.run_view import RunView
from launcher.run.interrupts import reason_of
from launcher.run.run import PreparedRun
from launcher.run_dir.run_dir import create_run_dir
from launcher.sinks.recorder import recorded
from tests.launcher.commands.test_verbs import said

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN = RunOutcome("failed", "no group is known", goes_on=True)


class TwoLives:
    """A run whose first life wants a second one, which waits until it is stopped; `gap` comes between them."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = RunConfig.model_validate({"runs_dir": str(tmp_path)})
        self.run_dir = create_run_dir(self.config)
        self.plan = plan_run(self.config, self.run_dir, link_addresses("127.0.0.1", range(7000, 7006)))
        self.lives = list[int]()
        monkeypatch.setattr(cli, "carry_out", self.live)
        monkeypatch.setattr(cli, "read_past", self.read_past)

    def gap(self) -> None:
        """Nothing comes."""

    def read_past(self, run_dir: Path, plan: RunPlan) -> Past:
        self.gap()
        return Past(life=2)

    async def live(self, prepared: PreparedRun) -> tuple[RunOutcome, Summary]:
        past, run_dir, signals = prepared.past, prepared.run_dir, prepared.signals
        self.lives.append(past.life)
        stops: asyncio.Queue[str] = asyncio.Queue()

        def hear(request: Request) -> Reply:
            assert isinstance(request, StopRun)
            stops.put_nowait(request.reason)
            return Done("the run is stopping")

        with recorded(run_dir, past.life) as ending:
            async with serving_requests(run_dir, hear):
                signals.tell(lambda number: stops.put_nowait(reason_of(number)))
                ending.outcome = AGAIN if past.life == 1 else RunOutcome("stopped", await stops.get())
            signals.keep()
        view = RunView(prepared.plan, name="a", run_dir=str(run_dir), total_steps=1, now_s=0.0)
        return ending.outcome, summarise(view, ending.outcome, model_path=None, now_s=1.0)

    def lead(self) -> RunOutcome:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        with held(self.run_dir):
            outcome, _ = asyncio.run(cli._lead(self.config, self.plan, self.run_dir, NO_PAST))
        for number, handler in before.items():
            assert signal.getsignal(number) is signal.SIG_IGN, "the process only has to say how the run has ended"
            signal.signal(number, handler)
        return outcome


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_two_lives_stops_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run = TwoLives(tmp_path, monkeypatch)
    monkeypatch.setattr(run, "gap", lambda: os.kill(os.getpid(), number))
    assert run.lead() == RunOutcome("stopped", reason_of(number))
    assert run.lives == [1, 2]


@pytest.mark.slow
def test_down_between_two_lives_stops_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, has_looked = TwoLives(tmp_path, monkeypatch), threading.Event()
    answers: list[tuple[int, str]] = []
    down = threading.Thread(target=lambda: answers.append(said(["down", str(run.run_dir)])))

    def gap() -> None:
        down.start()
        assert has_looked.wait(30)

    monkeypatch.setattr(run, "gap", gap)
    monkeypatch.setattr("launcher.commands.verbs.time.sleep", lambda _: has_looked.set())
    outcome = run.lead()
    down.join(30)
    assert outcome == RunOutcome("stopped", "stopped by darts-launch down")
    assert answers == [(0, f"{run.run_dir}: stopped: {outcome.reason}")]
