"""Virtual time, the network, and the live processes: the world of all simulated processes."""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import NamedTuple, Protocol

from darts_async.config import RunConfig
from darts_async.simulation.chaos.plan import ChaosPlan
from darts_async.transport.codec import Payload
from darts_async.transport.session import Envelope


class Crash(Exception):
    """A process dies at the point that it has reached."""


class Frame(NamedTuple):
    """What goes over the network."""

    link: str
    sender: str
    receiver: str
    envelope: Envelope
    payload: Payload


class Living(Protocol):
    """A process, as far as the world deals with it."""

    def arrive(self, frame: Frame) -> None:
        """Take a frame of the network."""

    def kill(self) -> None:
        """Die now."""


class World:
    """Events in the order of their time; ties in the order in which they were asked for."""

    def __init__(self, plan: ChaosPlan, config: RunConfig) -> None:
        self.plan = plan
        self.config = config
        self.rng = Random(plan.seed)
        self.now_s = 0.0
        self.living: dict[str, Living] = {}
        self.counts: Counter[str] = Counter()
        """How often each kind of fault has happened."""
        self.liars: set[tuple[str, int]] = set()
        """The processes that have sent invalid messages, by name and incarnation."""
        self.full_until_s = 0.0
        """No file grows before."""
        self.is_to_be_resumed = False
        """A refusal has said that the run is to be taken down and resumed."""
        self.moment_came: Callable[[str], None] = lambda moment: None
        """Hears of the last moments of a run: see `Hardship`."""
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = itertools.count()
        self._cut_until_s: dict[frozenset[str], float] = {}

    @property
    def calm(self) -> bool:
        """Whether no more faults come."""
        return self.now_s >= self.plan.calm_after_s

    @property
    def is_full(self) -> bool:
        """Whether the disk is full."""
        return self.now_s < self.full_until_s

    def chance(self, probability: float) -> bool:
        """Whether a fault of this probability happens now."""
        return not self.calm and self.rng.random() < probability

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """Have something called at a time."""
        heapq.heappush(self._heap, (max(when_s, self.now_s), next(self._ties), call))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have something called after a while."""
        self.at(self.now_s + delay_s, call)

    def advance(self) -> None:
        """Advance to the next event."""
        self.now_s, _, call = heapq.heappop(self._heap)
        call()

    def cut(self, one: str, other: str, for_s: float) -> None:
        """Nothing passes between two processes for a while."""
        self.counts["links cut"] += 1
        pair = frozenset((one, other))
        self._cut_until_s[pair] = max(self.now_s + for_s, self._cut_until_s.get(pair, 0.0))

    def transmit(self, frame: Frame) -> None:
        """Take a frame: it arrives never, once or twice, and others may overtake it."""
        plan = self.plan
        if self._cut_until_s.get(frozenset((frame.sender, frame.receiver)), 0.0) > self.now_s or self.chance(plan.loss):
            self.counts["frames lost"] += 1
            return
        is_repeated = self.chance(plan.duplication)
        if is_repeated:
            self.counts["frames repeated"] += 1
        for _ in range(1 + is_repeated):
            delay_s = plan.latency_s * (0.5 + self.rng.random())
            if self.chance(plan.lateness):
                self.counts["frames late"] += 1
                delay_s += self.rng.uniform(0.0, plan.late_by_s)
            self.after(delay_s, lambda: self._arrive(frame))

    def _arrive(self, frame: Frame) -> None:
        process = self.living.get(frame.receiver)
        if process is not None:
            process.arrive(frame)
