"""Injects faults for tests: processes that die, hang or fail at named points, and links that lose or delay messages.

    DARTS_FAULTS="crash generator.before_flush:3, freeze reward.before_reply:2@reward/1, stall generator.step:40"
    DARTS_FAULTS="drop *:0.05, delay generators:0.1:0.3, duplicate rewards:0.1, reorder learner:0.1, cut weights:20:3"

At the n-th passing of a point (`:n`; default 1):

    crash    SIGKILL: no handler runs, and no buffer is flushed
    freeze   SIGSTOP: the process is silent, and its sockets stay open
    stall    the task or thread at the point waits forever, and the rest of the process continues
    fail     the task or thread at the point gets an error, as from a library

Only the first incarnation of a process has faults at points, so that it does not fail forever.

On a link (`*`: every link), for frames that a process receives; in every incarnation:

    drop LINK:p             a share p of the frames is lost
    delay LINK:p:s          a share p is up to s seconds late
    duplicate LINK:p        a share p arrives twice
    reorder LINK:p          a share p arrives after later frames
    cut LINK:after:for      after the first number of seconds no frame arrives for the second number of seconds

`@NAME` selects one process; default: every process. Randomness is seeded by the name of the process. Without the
variable, a point costs one look-up in an empty dictionary, and a link nothing. A fault at a point is first written to
the standard error of the process.
"""

import asyncio
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, cast

from darts_async.errors import ConfigError, DartsError
from darts_async.topology.links import LINKS

VARIABLE = "DARTS_FAULTS"

REACHED = (
    "generator.before_start",  # commands have been taken off the queue, and not given to the engine
    "generator.before_flush",  # tokens are decoded, and not sent
    "generator.before_ready",  # ready to receive weights, and the learner has not been told
    "generator.before_staged",  # weights have arrived, and the learner has not been told
    "generator.before_swap",  # weights are staged and committed, and not in use
    "generator.after_swap",  # weights are in use, and no process has been told
    "generator.before_applied",  # the shaper has been told, and not the learner
    "reward.before_score",  # an item has arrived
    "reward.before_reply",  # it is scored, and the reward is not sent
    "shaper.before_record",  # decided, and not on record: not in the journal, which comes first
    "shaper.before_ledger",  # in the journal, and not in the ledger
    "shaper.before_send",  # on record, and not sent
    "shaper.before_new_journal",  # it is written, and not in its place
    "learner.before_step",  # all groups of a step are in the gradient
    "learner.before_commit",  # the step is done, and no process has been told
    "learner.before_publish",  # the shaper has been told, and no generator
    "learner.before_published",  # the generators have applied a version, and the shaper has not been told
    "learner.before_manifest",  # a checkpoint is written except its manifest
    "learner.before_place",  # it has its manifest, and is not in its place
    "learner.before_saved",  # a checkpoint is on the disk, and no process has been told
    "rank.before_step",  # another rank has all groups of a step
    "rank.before_part",  # another rank is about to write its part of a checkpoint
    "agent.before_order",  # the launcher orders something, and the keeper has not been told
    "agent.before_report",  # the reverse
    "keeper.before_started",  # a process runs, and is not on record
    "keeper.before_left",  # a process has ended, and that is not reported
    "launcher.before_order",  # something is decided, and not ordered
    "launcher.before_event",  # something has happened, and is not on record
)
PASSED = ("generator.step",)  # about to decode one token for every sample
IN_THREAD = (
    "generator.bucket",  # about to wait for a bucket of weights
    "learner.bucket",  # about to send one
)
POINTS = (*REACHED, *PASSED, *IN_THREAD)
LINK_NAMES = tuple(link.name for link in LINKS)

Kind = Literal["crash", "freeze", "stall", "fail"]
LinkKind = Literal["drop", "delay", "duplicate", "reorder", "cut"]

STALLED_THREAD_S = 600.0
"""A thread that stalls ends after this long, because the interpreter waits for its threads."""
_TICK_S = 0.1

_FAULT = re.compile(r"(?P<kind>\w+)\s+(?P<point>[\w.]+)(:(?P<passing>[1-9]\d*))?(@(?P<process>\S+))?")
_LINK_FAULT = re.compile(
    r"(?P<kind>\w+)\s+(?P<link>[\w*]+):(?P<first>[\d.]+)(:(?P<second>[\d.]+))?(@(?P<process>\S+))?"
)
_SIGNALS = {"crash": signal.SIGKILL, "freeze": signal.SIGSTOP}
_POINT_KINDS: dict[str, tuple[str, ...]] = {"crash": POINTS, "freeze": POINTS, "stall": (*PASSED, *IN_THREAD)}
_POINT_KINDS["fail"] = IN_THREAD
_LINK_KINDS = {"drop": False, "delay": True, "duplicate": False, "reorder": False, "cut": True}
"""Whether it takes a second number."""


class InjectedError(DartsError):
    """An error on purpose."""


@dataclass(frozen=True, slots=True)
class LinkFault:
    """A fault of a link. `first` and `second` are the numbers in the module's table."""

    kind: LinkKind
    link: str
    first: float
    second: float = 0.0

    def concerns(self, link: str) -> bool:
        """Whether it concerns this link."""
        return self.link in ("*", link)


class Faults:
    """The faults of one process."""

    def __init__(self, armed: dict[str, dict[int, Kind]] | None = None, links: tuple[LinkFault, ...] = ()) -> None:
        self._armed = armed or {}  # {point: {passing: what happens}}
        self._passings: Counter[str] = Counter()
        self.links = links

    def reach(self, point: str) -> None:
        """The process is at a point. A crash does not return."""
        if point in self._armed and (kind := self._due(point)) is not None:
            os.kill(os.getpid(), _SIGNALS[kind])

    async def pass_by(self, point: str) -> None:
        """As `reach`, in a coroutine, which may wait forever."""
        if point in self._armed and (kind := self._due(point)) is not None:
            if kind == "stall":
                await asyncio.Event().wait()
            os.kill(os.getpid(), _SIGNALS[kind])

    def in_thread(self, point: str) -> None:
        """As `reach`, in another thread than the loop's. Raises `InjectedError`."""
        if point not in self._armed or (kind := self._due(point)) is None:
            return
        if kind == "fail":
            raise InjectedError(f"{point} fails on purpose")
        if kind == "stall":
            deadline_s = time.monotonic() + STALLED_THREAD_S
            while time.monotonic() < deadline_s:
                time.sleep(_TICK_S)
            return
        os.kill(os.getpid(), _SIGNALS[kind])

    def _due(self, point: str) -> Kind | None:
        self._passings[point] += 1
        kind = self._armed[point].get(self._passings[point])
        if kind is not None:  # unbuffered: only this identifies the crash later
            os.write(2, f"{VARIABLE}: {kind} at {point}:{self._passings[point]}\n".encode())
        return kind


_present = Faults()


def install(process: str, incarnation: int) -> Faults:
    """Install the faults of this operating-system process from the environment. Raises `ConfigError`."""
    global _present
    armed, links = parse_faults(os.environ.get(VARIABLE, ""), process)
    _present = Faults(armed if incarnation == 1 else None, links)
    return _present


def present() -> Faults:
    """The faults of this operating-system process."""
    return _present


def parse_faults(text: str, process: str) -> tuple[dict[str, dict[int, Kind]], tuple[LinkFault, ...]]:
    """The faults of a process, {point: {passing: kind}}, and those of links. Raises `ConfigError`."""
    armed: dict[str, dict[int, Kind]] = {}
    links: list[LinkFault] = []
    for item in filter(None, map(str.strip, text.split(","))):
        kind = item.split()[0]
        match = (_LINK_FAULT if kind in _LINK_KINDS else _FAULT).fullmatch(item)
        if match is None or kind not in {**_LINK_KINDS, **_POINT_KINDS}:
            raise ConfigError(
                f"{VARIABLE}: {item!r} is not `crash|freeze|stall|fail POINT[:n][@PROCESS]`, "
                "`drop|duplicate|reorder LINK:share[@PROCESS]`, `delay LINK:share:seconds` or `cut LINK:after:for`"
            )
        is_meant = match["process"] in (None, process)
        if kind in _LINK_KINDS:
            fault = _link_fault(item, match)
            links += [fault] if is_meant else []
            continue
        _check_point(kind, match["point"])
        if is_meant:
            armed.setdefault(match["point"], {})[int(match["passing"] or 1)] = cast(Kind, kind)
    return armed, tuple(links)


def _check_point(kind: str, point: str) -> None:
    if point not in POINTS:
        raise ConfigError(f"{VARIABLE}: there is no point {point!r}; there are {', '.join(POINTS)}")
    if point not in _POINT_KINDS[kind]:
        raise ConfigError(f"{VARIABLE}: {point} cannot have a {kind}; choose from {', '.join(_POINT_KINDS[kind])}")


def _link_fault(item: str, match: re.Match[str]) -> LinkFault:
    kind, link = match["kind"], match["link"]
    if link not in ("*", *LINK_NAMES):
        raise ConfigError(
            f"{VARIABLE}: {item!r}: there is no link {link!r}; there are {', '.join(LINK_NAMES)}, and * for all"
        )
    if (match["second"] is not None) != _LINK_KINDS[kind]:
        wanted = "two numbers" if _LINK_KINDS[kind] else "one number"
        raise ConfigError(f"{VARIABLE}: {item!r}: {kind} takes {wanted}")
    try:
        first, second = float(match["first"]), float(match["second"] or 0.0)
    except ValueError:
        raise ConfigError(f"{VARIABLE}: {item!r}: not a number") from None
    if kind != "cut" and not 0 <= first < 1:
        raise ConfigError(f"{VARIABLE}: {item!r}: the share {first:g} is not in [0, 1)")
    return LinkFault(cast(LinkKind, kind), link, first, second)
