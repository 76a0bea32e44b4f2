"""What the launcher takes from processes: about themselves, the run and others, each only about its own matters."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darts_async.config import RunConfig
from darts_async.protocol import (
    EvaluationCompleted,
    PeerRefused,
    ProcessStatus,
    ProcessToLauncher,
    RunFinished,
    StepCompleted,
    TakeUpAgain,
)
from darts_async.transport import Received, Unreadable
from launcher.lifecycle.lifecycle import Kill, Lost, Notice
from launcher.nodes.supervisor import ProcessExit
from launcher.plan.plan import link_addresses, plan_run, reports_per_step
from launcher.progress.run_view import RunView
from launcher.progress.step_merger import StepMerger
from launcher.run.boundary import Boundary
from launcher.run.run import Run
from tests.launcher.lifecycle.test_lifecycle import running_lifecycle
from tests.support.nonsense import messages

CONFIG = RunConfig.model_validate({"learner": {"steps": 5}, "roles": {"generator": {"replicas": 2}}})
PLAN = plan_run(CONFIG, Path("/runs/a"), link_addresses("127.0.0.1", range(7000, 7006)))
BOUNDARY = Boundary(PLAN, 5)
ONE = np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, np.int32)
EMPTY = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int32)


def status(state: str = "decoding", **changes: Any) -> ProcessStatus:
    values: dict[str, Any] = {"policy_version": 1, "num_tokens": 0, "num_in_flight": 0, "uptime_s": 1.0}
    return ProcessStatus(state, **(values | {"busy_s": {}, "loop_lag_s": 0.0} | changes))


@pytest.mark.parametrize(
    ("name", "message", "words"),
    [
        ("generator/0", RunFinished("done", {}, {}, {}, 5), "which a generator does not send"),
        ("reward/0", StepCompleted(0, {}), "which a reward does not send"),
        ("learner/0", EvaluationCompleted(0, *EMPTY, 0), "which a learner does not send"),
        ("shaper/0", RunFinished("done", {}, {}, {}, 6), "6 steps of 5"),
        ("shaper/0", RunFinished("done", {"trained": -1}, {}, {}, 5), "counts below zero"),
        ("shaper/0", StepCompleted(5, {}), "step 5 of 5"),
        ("learner/0", StepCompleted(-1, {}), "step -1 of 5"),
        ("learner/0", StepCompleted(0, {"loss\x1b[2J": 1.0}), r"the name 'loss\\x1b\[2J'"),
        ("learner/0", StepCompleted(0, {"x" * 201: 1.0}), "the name 'xxx"),
        ("learner/0", StepCompleted(0, {str(number): 1.0 for number in range(10_001)}), "more than 10000 names"),
        ("shaper/0", EvaluationCompleted(6, *EMPTY, 6), "versions 6 to 6 of 5"),
        ("shaper/0", EvaluationCompleted(0, np.zeros(2, np.int64), *EMPTY[1:], 0), "2 prompts, 0 rewards"),
        ("shaper/0", EvaluationCompleted(0, *EMPTY, 0), "0 prompts"),
        ("shaper/0", EvaluationCompleted(0, *ONE, 0, part_metrics={"a\nb": 1.0}), "the name 'a"),
        ("shaper/0", EvaluationCompleted(0, EMPTY[0][:0], *EMPTY[1:], -1), "versions 0 to -1"),
        ("generator/0", status(policy_version=6), "version 6 of 5"),
        ("generator/0", status(num_tokens=-1), "-1 tokens"),
        ("generator/0", status(uptime_s=float("nan")), "nan"),
        ("generator/0", status(busy_s={"decode": float("inf")}), "inf"),
        ("generator/0", status("idle\n"), "the name"),
        ("learner/0", TakeUpAgain("no"), "which a learner does not send"),
        ("generator/0", PeerRefused("reward/0", 1, "no"), "no link to it"),
        ("generator/0", PeerRefused("generator/0", 1, "no"), "no link to it"),
        ("generator/0", PeerRefused("generator/9", 1, "no"), "no link to it"),
    ],
)
def test_what_is_not_for_a_process_to_say_is_refused(name: str, message: ProcessToLauncher, words: str) -> None:
    reason = BOUNDARY.refusal(name, message)
    assert reason is not None
    assert re.search(words, reason), reason


def test_hubs_judge_their_members_and_members_judge_no_one() -> None:
    assert BOUNDARY.may_accuse("shaper/0", "generator/1")
    assert BOUNDARY.may_accuse("shaper/0", "reward/0")
    assert BOUNDARY.may_accuse("learner/0", "generator/0")
    assert BOUNDARY.may_accuse("learner/0", "shaper/0")
    assert not BOUNDARY.may_accuse("generator/0", "shaper/0")
    assert not BOUNDARY.may_accuse("generator/0", "generator/1")


def test_a_refused_process_is_killed_and_comes_back_as_after_a_death() -> None:
    lifecycle = running_lifecycle()
    kill, notice = lifecycle.refused("generator/0", 1, "tokens of the future (says shaper/0)")
    assert kill == Kill("generator/0", 1, "tokens of the future (says shaper/0)", "refused")
    assert notice == Notice("generator/0 is refused and killed: tokens of the future (says shaper/0)")
    assert lifecycle.refused("generator/0", 1, "again") == [], "once is enough"
    lost, _ = lifecycle.exited(ProcessExit("generator/0", 7, -9, 1), 1.0)
    assert isinstance(lost, Lost)
    assert lost.restart_at_s is not None


def test_an_incarnation_that_is_gone_is_not_killed_again() -> None:
    lifecycle = running_lifecycle()
    assert lifecycle.refused("generator/0", 0, "late") == []
    assert lifecycle.refused("generator/9", 1, "unknown") == []


class Silenced:
    """In the place of everything that shows, writes or sends."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: []


def silenced_run() -> tuple[Run, Silenced]:
    lifecycle, other = running_lifecycle(plan=PLAN), Silenced()
    view = RunView(PLAN, name="a", run_dir="/runs/a", total_steps=5, now_s=0.0)
    anything: Any = other
    other.running = tuple(view.rows)  # type: ignore[attr-defined]
    for row in view.rows.values():
        row.incarnation = 1
    merger = StepMerger(reports_per_step())
    outputs = anything, anything, anything
    run = Run(PLAN, anything, anything, anything, lifecycle, view, *outputs, 1.0, merger, anything, BOUNDARY)
    return run, other


said = st.tuples(st.sampled_from([spec.name for spec in PLAN.processes]), messages(ProcessToLauncher))


@pytest.mark.slow
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(conversation=st.lists(said, max_size=12))
def test_the_launcher_outlives_whatever_processes_say(conversation: list[tuple[str, ProcessToLauncher]]) -> None:
    run, _ = silenced_run()
    for name, message in conversation:
        run._hear(Received("launcher", name, 1, message))
    run._take_lines(run.merger.flush())
    assert 0 <= run.view.num_steps <= 5
    assert all(row.num_tokens >= 0 for row in run.view.rows.values())


def test_what_cannot_be_read_is_named_and_its_sender_killed() -> None:
    run, other = silenced_run()
    run._hear(Unreadable("launcher", "reward/0", 1, "3 array frames, of which the header uses 2"))
    assert other.notes == ["reward/0 is refused and killed: 3 array frames, of which the header uses 2"]


def test_a_member_that_alone_accuses_its_hub_is_restarted_and_a_second_one_has_the_hub_restarted() -> None:
    run, other = silenced_run()
    run._hear(Received("launcher", "generator/0", 1, PeerRefused("shaper/0", 1, "sample -1")))
    assert other.notes == [
        "generator/0 is refused and killed: it refuses the messages of shaper/0, and most others do not: sample -1"
    ]
    assert not run.lifecycle.is_stopping("shaper/0")
    run._hear(Received("launcher", "generator/0", 1, PeerRefused("shaper/0", 1, "sample -1")))
    assert not run.lifecycle.is_stopping("shaper/0"), "one voice counts once"
    run._hear(Received("launcher", "generator/1", 1, PeerRefused("shaper/0", 0, "sample -1")))
    assert not run.lifecycle.is_stopping("shaper/0"), "it is of an earlier incarnation"
    run._hear(Received("launcher", "generator/1", 1, PeerRefused("shaper/0", 1, "sample -2")))
    assert other.notes[1:] == ["shaper/0 is refused and killed: sample -2 (says generator/1)"]
    assert run.lifecycle.is_stopping("shaper/0")
    assert not run.lifecycle.is_stopping("generator/1")


def test_the_launcher_is_accused_by_no_one() -> None:
    assert BOUNDARY.refusal("generator/0", PeerRefused("launcher", 1, "no")) is not None


def test_a_refusal_names_the_kind_of_the_message() -> None:
    run, other = silenced_run()
    run._hear(Received("launcher", "learner/0", 1, StepCompleted(-1, {})))
    assert other.notes == ["learner/0 is refused and killed: StepCompleted: step -1 of 5"]
