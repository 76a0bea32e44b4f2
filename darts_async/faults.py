"""Faults on purpose: a process kills, freezes or stalls itself at a named point, at the n-th passing.

    DARTS_FAULTS="crash generator.before_flush:3, freeze reward.before_verdict:2@reward/1, stall generator.step:40"

    crash    SIGKILL: no handler runs, nothing is flushed
    freeze   SIGSTOP: the process says nothing more, and its sockets stay open
    stall    the coroutine that passes waits for ever, the rest of the process goes on; at `pass_by` points only

`:n` counts passings of the process from 1, and is 1 where it is left out. `@NAME` means one process, else each that
passes the point. Only the first incarnation of a process is faulty, or it would fail for ever. Where the variable is
not set a point costs one look into an empty dictionary.
"""

import asyncio
import os
import re
import signal
from typing import Literal, cast

from darts_async.errors import ConfigError

VARIABLE = "DARTS_FAULTS"

POINTS = (
    "generator.before_start",  # commands have been taken off the queue, and not given to the engine
    "generator.step",  # about to decode one token for every sample
    "generator.before_flush",  # tokens are decoded, and not sent
    "generator.before_swap",  # weights are staged and committed, and not in use
    "generator.after_swap",  # and are in use, and nobody has been told
    "reward.before_score",  # an item has arrived
    "reward.before_verdict",  # it is judged, and the verdict is not sent
    "shaper.before_record",  # decided, and not on record: not in the journal, which comes first
    "shaper.before_ledger",  # in the journal, and not in the ledger
    "shaper.before_send",  # on record, and not sent
    "shaper.before_new_journal",  # it is written, and not in its place
    "learner.before_step",  # all groups of a step are in the gradient
    "learner.before_commit",  # the step is taken, and nobody has been told
    "learner.before_publish",  # the shaper has been told, and no generator
    "learner.before_saved",  # a checkpoint is on the disk, and nobody has been told
)

Kind = Literal["crash", "freeze", "stall"]

_FAULT = re.compile(r"(?P<kind>\w+)\s+(?P<point>[\w.]+)(:(?P<passing>[1-9]\d*))?(@(?P<process>\S+))?")
_SIGNALS = {"crash": signal.SIGKILL, "freeze": signal.SIGSTOP}


class Faults:
    """The faults of one process."""

    def __init__(self, armed: dict[str, tuple[Kind, int]] | None = None) -> None:
        self._armed = armed or {}  # point -> what happens, and after how many more passings

    @classmethod
    def from_environment(cls, process: str, incarnation: int) -> "Faults":
        """What the environment asks of this process. Raises `ConfigError` for what cannot be meant."""
        return cls(parse_faults(os.environ.get(VARIABLE, ""), process) if incarnation == 1 else None)

    def reach(self, point: str) -> None:
        """The process is at a point. A crash does not return."""
        if point in self._armed and (kind := self._due(point)) is not None:
            assert kind in _SIGNALS, f"{point} is no place for a {kind}"
            os.kill(os.getpid(), _SIGNALS[kind])

    async def pass_by(self, point: str) -> None:
        """As `reach`, in a coroutine that may be made to wait for ever."""
        if point in self._armed and (kind := self._due(point)) is not None:
            if kind == "stall":
                await asyncio.Event().wait()
            os.kill(os.getpid(), _SIGNALS[kind])

    def _due(self, point: str) -> Kind | None:
        kind, left = self._armed.pop(point)
        if left == 1:
            return kind
        self._armed[point] = kind, left - 1
        return None


def parse_faults(text: str, process: str) -> dict[str, tuple[Kind, int]]:
    """The faults that are meant for a process: {point: (kind, passing)}. Raises `ConfigError`."""
    armed: dict[str, tuple[Kind, int]] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        match = _FAULT.fullmatch(item)
        if match is None or match["kind"] not in ("crash", "freeze", "stall"):
            raise ConfigError(f"{VARIABLE}: {item!r} is not `crash|freeze|stall POINT[:n][@PROCESS]`")
        if match["point"] not in POINTS:
            raise ConfigError(f"{VARIABLE}: there is no point {match['point']!r}; there are {', '.join(POINTS)}")
        if match["process"] in (None, process):
            armed[match["point"]] = cast(Kind, match["kind"]), int(match["passing"] or 1)
    return armed
