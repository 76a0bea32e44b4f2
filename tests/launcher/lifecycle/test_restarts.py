"""Who is started again, and when; who hangs. No input or output."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.config import BackoffConfig, IntensityConfig, RestartConfig, RoleConfig, RolesConfig, RunConfig
from darts_async.errors import NO_SPACE_EXIT_CODE, PERMANENT_EXIT_CODE
from darts_async.protocol import ProcessStatus
from launcher.lifecycle.liveness import Liveness
from launcher.lifecycle.restarts import EndRun, LeaveDown, Restarts, StartAgain, Verdict
from launcher.plan.plan import link_addresses, plan_run

KILLED = -9
ADDRESSES = link_addresses("127.0.0.1", range(7000, 7006))


def restarts_of(policy: RestartConfig, replicas: int = 2, seed: int = 0) -> Restarts:
    role = RoleConfig(replicas=replicas, restart=policy)
    config = RunConfig(roles=RolesConfig(generator=role, reward=role))
    return Restarts(plan_run(config, Path("/runs/a"), ADDRESSES), config.roles, seed)


def delays(restarts: Restarts, name: str, times_s: list[float]) -> list[float | None]:
    """The back-off of each death; None where there was no restart."""
    found = []
    for now_s in times_s:
        verdict = restarts.ended(name, KILLED, now_s)
        found.append(verdict.delay_s if isinstance(verdict, StartAgain) else None)
        restarts.take_due(now_s + 1e6)
    return found


def test_the_back_off_doubles_up_to_its_maximum() -> None:
    backoff = BackoffConfig(initial_s=1.0, max_s=5.0, jitter=0.0)
    restarts = restarts_of(RestartConfig(backoff=backoff, intensity=IntensityConfig(max=6, window_s=100.0)))
    assert delays(restarts, "generator/0", [0.0, 1.0, 2.0, 3.0, 4.0]) == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_deaths_out_of_the_window_are_forgotten() -> None:
    backoff = BackoffConfig(initial_s=1.0, max_s=50.0, jitter=0.0)
    restarts = restarts_of(RestartConfig(backoff=backoff, intensity=IntensityConfig(max=2, window_s=10.0)))
    assert delays(restarts, "generator/0", [0.0, 9.9, 10.0, 40.0]) == [1.0, 2.0, 2.0, 1.0]


def test_jitter_is_seeded_and_stays_in_its_share() -> None:
    policy = RestartConfig(
        backoff=BackoffConfig(initial_s=1.0, max_s=1.0, jitter=0.3), intensity=IntensityConfig(max=50)
    )
    times_s = [float(number) for number in range(40)]
    first, again, other = (delays(restarts_of(policy, seed=seed), "reward/1", times_s) for seed in (1, 1, 2))
    assert first == again != other
    assert all(delay is not None and 0.7 <= delay <= 1.3 for delay in first)
    assert max(filter(None, first)) - min(filter(None, first)) > 0.4


def test_one_death_more_than_the_intensity_exhausts() -> None:
    policy = RestartConfig(intensity=IntensityConfig(max=3, window_s=100.0))
    restarts = restarts_of(policy)
    assert None not in delays(restarts, "generator/0", [0.0, 1.0, 2.0])
    verdict = restarts.ended("generator/0", KILLED, 3.0)
    assert verdict == LeaveDown("it has died 4 times within 100 s")
    assert restarts.take_due(1e9) == []
    assert delays(restarts, "generator/1", [3.0]) != [None], "the other replica has a budget of its own"


@pytest.mark.parametrize(
    ("on_exhausted", "replicas", "min_healthy", "expected"),
    [("degrade", 2, 1, LeaveDown), ("degrade", 2, 2, EndRun), ("degrade", 1, 0, LeaveDown), ("fail_run", 2, 1, EndRun)],
)
def test_what_follows_from_exhaustion(
    on_exhausted: str, replicas: int, min_healthy: int, expected: type[Verdict]
) -> None:
    policy = RestartConfig.model_validate({"when": "never", "on_exhausted": on_exhausted, "min_healthy": min_healthy})
    assert isinstance(restarts_of(policy, replicas).ended("generator/0", KILLED, 0.0), expected)


@pytest.mark.parametrize(
    ("when", "code", "expected"),
    [
        ("always", 0, StartAgain),
        ("always", KILLED, StartAgain),
        ("on_failure", 0, LeaveDown),
        ("on_failure", KILLED, StartAgain),
        ("on_failure", 1, StartAgain),
        ("never", KILLED, LeaveDown),
    ],
)
def test_when_a_process_is_started_again(when: str, code: int, expected: type[Verdict]) -> None:
    restarts = restarts_of(RestartConfig.model_validate({"when": when}))
    restarts.served("generator/0")
    assert isinstance(restarts.ended("generator/0", code, 0.0), expected)


def test_a_mistake_that_a_restart_does_not_mend_ends_the_run() -> None:
    restarts = restarts_of(RestartConfig())
    assert isinstance(restarts.ended("generator/0", 1, 0.0), EndRun), "an error before it ever served"
    restarts.served("generator/0")
    assert isinstance(restarts.ended("generator/0", 1, 0.0), StartAgain)
    restarts.take_due(1e6)
    assert isinstance(restarts.ended("generator/0", PERMANENT_EXIT_CODE, 0.0), EndRun)


@pytest.mark.parametrize("on_exhausted", ["degrade", "fail_run"])
def test_a_run_does_not_go_on_without_its_learner(on_exhausted: str) -> None:
    policy = RestartConfig.model_validate({"intensity": {"max": 1}, "on_exhausted": on_exhausted, "min_healthy": 0})
    config = RunConfig(roles=RolesConfig(learner=RoleConfig(restart=policy)))
    restarts = Restarts(plan_run(config, Path("/runs/a"), ADDRESSES), config.roles, 0)
    assert isinstance(restarts.ended("learner/0", KILLED, 0.0), StartAgain)
    restarts.take_due(100.0)
    assert restarts.ended("learner/0", KILLED, 100.0) == EndRun(
        "it has died 2 times within 600 s, and training needs it"
    )


def test_a_restart_by_hand_costs_nothing_and_brings_back_who_was_given_up() -> None:
    restarts = restarts_of(RestartConfig(intensity=IntensityConfig(max=1, window_s=100.0)))
    for round_ in range(5):
        assert restarts.asked("reward/0", round_), "it runs, and has to be stopped"
        assert restarts.ended("reward/0", 0, round_) == StartAgain(0.0)
        assert restarts.take_due(round_) == ["reward/0"]
    assert delays(restarts, "reward/0", [10.0, 11.0])[1] is None
    assert not restarts.asked("reward/0", 12.0), "nobody is there to be stopped"
    assert restarts.take_due(12.0) == ["reward/0"]
    assert restarts.incarnation("reward/0") == 8
    assert delays(restarts, "reward/0", [13.0]) != [None]


def test_a_restart_by_hand_ends_a_back_off() -> None:
    restarts = restarts_of(RestartConfig(backoff=BackoffConfig(initial_s=20.0, jitter=0.0)))
    restarts.ended("generator/1", KILLED, 0.0)
    assert restarts.take_due(19.0) == []
    assert not restarts.asked("generator/1", 19.0)
    assert restarts.take_due(19.0) == ["generator/1"]


EVENTS = st.lists(
    st.tuples(st.sampled_from(["die", "leave", "full", "hand", "wait"]), st.integers(0, 3), st.floats(0.0, 20.0)),
    max_size=60,
)


@given(
    EVENTS,
    st.integers(1, 3),
    st.sampled_from(["always", "on_failure", "never"]),
    st.sampled_from(["degrade", "fail_run"]),
    st.integers(0, 2),
)
def test_any_history_keeps_the_invariants(
    events: list[tuple[str, int, float]], most: int, when: str, on_exhausted: str, min_healthy: int
) -> None:
    policy = {"when": when, "on_exhausted": on_exhausted, "min_healthy": min_healthy}
    policy |= {"intensity": {"max": most, "window_s": 30.0}, "backoff": {"initial_s": 1.0, "max_s": 8.0}}
    restarts = restarts_of(RestartConfig.model_validate(policy))
    names = [name for name in sorted(restarts.policies) if name.startswith(("generator", "reward"))]
    running, waiting, down = set(names), dict[str, float](), set[str]()
    died_s: dict[str, list[float]] = {name: [] for name in names}
    asked: set[str] = set()
    now_s = 0.0
    for kind, number, passed_s in events:
        now_s += passed_s
        name = names[number]
        if kind in ("die", "leave", "full") and name in running:
            by_hand = name in asked
            asked.discard(name)
            running.discard(name)
            code = {"die": KILLED, "leave": 0, "full": NO_SPACE_EXIT_CODE}[kind]
            verdict = restarts.ended(name, code, now_s)
            match verdict:
                case EndRun():
                    return
                case LeaveDown():
                    down.add(name)
                    assert not by_hand
                    assert sum(other.partition("/")[0] == name.partition("/")[0] for other in down) <= 2 - min_healthy
                case StartAgain(needs_room=True):
                    assert restarts.needs_room
                    waiting[name] = now_s + 1.0
                case StartAgain(delay_s):
                    waiting[name] = now_s + delay_s
                    assert delay_s == 0.0 if by_hand else 0.8 <= delay_s <= 8.0 * 1.2
                    if not by_hand:
                        died_s[name].append(now_s)
                        assert len([at_s for at_s in died_s[name] if now_s - at_s < 30.0]) <= most
        elif kind == "hand":
            assert restarts.asked(name, now_s) == (name in running)
            if name in running:
                asked.add(name)
            else:
                died_s[name] = died_s[name] if name not in down and name not in waiting else []
                down.discard(name)
                waiting[name] = now_s
        before = {other: restarts.incarnation(other) for other in names}
        due = restarts.take_due(now_s)
        assert set(due) == {other for other, at_s in waiting.items() if at_s <= now_s}
        for other in due:
            assert restarts.incarnation(other) == before[other] + 1
            running.add(other)
            del waiting[other]
        restarts.validate()
        assert running | waiting.keys() | down == set(names)


# --- liveness ----------------------------------------------------------------------------------------------------

POLICY = RestartConfig(silent_after_s=5.0, stalled_after_s=20.0)


def status(num_tokens: int, num_in_flight: int) -> ProcessStatus:
    return ProcessStatus("decoding", 0, num_tokens, num_in_flight, 1.0, {}, 0.0)


def hanging(liveness: Liveness, until_s: float, since_s: float = 0.0) -> list[str]:
    """Who is found hanging when somebody looks every half second."""
    looks = itertools.takewhile(lambda now_s: now_s <= until_s, itertools.count(since_s, 0.5))
    return [name for now_s in looks for name, _ in liveness.hanging(now_s)]


def test_silence_is_noticed_from_the_first_report_on() -> None:
    liveness = Liveness({"generator/0": POLICY}, {})
    assert hanging(liveness, 100.0) == [], "the start timeout is another's"
    liveness.heard("generator/0", status(0, 0), 100.0)
    assert hanging(liveness, 104.5, since_s=100.0) == []
    [(name, reason)] = liveness.hanging(105.0)
    assert (name, "silent_after_s" in reason) == ("generator/0", True)
    liveness.forget("generator/0")
    assert liveness.hanging(106.0) == []


def test_work_without_a_token_is_a_stall_of_a_generator_only() -> None:
    liveness = Liveness({"generator/0": POLICY, "reward/0": POLICY}, {})
    found: list[tuple[float, str]] = []
    for second in range(60):
        for name in ("generator/0", "reward/0"):
            liveness.heard(name, status(100 if second >= 10 else second, 3), float(second))
        found += [(second, name) for name, _ in liveness.hanging(float(second))]
    assert found[0] == (30, "generator/0"), "20 s after the last token"
    assert {name for _, name in found} == {"generator/0"}


def test_a_generator_without_work_does_not_stall() -> None:
    liveness = Liveness({"generator/0": POLICY}, {})
    for second in range(100):
        liveness.heard("generator/0", status(7, 0), float(second))
        assert liveness.hanging(float(second)) == []
    for second in range(100, 119):
        liveness.heard("generator/0", status(7, 1), float(second))
        assert liveness.hanging(float(second)) == [], "it has work since a moment ago"


def test_the_absence_of_the_watcher_is_no_silence_of_the_others() -> None:
    liveness = Liveness({"generator/0": POLICY}, {})
    liveness.heard("generator/0", status(0, 0), 0.0)
    liveness.hanging(0.5)
    assert liveness.hanging(1000.0) == []
    assert hanging(liveness, 1004.0, since_s=1000.5) == []
    assert hanging(liveness, 1004.5, since_s=1004.5) == ["generator/0"], "half a second of silence came before"


def test_a_process_that_has_not_reported_within_its_start_timeout_is_late() -> None:
    liveness = Liveness({"learner/0": POLICY}, {"learner/0": 10.0})
    liveness.expect("learner/0", 5.0)
    assert (liveness.late(14.5), liveness.unheard) == ([], {"learner/0"})
    assert liveness.late(15.0) == [("learner/0", "did not report within 10 s (roles.learner.start_timeout_s)")]
    liveness.heard("learner/0", status(0, 0), 15.0)
    assert (liveness.late(99.0), liveness.unheard) == ([], set())
