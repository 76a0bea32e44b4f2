"""What a generator does next and what it tells: all decisions of the process, without engine, socket, clock or task.

    greeting -> cancel and decode to the end what runs -> ready -> between two steps: swap weights, start and cancel
    samples, decode or wait

The owner of the engine asks for the `next_move` between two steps, sends what stands in the outbox, makes the move, and
asks again. Commands wait for the boundary and are given to the engine there, in order; weights come into use there too.
Tokens of the old version are told before, so a message never mixes versions, and the shaper learns of the new version
before it sees a token of it.

While the shaper is away nothing is decoded: when it is back it greets, and whatever it has not heard of by then is
dropped. Weights are taken meanwhile as ever.
"""

from collections import deque
from dataclasses import dataclass
from typing import cast

from darts_async.generator.boundary import refusal_of_learner, refusal_of_shaper
from darts_async.generator.events import Outbox, StepEvents
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
    """Give the engine what the shaper has asked for, in order."""

    commands: tuple[Generate | Cancel, ...]


@dataclass(frozen=True, slots=True)
class Arrange:
    """Cancel and start samples that the shaper has not named."""

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
    """See the module.

    Args:
        flush_every_steps: tokens of so many steps are told together.
        stopping: what ends responses at stop strings, if there are any.
    """

    def __init__(self, *, flush_every_steps: int, stopping: StopStrings | None = None) -> None:
        self._stopping = stopping
        self._capacity: tuple[int, int] | None = None  # slots and context of the engine, once there is one
        self._outgoing = Outgoing(flush_every_steps)
        self._probing = Probing()
        self.shaper: str | None = None  # until it greets: what comes before was meant for the process before this one
        self.learner: str | None = None  # the same
        self.is_shaper_away = False
        self.version = -1  # in use; -1 before the first
        self._commands: deque[Generate | Cancel] = deque()  # bounded by the link's credit and the shaper's seats
        self._greeting: Greet | None = None  # not taken up yet
        self._answering: Greet | None = None  # taken up: what runs is decoded to its end, then this is answered
        self._live: set[int] = set()  # the shaper's samples that the engine has
        self._asked: set[int] = set()  # those asked for since it greeted that have not ended
        self._is_swap_due = False
        self._is_swapping = False

    # --- events ----------------------------------------------------------------------------------------------

    def refusal(self, event: Received) -> str | None:
        """Why a message cannot be meant; None if it is to be taken."""
        if event.link == GENERATORS_LINK.name:
            return refusal_of_shaper(cast(ShaperToGenerator, event.message), self._asked)
        return refusal_of_learner(cast(LearnerToGenerator, event.message))

    def handle(self, event: Event) -> None:
        """Take in an event; what is said of an update of the weights is the business of `Member`."""
        match event:
            case Received(link=GENERATORS_LINK.name, peer=peer, message=Greet() as greeting):
                self.shaper, self._greeting, self.is_shaper_away = peer, greeting, False
                self._commands.clear()
                self._asked.clear()
            case PeerUp(link=GENERATORS_LINK.name):  # it may not have noticed that it was away, and then does not greet
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
        """There is an engine now, of this size. `next_move` is asked for from then on."""
        self._capacity = num_slots, max_context_tokens

    @property
    def may_join(self) -> bool:
        """Whether there is an engine to take weights, and a learner that has greeted."""
        return self._capacity is not None and self.learner is not None

    def ask_to_swap(self) -> None:
        """Weights are to come into use at the next boundary."""
        assert not self._is_swap_due, "one update at a time"
        assert not self._is_swapping, "one update at a time"
        self._is_swap_due = True

    # --- moves and what comes of them ------------------------------------------------------------------------

    def next_move(self, num_unfinished: int, out: Outbox) -> Move:
        """What to do after `out` is sent.

        Args:
            num_unfinished: samples that the engine has.
            out: takes what is to be told before.
        """
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
        """A step, or what was decoded before a swap and comes while it is under way, brought these events."""
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
        """The swap is over, after `stall_s`; `version` is what is in use now, None if that has not changed."""
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
        """Tokens decoded so far of which the shaper never hears: those of probes, and those after a stop string."""
        return self._probing.num_tokens + (0 if self._stopping is None else self._stopping.num_tokens_dropped)

    def validate(self) -> None:
        """Assert what holds between two events: every sample that was asked for waits or runs, and no other does."""
        waiting = [command.sample_id for command in self._commands if isinstance(command, Generate)]
        assert len(set(waiting)) == len(waiting)
        assert not (self._is_swapping and self._is_swap_due)
        assert self.shaper is not None or not (self._commands or self._greeting)
        if self._greeting is None and self._answering is None:
            assert self._live.isdisjoint(waiting)
            assert self._asked == self._live.union(waiting)

    # --- inside ----------------------------------------------------------------------------------------------

    def _answer(self, greeting: Greet, out: Outbox) -> None:
        """Every sample is dropped, for the shaper has given them to others: say what this generator is."""
        self._flush(out)  # none waits for these tokens, but they were decoded and are to be counted
        assert not self._live, "every sample that was started has ended"
        assert self._capacity is not None, "moves are asked for by the owner of an engine"
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
                if end is not None:  # its generator died after the stop string and before it said so
                    self.decoded(StepEvents(ended=(end,)), out)
                    continue
                self._live.add(command.sample_id)
            commands.append(command)
        return Obey(tuple(commands))

    def _flush(self, out: Outbox) -> None:
        out += self._outgoing.flush(self.version)
