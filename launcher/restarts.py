"""Whether a process that has ended is started again, and when: pure decisions, one policy per process.

    running --ends--> waiting --its back-off is over, or by hand--> running, as the next incarnation
       `----ends, and is not to come back--> down --by hand--> running

The n-th death within the window of the policy waits

    min(max_s, initial_s * 2^(n - 1)) * (1 + jitter * u),    u uniform in [-1, 1) and seeded,

and with more than `intensity.max` deaths in the window the process is exhausted. A restart by hand is no death.

A process is not started again where that cannot help: it ended by a mistake in what the run was given (its exit
code says so), or by an error of its own before it ever served. A kill may have come from anywhere, so one that was
killed while it started is tried again.

Invariants: a process is running, waiting or down; incarnations count up by one.
"""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from darts_async.config import RestartConfig, RolesConfig
from darts_async.errors import PERMANENT_EXIT_CODE
from darts_async.topology import RunPlan

RESTARTABLE_ROLES = ("generator", "reward", "shaper")
"""What these had can be given to others, or to themselves again; the shaper goes on from its journal. The death of any
other process ends the run."""


@dataclass(frozen=True, slots=True)
class StartAgain:
    """It comes back after this time."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class LeaveDown:
    """The run goes on without it."""

    reason: str


@dataclass(frozen=True, slots=True)
class EndRun:
    """The run cannot go on."""

    reason: str


Verdict = StartAgain | LeaveDown | EndRun


@dataclass(slots=True)
class _Process:
    role: str
    policy: RestartConfig
    incarnation: int = 1
    has_served: bool = False
    by_hand: bool = False
    """Its next end was asked for."""
    start_at_s: float | None = None
    is_down: bool = False
    deaths_s: deque[float] = field(default_factory=deque)  # those in the window: no more than its intensity and one


class Restarts:
    """The restartable processes of a run. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self, plan: RunPlan, roles: RolesConfig, seed: int) -> None:
        policies = {
            "generator": roles.generator.restart,
            "reward": roles.reward.restart,
            "shaper": roles.shaper.restart,
        }
        self._processes = {
            spec.name: _Process(spec.role, policies[spec.role])
            for spec in plan.processes
            if spec.role in RESTARTABLE_ROLES
        }
        self._random = random.Random(seed)

    def __contains__(self, name: str) -> bool:
        return name in self._processes

    @property
    def policies(self) -> Mapping[str, RestartConfig]:
        """By process."""
        return {name: process.policy for name, process in self._processes.items()}

    def incarnation(self, name: str) -> int:
        """Which start of the process is the present one, or was the last."""
        return self._processes[name].incarnation if name in self._processes else 1

    def has_served(self, name: str) -> bool:
        """Whether any incarnation of it has."""
        return self._processes[name].has_served

    def served(self, name: str) -> None:
        """The process has come as far as doing its work."""
        self._processes[name].has_served = True

    def is_up(self, name: str) -> bool:
        """Whether it counts as running."""
        process = self._processes[name]
        return process.start_at_s is None and not process.is_down

    def ended(self, name: str, code: int, now_s: float) -> Verdict:
        """A process has ended, or could not be started, while the run goes on. `code` is its exit code, or minus the
        number of the signal that ended it."""
        process = self._processes.get(name)
        if process is None:
            return EndRun("the run cannot go on without it")
        if process.by_hand:
            process.by_hand = False
            return self._start_again(process, 0.0, now_s)
        if code == PERMANENT_EXIT_CODE:
            return EndRun("it would end the same way again")
        if code > 0 and not process.has_served:
            return EndRun("it has never come as far as doing its work")
        if process.policy.when == "never" or (process.policy.when == "on_failure" and code == 0):
            return self._give_up(process, f"roles.{process.role}.restart.when is {process.policy.when}")
        return self._count_death(process, now_s)

    def asked(self, name: str, now_s: float) -> bool:
        """Restart a process by hand. Returns whether it has to be stopped first; otherwise it is due at once."""
        process = self._processes[name]
        if self.is_up(name):
            process.by_hand = True
            return True
        process.is_down = False
        process.deaths_s.clear()
        self._start_again(process, 0.0, now_s)
        return False

    def take_due(self, now_s: float) -> list[str]:
        """The processes to start now; they count as running, as their next incarnation."""
        due = [name for name, p in self._processes.items() if p.start_at_s is not None and now_s >= p.start_at_s]
        for name in due:
            self._processes[name].start_at_s = None
            self._processes[name].incarnation += 1
        return due

    def _count_death(self, process: _Process, now_s: float) -> Verdict:
        deaths, intensity = process.deaths_s, process.policy.intensity
        deaths.append(now_s)
        while now_s - deaths[0] >= intensity.window_s:
            deaths.popleft()
        if len(deaths) > intensity.max:
            deaths.popleft()
            return self._give_up(process, f"it has died {intensity.max + 1} times within {intensity.window_s:g} s")
        return self._start_again(process, self._backoff_s(process.policy, len(deaths)), now_s)

    def _backoff_s(self, policy: RestartConfig, num_deaths: int) -> float:
        backoff = policy.backoff
        doublings = min(num_deaths - 1, 64)  # far beyond any maximum, and no float overflows
        grown_s = min(backoff.max_s, backoff.initial_s * 2.0**doublings)
        return grown_s * (1 + backoff.jitter * self._random.uniform(-1, 1))

    def _start_again(self, process: _Process, delay_s: float, now_s: float) -> StartAgain:
        process.start_at_s = now_s + delay_s
        return StartAgain(delay_s)

    def _give_up(self, process: _Process, reason: str) -> Verdict:
        if process.policy.on_exhausted == "fail_run":
            return EndRun(f"{reason}, and roles.{process.role}.restart.on_exhausted is fail_run")
        process.is_down = True
        left = sum(p.role == process.role and not p.is_down for p in self._processes.values())
        if left < process.policy.min_healthy:
            return EndRun(
                f"{reason}, which leaves {left}; roles.{process.role}.restart.min_healthy is "
                f"{process.policy.min_healthy}"
            )
        return LeaveDown(reason)

    def validate(self) -> None:
        """Assert the invariants of the module."""
        for name, process in self._processes.items():
            assert not (process.is_down and process.start_at_s is not None), name
            assert not (process.by_hand and (process.is_down or process.start_at_s is not None)), name
            assert len(process.deaths_s) <= process.policy.intensity.max, name
