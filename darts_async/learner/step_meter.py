"""Measures a step: memory, and the learner's idle time."""

import resource
import sys

import torch

from darts_async.telemetry import BusyClock


class StepMeter:
    def __init__(self, clock: BusyClock) -> None:
        self._clock = clock
        self._uptime_s, self._idle_s = clock.uptime_s, clock.busy_s()["idle"]

    def metrics(self) -> dict[str, float]:
        """The share of time since the last call in which no stage ran, and the peak of memory: on a GPU that of its
        allocator since the last call, else that of the process since its start."""
        uptime_s, idle_s = self._clock.uptime_s, self._clock.busy_s()["idle"]
        idle_share = (idle_s - self._idle_s) / max(uptime_s - self._uptime_s, 1e-9)
        self._uptime_s, self._idle_s = uptime_s, idle_s
        return {"idle_share": min(1.0, max(0.0, idle_share)), "memory_peak_bytes": _memory_peak_bytes()}


def _memory_peak_bytes() -> float:
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return peak
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak_kib) * (1 if sys.platform == "darwin" else 1024)
