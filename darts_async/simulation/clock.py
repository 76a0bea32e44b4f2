"""Virtual time: a heap of wake-ups, the messages to the shaper that are due now, and how each actor spends its time."""

import heapq
from collections import deque
from typing import Protocol

from darts_async.shaper.state import Incoming


class Actor(Protocol):
    """A process that can be woken."""

    def wake(self, stamp: int) -> None:
        """The time that was asked for has come; `stamp` is what was given when asking."""


class Meter:
    """The time that an actor spends in each state: intervals that touch and never overlap, so they sum to the run."""

    def __init__(self) -> None:
        self._state = "idle"
        self._since_s = 0.0
        self._spent_s: dict[str, float] = {}

    def switch(self, state: str, now_s: float) -> None:
        """From now on the actor is in this state."""
        if state != self._state:
            self._spent_s = self.closed(now_s)
            self._state, self._since_s = state, now_s

    def closed(self, now_s: float) -> dict[str, float]:
        """Seconds by state up to now."""
        spent_s = self._spent_s.get(self._state, 0.0) + now_s - self._since_s
        return self._spent_s | {self._state: spent_s}


class Clock:
    """The present, the wake-ups to come, and the outbox of all actors."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.outbox: deque[tuple[str, Incoming]] = deque()
        """Messages for the shaper that were sent at this moment, with their sender."""
        self._wakes: list[tuple[float, int, Actor, int]] = []
        self._num_wakes = 0

    def wake_at(self, at_s: float, actor: Actor, stamp: int) -> None:
        """Ask for `actor.wake(stamp)`. Ties are served in the order of asking."""
        self._num_wakes += 1
        heapq.heappush(self._wakes, (max(at_s, self.now_s), self._num_wakes, actor, stamp))

    @property
    def num_waiting(self) -> int:
        """Wake-ups that were asked for and have not come."""
        return len(self._wakes)

    def advance(self) -> Actor:
        """Jump to the next wake-up and serve it; returns who was woken."""
        assert self._wakes, f"deadlock at {self.now_s} s: no process waits for a time"
        self.now_s, _, actor, stamp = heapq.heappop(self._wakes)
        actor.wake(stamp)
        return actor

    def send(self, sender: str, message: Incoming) -> None:
        """A message for the shaper."""
        self.outbox.append((sender, message))
