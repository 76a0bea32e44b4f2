"""Measures how one actor spends its time."""


class Meter:
    """Integrates the time spent in each state: intervals that touch and never overlap, so they sum to the run."""

    def __init__(self, state: str = "idle") -> None:
        self._state = state
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
