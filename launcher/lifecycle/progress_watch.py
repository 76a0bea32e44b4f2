"""Watches whether a run makes steps, and whether a full disk keeps it from them. Pure.

A run without a step or an evaluation has failed after a time limit. While the disk is full no step is expected, up to a
time limit of its own.
"""

STALLED_AFTER_S = 60.0
"""A run without a step for this long is worth a warning."""


class ProgressWatch:
    """Times are seconds of one monotonic clock, given by the caller. A run starts at `now_s`."""

    def __init__(self, *, no_progress_s: float, no_space_s: float, now_s: float) -> None:
        self._no_progress_s = no_progress_s
        self._no_space_s = no_space_s
        self._progress_at_s = now_s
        self._has_warned = False
        self._without_space: set[str] = set()  # processes that are alive and wait for space on the disk
        self._no_space_since_s: float | None = None  # the first wait for space since the last step

    @property
    def is_hindered(self) -> bool:
        """Whether a living process waits for space on the disk."""
        return bool(self._without_space)

    def progressed(self, now_s: float) -> None:
        """A step or an evaluation was completed."""
        self._progress_at_s, self._has_warned, self._no_space_since_s = now_s, False, None

    def reported(self, name: str, hindrance: str) -> str:
        """A process is hindered by a full disk, or is not. Returns what is new to the user."""
        if bool(hindrance) == (name in self._without_space):
            return ""
        if hindrance:
            self._without_space.add(name)
            return f"{hindrance}: {name} waits for space"
        self._without_space.discard(name)
        return f"{name} has space on the disk again"

    def ended(self, name: str) -> None:
        self._without_space.discard(name)

    def failure(self, now_s: float, *, needs_space: bool) -> str:
        """Why the run has failed, if it has. `needs_space`: a process that has ended waits for space too."""
        if needs_space or self._without_space:
            since_s = self._no_space_since_s = now_s if self._no_space_since_s is None else self._no_space_since_s
            self._progress_at_s = now_s
            if now_s - since_s >= self._no_space_s:
                return f"there was no space on the disk for {now_s - since_s:.0f} s (telemetry.no_space_timeout_s)"
        idle_s = now_s - self._progress_at_s
        return f"no step for {idle_s:.0f} s (telemetry.no_progress_timeout_s)" if idle_s >= self._no_progress_s else ""

    def warning(self, now_s: float) -> str:
        """A warning that there has been no step for long, once."""
        idle_s = now_s - self._progress_at_s
        if self._has_warned or idle_s < STALLED_AFTER_S:
            return ""
        self._has_warned = True
        return f"no step for {idle_s:.0f} s; logs/ in the run directory shows what the processes do"
