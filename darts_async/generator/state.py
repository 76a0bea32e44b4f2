"""All decisions of a generator, without engine, socket, clock or task.

    greeting -> cancel all samples, and decode until they have ended -> ready -> between two steps: swap weights,
    start and cancel samples, decode or wait

Between two steps the owner of the engine asks for the `next_move`, sends the outbox, and makes the move. Only then are
commands given to the engine, in order, and weights put in use. Tokens of the old version are sent before a swap, so a
message never mixes versions, and the shaper hears of the new version before its first token.

While the shaper is away nothing is decoded, because it drops all samples when it greets again. Weights still arrive.
"""

from collections import deque
from dataclasses import dataclass
from typing import cast

from darts_async.generator.boundary import refusal_of_learner, refusal_of_shaper
from darts_async.generator.engine import Outbox, StepEvents
from darts_async.generator.probe import Probing
from darts_async.generator.stop_strings import StopStrings
from darts_async.generator.token_batcher import Outgoing
from darts_async.protocol import (
    Cancel,
    Generate,
    GeneratorReady,
    Greet,
    LearnerToGenerator,
    ProbeWeights,
    ShaperToGenerator,
    WeightsApplied,
)
from darts_async.topology.links import GENERATORS_LINK, WEIGHTS_LINK
from darts_async.transport import Event, PeerDown, PeerUp, Received


@dataclass(frozen=True, slots=True)
class Obey:
    """Give the engine these commands of the shaper, in order."""

    commands: tuple[Generate | Cancel, ...]


@dataclass(frozen=True, slots=True)
class Arrange:
    """Cancel and start samples for a reason of the generator's own."""

    cancelled: tuple[int, ...] = ()
    started: tuple[Generate, ...] = ()


class Swap:
    """Stop until new weights are in use; answered by `resumed`."""


class Decode:
    """Make a step; answered by `decoded`."""


class Wait:
    """There is nothing to do until an event or a swap comes."""


Move = Obey | Arrange | Swap | Decode | Wait


class GeneratorState:
    """Tokens of `flush_every_steps` are sent together. `stopping` ends responses at stop strings, if there are any."""

    def __init__(self, *, flush_every_steps: int, stopping: StopStrings | None = None) -> None:
        self._stopping = stopping
        self._capacity: tuple[int, int] | None = None  # slots and context of the engine, once there is one
        self._outgoing = Outgoing(flush_every_steps)
        self._probing = Probing()
        self.shaper: str | None = None  # until it greets: earlier messages were for the process before this one
        self.learner: str | None = None  # the same
        self.is_shaper_away = False
        self.version = -1  # in use; -1 before the first
        self._commands: deque[Generate | Cancel] = deque()  # bounded by the link's credit and the shaper's seats
        self._greeting: Greet | None = None  # not begun yet
        self._answering: Greet | None = None  # answered when all samples have ended
        self._live: set[int] = set()  # the shaper's samples that the engine has
        self._asked: set[int] = set()  # those asked for since it greeted that have not ended
        self._is_swap_due = False
        self._is_swapping = False

    # --- events ----------------------------------------------------------------------------------------------

    def refusal(self, event: Received) -> str | None:
        """Why a message is invalid; None if it is not."""
        if event.link == GENERATORS_LINK.name:
            return refusal_of_shaper(cast(ShaperToGenerator, event.message), self._asked)
        return refusal_of_learner(cast(LearnerToGenerator, event.message))

    def handle(self, event: Event) -> None:
        """Take in an event. `Member` has those about updates of the weights."""
        match event:
            case Received(link=GENERATORS_LINK.name, peer=peer, message=Greet() as greeting):
                self.shaper, self._greeting, self.is_shaper_away = peer, greeting, False
                self._commands.clear()
                self._asked.clear()
            case PeerUp(link=GENERATORS_LINK.name):  # it does not greet if it did not notice that it was away
                self.is_shaper_away = False
            case PeerDown(link=GENERATORS_LINK.name):
                self.is_shaper_away = True
            case Received(link=GENERATORS_LINK.name, message=Generate() | Cancel() as command) if (
                self.shaper is not None
            ):
                self._commands.append(command)
                if isinstance(command, Generate):
                    self._asked.add(command.sample_id)
            case Received(link=WEIGHTS_LINK.name, peer=peer, message=Greet()):
                self.learner = peer
            case Received(link=WEIGHTS_LINK.name, message=ProbeWeights() as probe) if self.learner is not None:
                self._probing.ask(probe)

    def loaded(self, *, num_slots: int, max_context_tokens: int) -> None:
        """There is an engine now. From now on `next_move` is asked for."""
        self._capacity = num_slots, max_context_tokens

    @property
    def may_join(self) -> bool:
        """Whether there is an engine to take weights, and a learner that has greeted."""
        return self._capacity is not None and self.learner is not None

    def ask_to_swap(self) -> None:
        """Weights are to be put in use at the next boundary."""
        assert not self._is_swap_due, "one update at a time"
        assert not self._is_swapping, "one update at a time"
        self._is_swap_due = True

    # --- moves and their results -----------------------------------------------------------------------------

    def next_move(self, num_unfinished: int, out: Outbox) -> Move:
        """What to do after `out` is sent. The engine has `num_unfinished` samples."""
        if self._stopping is not None and (stopped := self._stopping.take_stopped()):
            return Arrange(cancelled=tuple(stopped))
        if self._answering is not None:
            if num_unfinished:
                return Decode()
            self._answer(self._answering, out)
        if self._greeting is not None:
            self._answering, self._greeting = self._greeting, None
            return Arrange(cancelled=tuple(sorted(self._live)))
        if self._is_swap_due:
            self._is_swap_due, self._is_swapping = False, True
            self._flush(out)
            return Swap()
        if self._commands:
            return self._obey(out)
        if requests := self._probing.begin(self.version, out):
            return Arrange(started=tuple(requests))
        if num_unfinished == 0 or self.is_shaper_away:
            self._flush(out)
            return Wait()
        return Decode()

    def decoded(self, events: StepEvents, out: Outbox) -> None:
        """A step brought these events, or they were decoded before a swap that has begun."""
        events = self._probing.sift(events, self.version, out)
        if self._stopping is not None:
            events = self._stopping.sift(events)
        self._outgoing.add(events)
        gone = [end.sample_id for end in events.ended] + [sample_id for sample_id, _ in events.rejected]
        self._live.difference_update(gone)
        self._asked.difference_update(gone)
        if self._outgoing.is_due or self._is_swapping:
            self._flush(out)

    def resumed(self, version: int | None, stall_s: float, out: Outbox) -> None:
        """The swap is over, after `stall_s`. `version` is in use now; None: the same as before."""
        self._is_swapping = False
        if version is not None:
            self.version = version
            if self.shaper is not None:
                out.append(WeightsApplied(version, stall_s))

    @property
    def num_live(self) -> int:
        """Samples of the shaper that the engine has."""
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        """Commands that the engine has not been given."""
        return len(self._commands)

    @property
    def num_tokens_untold(self) -> int:
        """Tokens that the shaper is not told of: those of probes, and those after a stop string."""
        return self._probing.num_tokens + (0 if self._stopping is None else self._stopping.num_tokens_dropped)

    def validate(self) -> None:
        """Assert that between two events exactly the samples that were asked for wait or run."""
        waiting = [command.sample_id for command in self._commands if isinstance(command, Generate)]
        assert len(set(waiting)) == len(waiting)
        assert not (self._is_swapping and self._is_swap_due)
        assert self.shaper is not None or not (self._commands or self._greeting)
        if self._greeting is None and self._answering is None:
            assert self._live.isdisjoint(waiting)
            assert self._asked == self._live.union(waiting)

    # --- inside ----------------------------------------------------------------------------------------------

    def _answer(self, greeting: Greet, out: Outbox) -> None:
        """All samples have ended, because the shaper has given them to others: say what this generator is."""
        self._flush(out)  # these tokens have no use, but they were decoded and must be counted
        assert not self._live, "every sample that was started has ended"
        assert self._capacity is not None, "the owner of an engine asks for moves"
        self._answering = None
        self._asked = {command.sample_id for command in self._commands if isinstance(command, Generate)}
        out.append(GeneratorReady(greeting.number, *self._capacity))
        if self.version >= 0:
            out.append(WeightsApplied(self.version, 0.0))

    def _obey(self, out: Outbox) -> Obey:
        commands: list[Generate | Cancel] = []
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Generate):
                end = None if self._stopping is None else self._stopping.start(command)
                if end is not None:  # its generator died before it could report the stop string
                    self.decoded(StepEvents(ended=(end,)), out)
                    continue
                self._live.add(command.sample_id)
            commands.append(command)
        return Obey(tuple(commands))

    def _flush(self, out: Outbox) -> None:
        out += self._outgoing.flush(self.version)
