"""When a run ends, and why; how steps are merged; what plan follows from settings. No input or output."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import darts_async
from darts_async.config import BackoffConfig, IntensityConfig, RestartConfig, RoleConfig, RolesConfig, RunConfig
from darts_async.errors import NO_SPACE_EXIT_CODE, PERMANENT_EXIT_CODE, ConfigError
from darts_async.protocol import ProcessStatus
from darts_async.topology.plan import RunPlan, decode_plan, encode_plan, read_plan
from darts_async.topology.run_files import file_stem
from launcher.lifecycle.lifecycle import (
    NODE_COMES_UP_WITHIN_S,
    NOT_SERVING,
    Action,
    AskToLeave,
    AskToStop,
    Drop,
    Kill,
    Limits,
    Lost,
    Notice,
    RestartRefused,
    RunLifecycle,
    RunOutcome,
    Serves,
    Start,
    Stop,
)
from launcher.lifecycle.progress_watch import STALLED_AFTER_S
from launcher.lifecycle.restarts import Restarts
from launcher.nodes.supervisor import ProcessExit
from launcher.plan.plan import link_addresses, plan_run, reports_per_step
from launcher.progress.step_merger import MAX_OPEN_STEPS, StepLine, StepMerger

ADDRESSES = link_addresses("127.0.0.1", range(7000, 7006))
PLAN = plan_run(RunConfig(), Path("/runs/a"), ADDRESSES)
NAMES = [spec.name for spec in PLAN.processes]
LIMITS = Limits(finish_s=100.0, stop_s=10.0, grace_s=1.0, no_progress_s=500.0, no_space_s=1000.0)
WORKING = ProcessStatus("working", 1, 0, 0, 1.0, {}, 0.0)


def new_lifecycle(restart: RestartConfig | None = None, plan: RunPlan = PLAN) -> RunLifecycle:
    """A lifecycle at 0, of processes with this restart policy."""
    roles = dict.fromkeys(("generator", "reward", "shaper", "learner"), RoleConfig(restart=restart or RestartConfig()))
    return RunLifecycle(plan, LIMITS, Restarts(plan, RolesConfig(**roles), seed=0), now_s=0.0)


def running_lifecycle(restart: RestartConfig | None = None, plan: RunPlan = PLAN) -> RunLifecycle:
    """All processes were started at 0 and do their work."""
    lifecycle = new_lifecycle(restart, plan)
    for name in [spec.name for spec in plan.processes]:
        start(lifecycle, name, 0.0)
        lifecycle.reported(name, WORKING, 0.0)
    return lifecycle


def start(lifecycle: RunLifecycle, name: str, now_s: float) -> list[Action]:
    """Its node is up, and starts it at once."""
    lifecycle.ordered(name, now_s)
    return lifecycle.started(name, now_s)


def leave(lifecycle: RunLifecycle, code: int, now_s: float) -> None:
    for name in NAMES:
        lifecycle.exited(ProcessExit(name, 1, code), now_s)


def test_a_run_that_has_to_be_taken_up_again_ends_its_life_at_once_and_goes_on() -> None:
    lifecycle = running_lifecycle()
    [notice] = lifecycle.take_up_again("no group is known", 5.0)
    assert notice == Notice("no group is known: all processes are ended, and the run is resumed")
    assert lifecycle.over(5.0)
    assert lifecycle.exited(ProcessExit("shaper/0", 1, -9), 5.0) == []
    assert lifecycle.take_up_again("no group is known", 5.1) == lifecycle.finished("all steps taken", 5.1) == []
    assert lifecycle.outcome == RunOutcome("failed", "no group is known", goes_on=True)


def test_a_run_that_is_stopped_is_not_taken_up_again() -> None:
    lifecycle = running_lifecycle()
    lifecycle.take_up_again("no group is known", 5.0)
    lifecycle.interrupted("stopped by Ctrl-C", 5.1)
    assert lifecycle.outcome == RunOutcome("stopped", "stopped by Ctrl-C")
    lifecycle = running_lifecycle()
    lifecycle.interrupted("stopped by Ctrl-C", 5.0)
    assert lifecycle.take_up_again("no group is known", 5.1) == []
    assert lifecycle.outcome == RunOutcome("stopped", "stopped by Ctrl-C")


def test_a_run_is_not_taken_up_again_without_end() -> None:
    restarts = Restarts(PLAN, RolesConfig(), seed=0)
    lifecycle = RunLifecycle(PLAN, replace(LIMITS, num_lives=0), restarts, now_s=0.0)
    lifecycle.take_up_again("no group is known", 5.0)
    assert lifecycle.outcome == RunOutcome("failed", "no group is known, again and again")


def test_a_run_is_finished_when_all_have_left_by_themselves() -> None:
    lifecycle = running_lifecycle()
    assert lifecycle.finished("all steps taken", 5.0) == [
        AskToLeave(True, "all steps taken"),
        Notice("all steps taken"),
    ]
    assert not lifecycle.over(6.0)
    leave(lifecycle, 0, 6.0)
    assert lifecycle.over(6.0)
    assert lifecycle.outcome == RunOutcome("finished", "all steps taken")


def test_the_exit_of_a_learner_that_is_not_started_again_fails_the_run() -> None:
    lifecycle = running_lifecycle(RestartConfig(when="never", min_healthy=0))
    reason = "learner/0 ended with exit code 0: roles.learner.restart.when is never, and training needs it"
    assert AskToStop(reason) in lifecycle.exited(ProcessExit("learner/0", 1, 0), 5.0)
    assert lifecycle.outcome == RunOutcome("failed", reason, "learner/0")


def test_the_first_reason_stands() -> None:
    lifecycle = running_lifecycle(RestartConfig(when="never"))
    lifecycle.exited(ProcessExit("learner/0", 1, 2), 5.0)
    assert lifecycle.exited(ProcessExit("reward/0", 1, 1), 5.1) == []
    assert lifecycle.interrupted("Ctrl-C", 5.2) == []
    assert lifecycle.outcome is not None
    assert lifecycle.outcome.culprit == "learner/0"


@pytest.mark.parametrize("name", ["generator/0", "learner/0", "shaper/0"])
def test_nobody_has_anything_left_to_write_when_a_run_is_finished(name: str) -> None:
    lifecycle = running_lifecycle()
    lifecycle.finished("done", 5.0)
    lifecycle.exited(ProcessExit(name, 1, -9), 6.0)
    assert lifecycle.outcome == RunOutcome("finished", "done")


def test_a_stopped_run_stays_stopped_whatever_the_exit_codes() -> None:
    lifecycle = running_lifecycle()
    lifecycle.interrupted("Ctrl-C", 5.0)
    leave(lifecycle, -15, 6.0)
    assert lifecycle.over(6.0)
    assert lifecycle.outcome == RunOutcome("stopped", "Ctrl-C")


def test_a_user_who_stops_a_finishing_run_waits_no_longer_than_for_any_other() -> None:
    lifecycle = running_lifecycle()
    lifecycle.finished("done", 0.0)
    lifecycle.interrupted("Ctrl-C", 1.0)
    assert not lifecycle.over(10.9)
    assert lifecycle.over(11.0)
    assert lifecycle.outcome == RunOutcome("stopped", "Ctrl-C")


def test_the_time_to_leave_is_bounded() -> None:
    lifecycle = running_lifecycle()
    lifecycle.finished("done", 0.0)
    assert not lifecycle.over(99.9)
    assert lifecycle.over(100.0)
    lifecycle.overdue()
    assert lifecycle.outcome is not None
    assert lifecycle.outcome.status == "failed"
    assert "did not leave within 100 s" in lifecycle.outcome.reason


def test_a_stop_lets_the_shaper_account_before_the_others_leave() -> None:
    lifecycle = running_lifecycle()
    assert lifecycle.interrupted("Ctrl-C", 5.0) == [Notice("Ctrl-C"), AskToStop("Ctrl-C")]
    assert lifecycle.tick(9.9) == []
    assert lifecycle.finished("stopped", 9.9) == [AskToLeave(False, "Ctrl-C")]
    assert lifecycle.tick(12.0) == []
    assert lifecycle.outcome == RunOutcome("stopped", "Ctrl-C")


def test_a_shaper_that_does_not_account_in_time_keeps_nobody() -> None:
    lifecycle = running_lifecycle()
    lifecycle.interrupted("Ctrl-C", 5.0)
    assert lifecycle.tick(10.0) == [AskToLeave(False, "Ctrl-C")]
    assert lifecycle.tick(11.0) == []


def test_a_shaper_that_dies_while_it_stops_keeps_nobody() -> None:
    lifecycle = running_lifecycle()
    lifecycle.interrupted("Ctrl-C", 5.0)
    assert lifecycle.exited(ProcessExit("shaper/0", 1, 1), 5.1) == [AskToLeave(False, "Ctrl-C")]


def test_a_shaper_that_is_not_there_is_not_asked() -> None:
    lifecycle = new_lifecycle()
    start(lifecycle, "shaper/0", 0.0)
    assert lifecycle.interrupted("Ctrl-C", 1.0) == [Notice("Ctrl-C"), AskToLeave(False, "Ctrl-C")]
    dead = running_lifecycle()
    assert isinstance(dead.exited(ProcessExit("shaper/0", 1, -9), 1.0)[0], Lost)
    assert AskToLeave(False, "Ctrl-C") in dead.interrupted("Ctrl-C", 1.1)
    assert dead.tick(10.0) == [], "and not started for that"


@pytest.mark.parametrize(("has_reported", "waits_until_s"), [(True, 65.0), (False, 15.0)])
def test_a_stop_waits_for_a_learner_to_save_only_where_it_has_reported(
    has_reported: bool, waits_until_s: float
) -> None:
    """Its node may be lost, and a process that was ordered of it never come."""
    roles = RolesConfig()
    lifecycle = RunLifecycle(PLAN, replace(LIMITS, save_s=50.0), Restarts(PLAN, roles, seed=0), now_s=0.0)
    for name in NAMES:
        lifecycle.ordered(name, 0.0)
        if name != "learner/0" or has_reported:
            lifecycle.reported(name, WORKING, 0.0)
    lifecycle.interrupted("Ctrl-C", 5.0)
    lifecycle.finished("stopped", 5.0)
    for name in NAMES:
        if name != "learner/0":
            lifecycle.exited(ProcessExit(name, 1, 0), 6.0)
    assert not lifecycle.over(waits_until_s - 0.1)
    assert lifecycle.over(waits_until_s)


def test_giving_up_waits_for_nobody() -> None:
    lifecycle = running_lifecycle()
    lifecycle.interrupted("Ctrl-C", 5.0)
    lifecycle.give_up(5.1)
    assert lifecycle.over(5.1)


def test_a_process_that_does_not_report_in_time_fails_the_run() -> None:
    lifecycle = new_lifecycle()
    start(lifecycle, "reward/0", 3.0)
    assert lifecycle.tick(122.9) == []
    lifecycle.tick(123.0)
    reason = "reward/0 did not report within 120 s (roles.reward.start_timeout_s)"
    assert lifecycle.outcome == RunOutcome("failed", reason, "reward/0")


def test_a_process_that_cannot_be_started_fails_the_run() -> None:
    lifecycle = new_lifecycle()
    lifecycle.failed_to_start("reward/0", "no memory", 1.0)
    assert lifecycle.outcome == RunOutcome("failed", "reward/0 cannot be started: no memory")
    assert lifecycle.over(1.0)


def test_a_dead_generator_is_lost_and_started_again_after_its_back_off() -> None:
    lifecycle = running_lifecycle(RestartConfig(backoff=BackoffConfig(initial_s=2.0, jitter=0.0)))
    ended = ProcessExit("generator/0", 1, -9)
    lost, notice = lifecycle.exited(ended, 5.0)
    assert lost == Lost(ended, 7.0)
    assert isinstance(notice, Notice)
    assert "generator/0 was ended by SIGKILL; it restarts in 2.0 s" in notice.text
    assert lifecycle.outcome is None
    assert lifecycle.tick(6.9) == []
    assert lifecycle.tick(7.0) == [Start("generator/0", 2)]
    assert lifecycle.tick(7.1) == []


def test_a_process_serves_again_when_it_does_its_work_and_not_when_it_reports() -> None:
    lifecycle = running_lifecycle()
    lifecycle.exited(ProcessExit("generator/0", 1, -9), 5.0)
    lifecycle.tick(6.0)
    start(lifecycle, "generator/0", 6.0)
    for state in NOT_SERVING:
        assert lifecycle.reported("generator/0", msgspec.structs.replace(WORKING, state=state), 7.0) == []
    assert lifecycle.reported("generator/0", WORKING, 8.0) == [Serves("generator/0", 2, 3.0)]
    assert lifecycle.reported("generator/0", WORKING, 9.0) == []


def test_a_state_that_is_no_service_is_one_that_a_process_reports() -> None:
    sources = "".join(path.read_text() for path in Path(darts_async.__path__[0]).glob("*/process.py"))
    assert all(f'"{state}"' in sources for state in NOT_SERVING)


def test_a_process_that_does_not_report_after_a_restart_is_killed_and_counts_as_dead() -> None:
    lifecycle = running_lifecycle()
    lifecycle.exited(ProcessExit("reward/0", 1, -9), 5.0)
    lifecycle.tick(6.0)
    start(lifecycle, "reward/0", 6.0)
    assert not [action for action in lifecycle.tick(125.9) if isinstance(action, Kill)]
    kill = next(action for action in lifecycle.tick(126.0) if isinstance(action, Kill))
    assert (kill.name, kill.incarnation) == ("reward/0", 2)
    assert "start_timeout_s" in kill.reason
    assert isinstance(lifecycle.exited(ProcessExit("reward/0", 2, -9, 2), 126.1)[0], Lost)


def test_a_process_that_cannot_be_started_again_is_tried_once_more() -> None:
    lifecycle = running_lifecycle()
    lifecycle.exited(ProcessExit("reward/0", 1, -9), 5.0)
    lifecycle.tick(6.0)
    assert isinstance(lifecycle.failed_to_start("reward/0", "no memory", 6.0)[0], Lost)
    assert lifecycle.tick(10.0) == [Start("reward/0", 3)]


def test_the_run_goes_on_without_a_process_above_min_healthy_and_fails_below() -> None:
    lifecycle = running_lifecycle(RestartConfig(when="never", min_healthy=0))
    ended = ProcessExit("generator/0", 1, -9)
    assert lifecycle.exited(ended, 5.0)[0] == Lost(ended, None)
    assert lifecycle.outcome is None
    lifecycle = running_lifecycle(RestartConfig(when="never"))
    lifecycle.exited(ended, 5.0)
    assert lifecycle.outcome is not None
    assert lifecycle.outcome.culprit == "generator/0"
    assert "min_healthy is 1" in lifecycle.outcome.reason


def test_a_silent_process_is_killed_once() -> None:
    lifecycle = running_lifecycle(RestartConfig(silent_after_s=3.0))
    for tenth_s in range(29):
        assert lifecycle.tick(tenth_s / 10) == []
    kills = [action for action in lifecycle.tick(3.0) if isinstance(action, Kill)]
    assert {kill.name for kill in kills} == set(NAMES)
    assert lifecycle.tick(3.1) == []


def test_a_restart_by_hand_asks_the_process_to_end_and_starts_it_at_once() -> None:
    lifecycle = running_lifecycle()
    assert lifecycle.restart("generator/0", 5.0) == [Stop("generator/0")]
    ended = ProcessExit("generator/0", 1, 0)
    assert lifecycle.exited(ended, 6.0)[0] == Lost(ended, 6.0)
    assert lifecycle.tick(6.0) == [Start("generator/0", 2)]


def test_a_restart_by_hand_of_a_process_that_is_being_started_asks_for_nothing_more() -> None:
    lifecycle = new_lifecycle()
    assert lifecycle.restart("generator/0", 0.0) == [], "the run has just begun"
    lifecycle = running_lifecycle(RestartConfig(backoff=BackoffConfig(initial_s=1.0, jitter=0.0)))
    lifecycle.exited(ProcessExit("generator/0", 1, -9), 5.0)
    assert lifecycle.tick(6.0) == [Start("generator/0", 2)]
    assert lifecycle.restart("generator/0", 6.0) == []
    start(lifecycle, "generator/0", 6.1)
    ended = ProcessExit("generator/0", 2, -9, 2)
    assert lifecycle.exited(ended, 7.0)[0] == Lost(ended, 9.0), "it died by itself: that counts"


def test_a_process_that_was_asked_to_end_may_fall_silent() -> None:
    lifecycle = running_lifecycle(RestartConfig(silent_after_s=3.0))
    lifecycle.restart("generator/0", 1.0)
    lifecycle.reported("generator/0", WORKING, 1.1)  # was on its way
    for second in range(2, 30):
        for name in ("reward/0", "learner/0", "shaper/0"):
            lifecycle.reported(name, WORKING, float(second))
        assert lifecycle.tick(float(second)) == []
    lifecycle.exited(ProcessExit("generator/0", 1, 0), 30.0)
    lifecycle.tick(30.0)
    start(lifecycle, "generator/0", 30.0)
    lifecycle.reported("generator/0", WORKING, 31.0)
    assert [type(action) for action in lifecycle.tick(32.0) + lifecycle.tick(33.5) + lifecycle.tick(34.5)][:1] == [Kill]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("generator/7", "there is no 'generator/7'; the run has generator/0, learner/0, reward/0, shaper/0"),
    ],
)
def test_what_cannot_be_restarted_by_hand_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(RestartRefused, match=re.escape(reason)):
        running_lifecycle().restart(name, 5.0)


def ranks_course() -> RunLifecycle:
    """With a learner of three ranks."""
    config = RunConfig.model_validate({"roles": {"learner": {"replicas": 3}}})
    plan = plan_run(config, Path("/runs/a"), link_addresses("127.0.0.1", range(7000, 7007)))
    return running_lifecycle(RestartConfig(backoff=BackoffConfig(initial_s=2.0, jitter=0.0)), plan)


RANKS = ["learner/0", "learner/1", "learner/2"]


def test_the_ranks_of_the_learner_end_together_and_come_back_together() -> None:
    lifecycle = ranks_course()
    ended = ProcessExit("learner/1", 1, -9)
    lost, *drops, notice = lifecycle.exited(ended, 5.0)
    assert (lost, drops) == (Lost(ended, 7.0), [Drop("learner/0"), Drop("learner/2")])
    assert isinstance(notice, Notice)
    assert "learner/1 was ended by SIGKILL; it restarts in 2.0 s with learner/0, learner/2" in notice.text
    assert lifecycle.exited(ProcessExit("learner/0", 1, 1), 5.1)[0] == Lost(ProcessExit("learner/0", 1, 1), 7.0)
    assert lifecycle.tick(8.0) == [], "one of them still runs"
    lifecycle.exited(ProcessExit("learner/2", 1, -9), 8.1)
    assert lifecycle.tick(8.2) == [Start(name, 2) for name in RANKS]
    lifecycle.exited(ProcessExit("learner/2", 1, -9, 2), 9.0)
    assert start(lifecycle, "learner/0", 9.1) == [Drop("learner/0")], "it was on its way when another ended"


def test_a_rank_that_is_restarted_by_hand_takes_the_others_with_it() -> None:
    lifecycle = ranks_course()
    assert [lifecycle.restart(name, 5.0) for name in RANKS] == [[Stop("learner/0")], [], []]
    drops = [action for action in lifecycle.exited(ProcessExit("learner/2", 1, 0), 5.1) if isinstance(action, Drop)]
    assert drops == [Drop("learner/0"), Drop("learner/1")]
    for name in RANKS[:2]:
        lifecycle.exited(ProcessExit(name, 1, -9), 5.2)
    assert lifecycle.tick(5.2) == [Start(name, 2) for name in RANKS]
    for name in RANKS:
        assert start(lifecycle, name, 5.3) == []
        assert lifecycle.reported(name, WORKING, 6.0) != []


def test_a_run_that_is_ending_restarts_nothing() -> None:
    lifecycle = running_lifecycle()
    lifecycle.exited(ProcessExit("generator/0", 1, -9), 5.0)
    lifecycle.interrupted("Ctrl-C", 5.1)
    assert not [action for action in lifecycle.tick(60.0) if isinstance(action, Start)]
    with pytest.raises(RestartRefused, match="the run is ending: Ctrl-C"):
        lifecycle.restart("reward/0", 5.2)


def test_a_run_without_steps_is_warned_about_once_until_it_moves_again() -> None:
    lifecycle = running_lifecycle(RestartConfig(silent_after_s=1e6))
    assert lifecycle.tick(STALLED_AFTER_S - 0.1) == []
    [notice] = lifecycle.tick(STALLED_AFTER_S)
    assert isinstance(notice, Notice)
    assert notice.text.startswith("no step for 60 s")
    assert lifecycle.tick(STALLED_AFTER_S + 1) == []
    lifecycle.progressed(100.0)
    assert lifecycle.tick(100.0 + STALLED_AFTER_S) != []


def test_a_run_without_progress_fails_however_alive_its_processes_look() -> None:
    lifecycle = running_lifecycle(RestartConfig(silent_after_s=1e6))
    lifecycle.progressed(100.0)
    lifecycle.tick(100.0 + STALLED_AFTER_S)
    assert lifecycle.tick(599.0) == []
    actions = lifecycle.tick(600.0)
    reason = "no step for 500 s (telemetry.no_progress_timeout_s)"
    assert lifecycle.outcome == RunOutcome("failed", reason)
    assert actions[0] == Notice(reason)


def test_a_step_is_one_line_once_all_have_spoken() -> None:
    merger = StepMerger({"shaper/0": 1, "learner/0": 1})
    assert merger.add("shaper/0", 0, {"a": 1.0}) == []
    assert merger.add("shaper/0", 1, {"a": 2.0}) == []
    assert merger.add("learner/0", 0, {"b": 3.0}) == [StepLine(0, {"a": 1.0, "b": 3.0})]
    assert merger.flush() == [StepLine(1, {"a": 2.0})]
    assert merger.flush() == []


def test_a_process_that_speaks_twice_about_a_step_is_waited_for_twice() -> None:
    merger = StepMerger({"shaper/0": 1, "learner/0": 2})
    assert merger.add("shaper/0", 0, {"a": 1.0}) == []
    assert merger.add("learner/0", 0, {"b": 3.0}) == []
    assert merger.add("learner/0", 0, {"c": 4.0}) == [StepLine(0, {"a": 1.0, "b": 3.0, "c": 4.0})]


def test_a_silent_reporter_holds_a_step_back_for_a_few_steps_only() -> None:
    merger = StepMerger({"shaper/0": 1, "learner/0": 1})
    ready = [line for step in range(10) for line in merger.add("shaper/0", step, {})]
    assert [line.step for line in ready] == list(range(10 - MAX_OPEN_STEPS))


def test_a_report_of_a_step_whose_line_has_left_holds_no_other_back() -> None:
    merger = StepMerger({"shaper/0": 1, "learner/0": 1})
    for step in range(3):
        merger.add("shaper/0", step, {})
        merger.add("learner/0", step, {"loss": 1.0})
    assert merger.add("learner/0", 1, {"loss": 2.0}) == [StepLine(1, {"loss": 2.0})], "it was taken again"
    assert merger.add("shaper/0", 3, {}) == []
    assert merger.add("learner/0", 3, {"loss": 3.0}) == [StepLine(3, {"loss": 3.0})]


@given(st.lists(st.tuples(st.sampled_from(["shaper/0", "learner/0"]), st.integers(0, 8)), max_size=60))
def test_no_report_is_lost_and_each_leaves_once(reports: list[tuple[str, int]]) -> None:
    merger = StepMerger({"shaper/0": 1, "learner/0": 1})
    lines: list[StepLine] = []
    for number, (reporter, step) in enumerate(reports):
        lines += merger.add(reporter, step, {f"m{number}": float(step)})
    lines += merger.flush()
    values = {name: (value, line.step) for line in lines for name, value in line.metrics.items()}
    assert values == {f"m{number}": (float(step), step) for number, (_, step) in enumerate(reports)}
    assert sum(len(line.metrics) for line in lines) == len(reports)


def test_the_plan_names_every_process_and_who_may_connect_to_whom() -> None:
    config = RunConfig.model_validate(
        {"roles": {"generator": {"replicas": 2, "threads": 3}, "reward": {"replicas": 2}}}
    )
    plan = plan_run(config, Path("/runs/a"), ADDRESSES)
    generators, rewards = ("generator/0", "generator/1"), ("reward/0", "reward/1")
    assert plan.endpoints() == ("launcher", "agent/local", "shaper/0", "learner/0", *rewards, *generators)
    assert {link.name: (link.hub, link.members) for link in plan.links} == {
        "generators": ("shaper/0", generators),
        "rewards": ("shaper/0", rewards),
        "learner": ("shaper/0", ("learner/0",)),
        "weights": ("learner/0", generators),
        "launcher": ("launcher", ("shaper/0", "learner/0", *rewards, *generators)),
        "agents": ("launcher", ("agent/local",)),
    }
    assert [link.address for link in plan.links] == [f"tcp://127.0.0.1:{port}" for port in range(7000, 7006)]
    spec = plan.processes[-1]
    assert spec.argv[1:] == (
        *("-P", "-m", "darts_async.machine.lifetime", "darts_async.generator.process"),
        *("--run-dir", "/runs/a", "--name", "generator/1", "--incarnation", "1"),
    )
    assert spec.env["OMP_NUM_THREADS"] == spec.env["TORCH_NUM_THREADS"] == "3"
    assert reports_per_step() == {"shaper/0": 1, "learner/0": 2}


def test_the_plan_reads_back_as_it_was_written() -> None:
    assert decode_plan(encode_plan(PLAN)) == PLAN


def test_a_process_whose_node_has_to_come_up_first_has_that_time_too() -> None:
    lifecycle = new_lifecycle()
    timeout_s = PLAN.process("reward/0").start_timeout_s
    lifecycle.ordered("reward/0", 0.0)
    assert lifecycle.tick(timeout_s + NODE_COMES_UP_WITHIN_S - 0.1) == []
    lifecycle.tick(timeout_s + NODE_COMES_UP_WITHIN_S + 0.1)
    assert lifecycle.outcome is not None
    assert lifecycle.outcome.culprit == "reward/0"


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a plan of this version"):
        decode_plan(b'{"processes": [], "links": [], "more": 1}')
    with pytest.raises(ConfigError, match="is not a run directory"):
        read_plan(tmp_path)


def test_addresses_of_ipv6_have_brackets_and_names_become_file_names() -> None:
    assert link_addresses("::1", [5]) == ("tcp://[::1]:5",)
    assert file_stem("generator/0") == "generator-0"


def lines_of(actions: list[Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, Notice)]


FULL = "no space left on /data (0.0 of 8.0 MiB free)"


def test_a_process_that_a_full_disk_has_ended_comes_back_with_room_however_often() -> None:
    lifecycle = running_lifecycle(RestartConfig(intensity=IntensityConfig(max=1)))
    for number in range(5):
        ended, now_s = ProcessExit("shaper/0", 1, NO_SPACE_EXIT_CODE, number + 1), 10.0 * (number + 1)
        lost, notice = lifecycle.exited(ended, now_s, FULL)
        assert lost == Lost(ended, now_s, needs_room=True)
        assert notice == Notice(f"{ended}: {FULL}; it restarts once there is space")
        assert lifecycle.needs_room
        assert lifecycle.tick(now_s + 5.0, has_room=False) == []
        assert lifecycle.tick(now_s + 5.0, has_room=True) == [Start("shaper/0", number + 2)]
        assert not lifecycle.needs_room
        start(lifecycle, "shaper/0", now_s + 5.0)
        lifecycle.reported("shaper/0", WORKING, now_s + 5.0)
    assert lifecycle.outcome is None


def test_the_ranks_of_a_learner_on_a_full_disk_wait_together() -> None:
    lifecycle = ranks_course()
    ended = ProcessExit("learner/1", 1, NO_SPACE_EXIT_CODE)
    assert lifecycle.exited(ended, 5.0)[:2] == [Lost(ended, 5.0, needs_room=True), Drop("learner/0")]
    for name in ("learner/0", "learner/2"):
        lifecycle.exited(ProcessExit(name, 1, -9), 5.1)
    assert lifecycle.tick(9.0, has_room=False) == []
    assert lifecycle.tick(9.0) == [Start(name, 2) for name in RANKS]


def test_a_process_that_waits_for_room_says_so_once_and_no_step_is_missed_meanwhile() -> None:
    lifecycle = running_lifecycle()
    waits = msgspec.structs.replace(WORKING, hindrance=FULL)
    assert lines_of(lifecycle.reported("learner/0", waits, 1.0)) == [f"{FULL}: learner/0 waits for space"]
    assert lines_of(lifecycle.reported("learner/0", waits, 2.0)) == []
    for now_s in range(10, 900, 20):
        for name in NAMES:
            lifecycle.reported(name, waits if name == "learner/0" else WORKING, float(now_s))
        assert lifecycle.tick(float(now_s)) == []
    assert lines_of(lifecycle.reported("learner/0", WORKING, 900.0)) == ["learner/0 has space on the disk again"]


def test_a_wait_for_room_has_an_end_that_names_it() -> None:
    lifecycle = running_lifecycle()
    lifecycle.exited(ProcessExit("shaper/0", 1, NO_SPACE_EXIT_CODE), 0.0, FULL)
    lifecycle.tick(0.0, has_room=False)
    for now_s in range(0, 2000, 20):
        for name in set(NAMES) - {"shaper/0"}:
            lifecycle.reported(name, WORKING, float(now_s))
        lifecycle.tick(float(now_s), has_room=False)
    assert lifecycle.outcome is not None
    assert lifecycle.outcome.reason == "there was no space on the disk for 1000 s (telemetry.no_space_timeout_s)"


def test_the_cause_of_an_end_is_in_its_notice_and_in_the_reason_of_the_run() -> None:
    lifecycle = running_lifecycle()
    ended = ProcessExit("reward/0", 1, 1)
    _, notice = lifecycle.exited(ended, 5.0, "ValueError: a reason")
    assert isinstance(notice, Notice)
    assert notice.text.startswith("reward/0 ended with exit code 1: ValueError: a reason; it restarts in")
    lifecycle.exited(ProcessExit("learner/0", 1, PERMANENT_EXIT_CODE), 6.0, "ModelError: no weights")
    assert lifecycle.outcome is not None
    assert lifecycle.outcome.reason == (
        "learner/0 ended with exit code 78: ModelError: no weights: a restart would end in the same way"
    )
