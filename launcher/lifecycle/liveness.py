"""Finds processes that are silent, and those that have work and make no progress. Pure.

A process must first report within its start timeout. From then on it is silent when it sends no status, although its
event loop should send one at a fixed interval. A generator stalls when its statuses show samples in flight and no new
token. Time in which the watcher itself did not look is not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from darts_async.config import RestartConfig
from darts_async.protocol import ProcessStatus
from darts_async.topology.roles import role_of

WATCHER_ABSENT_AFTER_S = 2.0
"""A longer time between two looks means that the watcher itself was away."""


@dataclass(slots=True)
class _Pulse:
    heard_at_s: float
    moved_at_s: float
    num_tokens: int


class Liveness:
    """Watches processes. Times are of one monotonic clock, given by the caller."""

    def __init__(self, policies: Mapping[str, RestartConfig], start_timeouts_s: Mapping[str, float]) -> None:
        self._policies = policies
        self._start_timeouts_s = start_timeouts_s
        self._unheard_since_s: dict[str, float] = {}
        self._pulses: dict[str, _Pulse] = {}
        self._looked_at_s: float | None = None

    @property
    def unheard(self) -> frozenset[str]:
        """Processes that have not reported yet, and should."""
        return frozenset(self._unheard_since_s)

    def expect(self, name: str, since_s: float) -> None:
        """From this time on the start timeout of the process runs."""
        self._unheard_since_s[name] = since_s

    def heard(self, name: str, status: ProcessStatus, now_s: float) -> None:
        self._unheard_since_s.pop(name, None)
        pulse = self._pulses.get(name)
        if pulse is None or status.num_in_flight == 0 or status.num_tokens != pulse.num_tokens:
            self._pulses[name] = _Pulse(now_s, now_s, status.num_tokens)
        else:
            pulse.heard_at_s = now_s

    def forget(self, name: str) -> None:
        """The process has ended, or is about to."""
        self._unheard_since_s.pop(name, None)
        self._pulses.pop(name, None)

    def late(self, now_s: float) -> list[tuple[str, str]]:
        """Processes whose start timeout is over, each with the diagnosis."""
        timeouts_s = {name: self._start_timeouts_s[name] for name in sorted(self._unheard_since_s)}
        return [
            (name, f"did not report within {timeout_s:g} s (roles.{role_of(name)}.start_timeout_s)")
            for name, timeout_s in timeouts_s.items()
            if now_s - self._unheard_since_s[name] >= timeout_s
        ]

    def hanging(self, now_s: float) -> list[tuple[str, str]]:
        """Processes that hang, each with the diagnosis."""
        self._forgive_own_absence(now_s)
        return [(name, reason) for name in sorted(self._pulses) if (reason := self._diagnosis(name, now_s))]

    def _diagnosis(self, name: str, now_s: float) -> str | None:
        policy, pulse, role = self._policies[name], self._pulses[name], role_of(name)
        silent_s, still_s = now_s - pulse.heard_at_s, now_s - pulse.moved_at_s
        if silent_s >= policy.silent_after_s:
            return f"it has not reported for {silent_s:.1f} s (roles.{role}.restart.silent_after_s)"
        if role.decodes and still_s >= policy.stalled_after_s:
            return f"it holds samples and decodes nothing for {still_s:.1f} s (roles.{role}.restart.stalled_after_s)"
        return None

    def _forgive_own_absence(self, now_s: float) -> None:
        looked_at_s, self._looked_at_s = self._looked_at_s, now_s
        absent_s = now_s - looked_at_s if looked_at_s is not None else 0.0
        if absent_s > WATCHER_ABSENT_AFTER_S:
            for pulse in self._pulses.values():
                pulse.heard_at_s = min(now_s, pulse.heard_at_s + absent_s)
                pulse.moved_at_s = min(now_s, pulse.moved_at_s + absent_s)
