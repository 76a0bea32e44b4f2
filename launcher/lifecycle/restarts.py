"""Whether and when a process that has ended is restarted: pure decisions, one policy per unit.

A *unit* is what restarts together: one generator, one reward process, or all ranks of the learner. When one process of
a unit has ended, the others are ended too. Their ends do not count as deaths.

    running --one ends--> ending --all have ended--> waiting --back-off over, or by hand--> running, next incarnation
       `------one ends, and is not restarted-----------> down --by hand--> running

The n-th death within the window of the policy waits

    min(max_s, initial_s * 2^(n - 1)) * (1 + jitter * u),    u uniform in [-1, 1) and seeded,

from the first end on. With more than `intensity.max` deaths in the window the unit is exhausted. A restart by hand does
not count as a death.

A process that ended because of a full disk (by its exit code) has not died. Its unit waits for space, however often,
and restarts after the first back-off once there is some.

A unit is not restarted where that cannot help: if the exit code says that the input of the run is wrong, or if a
process failed before it ever served. A process that was killed while it started is restarted.

Invariants: a unit is running, ending or waiting, or down; it is started when none of its processes runs; incarnations
count up by one.
"""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from darts_async.config import RestartConfig, RolesConfig
from darts_async.errors import NO_SPACE_EXIT_CODE, PERMANENT_EXIT_CODE
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import ROLES, Role
from darts_async.wire.backoff import backoff_s


@dataclass(frozen=True, slots=True)
class StartAgain:
    """It restarts after this time, together with the rest of its unit, which must be ended."""

    delay_s: float
    to_end: tuple[str, ...] = ()
    needs_room: bool = False
    """It waits for space on the disk instead."""


@dataclass(frozen=True, slots=True)
class LeaveDown:
    """The run continues without it."""

    reason: str


@dataclass(frozen=True, slots=True)
class EndRun:
    """The run cannot continue."""

    reason: str


Verdict = StartAgain | LeaveDown | EndRun


@dataclass(slots=True)
class _Unit:
    role: Role
    names: tuple[str, ...]
    policy: RestartConfig
    alive: set[str]
    incarnation: int
    first_incarnation: int
    has_served: bool = False
    by_hand: bool = False
    """A user asked for its next end."""
    start_at_s: float | None = None
    needs_room: bool = False
    is_down: bool = False
    deaths_s: deque[float] = field(default_factory=deque)  # those in the window: no more than its intensity and one


class Restarts:
    """The restartable processes of a run. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(
        self, plan: RunPlan, roles: RolesConfig, seed: int, first_incarnations: Mapping[str, int] | None = None
    ) -> None:
        """`first_incarnations`: where a process does not begin with 1; equal within a unit."""
        first = first_incarnations or {}
        self._units = [
            _Unit(role, names, roles.of(role).restart, set(names), first.get(names[0], 1), first.get(names[0], 1))
            for role in ROLES
            for names in ([plan.names(role.name)] if role.has_ranks else [(name,) for name in plan.names(role.name)])
        ]
        self._unit_of = {name: unit for unit in self._units for name in unit.names}
        self._random = random.Random(seed)

    @property
    def policies(self) -> Mapping[str, RestartConfig]:
        return {name: unit.policy for name, unit in self._unit_of.items()}

    def incarnation(self, name: str) -> int:
        return self._unit_of[name].incarnation

    def is_first(self, name: str) -> bool:
        unit = self._unit_of[name]
        return unit.incarnation == unit.first_incarnation

    def is_unwanted(self, name: str) -> bool:
        """Whether a running process must be ended, because another one of its unit has ended."""
        return self._unit_of[name].start_at_s is not None

    def served(self, name: str) -> None:
        """The process does its work."""
        self._unit_of[name].has_served = True

    def is_up(self, name: str) -> bool:
        """Whether it counts as running."""
        unit = self._unit_of[name]
        return unit.start_at_s is None and not unit.is_down

    def ended(self, name: str, code: int, now_s: float) -> Verdict:
        """A process has ended, or could not be started. `code`: its exit code, or minus the signal that ended it."""
        unit = self._unit_of[name]
        unit.alive.discard(name)
        if unit.by_hand:
            unit.by_hand = False
            return self._start_again(unit, 0.0, now_s)
        if code == PERMANENT_EXIT_CODE:
            return EndRun("a restart would end in the same way")
        if code == NO_SPACE_EXIT_CODE:
            unit.needs_room = True
            to_end = self._start_again(unit, unit.policy.backoff.initial_s, now_s).to_end
            return StartAgain(0.0, to_end, needs_room=True)
        if unit.start_at_s is not None:  # it follows another of its unit
            return StartAgain(max(0.0, unit.start_at_s - now_s))
        if code > 0 and not unit.has_served:
            return EndRun("it failed before it ever served")
        if unit.policy.when == "never" or (unit.policy.when == "on_failure" and code == 0):
            return self._give_up(unit, f"roles.{unit.role}.restart.when is {unit.policy.when}")
        return self._count_death(unit, now_s)

    def asked(self, name: str, now_s: float) -> bool:
        """A user restarts a process and its unit. Returns whether it must be stopped first; otherwise it is due now."""
        unit = self._unit_of[name]
        if self.is_up(name):
            is_first, unit.by_hand = not unit.by_hand, True
            return is_first or len(unit.names) == 1
        unit.is_down = False
        unit.deaths_s.clear()
        self._start_again(unit, 0.0, now_s)
        return False

    @property
    def needs_room(self) -> bool:
        return any(unit.needs_room for unit in self._units)

    def take_due(self, now_s: float, *, has_room: bool = True) -> list[str]:
        """The processes to start now. From now on they count as running, with their next incarnation."""
        waiting = [u for u in self._units if u.start_at_s is not None and now_s >= u.start_at_s and not u.alive]
        due = [unit for unit in waiting if has_room or not unit.needs_room]
        for unit in due:
            unit.start_at_s, unit.needs_room = None, False
            unit.incarnation += 1
            unit.alive = set(unit.names)
        return [name for unit in due for name in unit.names]

    def _count_death(self, unit: _Unit, now_s: float) -> Verdict:
        deaths, intensity = unit.deaths_s, unit.policy.intensity
        deaths.append(now_s)
        while now_s - deaths[0] >= intensity.window_s:
            deaths.popleft()
        if len(deaths) > intensity.max:
            deaths.popleft()
            return self._give_up(unit, f"it has died {intensity.max + 1} times within {intensity.window_s:g} s")
        return self._start_again(unit, self._backoff_s(unit.policy, len(deaths)), now_s)

    def _backoff_s(self, policy: RestartConfig, num_deaths: int) -> float:
        jitter = 1 + policy.backoff.jitter * self._random.uniform(-1, 1)
        return jitter * backoff_s(num_deaths, policy.backoff.initial_s, policy.backoff.max_s)

    def _start_again(self, unit: _Unit, delay_s: float, now_s: float) -> StartAgain:
        unit.start_at_s = now_s + delay_s
        return StartAgain(delay_s, tuple(sorted(unit.alive)))

    def _give_up(self, unit: _Unit, reason: str) -> Verdict:
        if unit.role.has_ranks:
            return EndRun(f"{reason}, and training needs it")
        if unit.policy.on_exhausted == "fail_run":
            return EndRun(f"{reason}, and roles.{unit.role}.restart.on_exhausted is fail_run")
        unit.is_down = True
        left = sum(u.role == unit.role and not u.is_down for u in self._units)
        if left < unit.policy.min_healthy:
            return EndRun(
                f"{reason}, which leaves {left}; roles.{unit.role}.restart.min_healthy is {unit.policy.min_healthy}"
            )
        return LeaveDown(reason)

    def validate(self) -> None:
        for unit in self._units:
            assert not (unit.is_down and unit.start_at_s is not None), unit.names
            assert not (unit.by_hand and (unit.is_down or unit.start_at_s is not None)), unit.names
            assert not (unit.is_down and unit.alive), unit.names
            assert not unit.needs_room or unit.start_at_s is not None, unit.names
            assert unit.alive == set(unit.names) or unit.is_down or unit.start_at_s is not None, unit.names
            assert len(unit.deaths_s) <= unit.policy.intensity.max, unit.names
