"""Counts and logs refusals, with a rate limit, so that a hostile or broken peer cannot fill the log."""

from typing import Any

import structlog

LOG_INTERVAL_S = 1.0
"""At most one line per interval; the next line has the number of omitted ones."""

_log = structlog.get_logger()


class Refusals:
    """A counter with a rate-limited log.

    Args:
        event: name of the log event.
    """

    def __init__(self, event: str) -> None:
        self.total = 0
        self._event = event
        self._logged_total = 0
        self._logged_s = float("-inf")

    def add(self, now_s: float, **context: Any) -> None:
        """Count one refusal, and log it unless one was just logged."""
        self.total += 1
        if now_s - self._logged_s < LOG_INTERVAL_S:
            return
        _log.error(self._event, left_out=self.total - self._logged_total - 1, **context)
        self._logged_total = self.total
        self._logged_s = now_s
