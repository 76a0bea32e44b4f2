"""What a generator decides, over an engine that is a dictionary: whatever comes in whatever order."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from darts_async.generator.engine import Outbox, SampleEnd, StepEvents
from darts_async.generator.state import Arrange, Decode, GeneratorState, Move, Obey, Swap, Wait
from darts_async.protocol import (
    Cancel,
    Generate,
    GeneratorReady,
    Greet,
    Message,
    SampleCancelled,
    SampleFinished,
    TokensDecoded,
    WeightsApplied,
)
from darts_async.transport import PeerDown, PeerUp, Received
from tests.generator.world import generate

SHAPER = "shaper/0"


class Generator:
    """The decisions, an engine whose samples have as many tokens as they are told, and what the shaper hears."""

    def __init__(self) -> None:
        self.state = GeneratorState(flush_every_steps=3)
        self.state.loaded(num_slots=4, max_context_tokens=64)
        self.told: list[Message] = []
        self.decoded: Counter[int] = Counter()
        """Tokens, by the version that decoded them."""
        self.lengths: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self._cancelled: set[int] = set()

    def hear(self, message: Message) -> None:
        event = Received("generators", SHAPER, 1, message)
        if self.state.refusal(event) is None:
            self.state.handle(event)
        self.state.validate()

    def move(self) -> Move:
        """Make the next move."""
        out: Outbox = []
        move = self.state.next_move(len(self._left), out)
        match move:
            case Obey(commands):
                for command in commands:
                    if isinstance(command, Generate):
                        self._left[command.sample_id] = self.lengths[command.sample_id]
                    else:
                        self._cancelled.add(command.sample_id)
            case Arrange(cancelled, started):
                assert not started
                self._cancelled.update(cancelled)
            case Swap():
                self.told += out
                out = []
                self.state.resumed(self.state.version + 1, 0.0, out)
            case Decode():
                self.told += out
                out = []
                self.state.decoded(self._step(), out)
        self.told += out
        self.state.validate()
        return move

    def _step(self) -> StepEvents:
        ids = [sample_id for sample_id in self._left if sample_id not in self._cancelled]
        for sample_id in ids:
            self._left[sample_id] -= 1
        ended = [i for i, left in self._left.items() if left == 0 or i in self._cancelled]
        self._cancelled.intersection_update(self._left)
        reasons = {i: None if i in self._cancelled else "stop" for i in ended}
        for sample_id in ended:
            del self._left[sample_id]
        self._cancelled.clear()
        self.decoded[self.state.version] += len(ids)
        count = len(ids)
        ends = tuple(SampleEnd(i, self.lengths[i], reasons[i]) for i in ended)  # type: ignore[arg-type]
        return StepEvents(np.array(ids, np.int64), np.zeros(count, np.int32), np.zeros(count, np.float32), ends)

    def rest(self) -> None:
        """Until there is nothing to do."""
        while not isinstance(self.move(), Wait):
            pass

    def ends(self) -> list[int]:
        return [each.sample_id for each in self.told if isinstance(each, SampleFinished | SampleCancelled)]


inputs = st.one_of(
    st.tuples(st.just("generate"), st.integers(1, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 8)),
    st.tuples(st.sampled_from(("greet", "away", "back", "swap")), st.just(0)),
    st.tuples(st.just("move"), st.integers(1, 6)),
)


@pytest.mark.slow
@settings(max_examples=400)
@given(st.lists(inputs, max_size=40))
@example([("move", 1), ("greet", 0)])
def test_every_sample_ends_once_every_token_is_told_and_no_message_mixes_versions(said: list[tuple[str, int]]) -> None:
    generator, ids, greetings = Generator(), itertools.count(), itertools.count(1)
    asked: list[int] = []
    is_swap_due = False
    generator.hear(Greet(next(greetings)))
    for what, number in [*said, ("back", 0)]:
        match what:
            case "generate":
                asked.append(next(ids))
                generator.lengths[asked[-1]] = number
                generator.hear(generate(asked[-1]))
            case "cancel" if number < len(asked):
                generator.hear(Cancel(asked[number]))
            case "greet":
                asked.clear()
                generator.hear(Greet(next(greetings)))
            case "away":
                generator.state.handle(PeerDown("generators", SHAPER, 1, "it has ended"))
            case "back":
                generator.state.handle(PeerUp("generators", SHAPER, 1))
            case "swap" if not is_swap_due:
                is_swap_due = True
                generator.state.ask_to_swap()
            case "move":
                for _ in range(number):
                    is_swap_due &= not isinstance(generator.move(), Swap)
    generator.rest()
    assert max(Counter(generator.ends()).values(), default=1) == 1
    assert set(asked) <= set(generator.ends())
    told: Counter[int] = Counter()
    for message in generator.told:
        if isinstance(message, TokensDecoded):
            told[message.policy_version] += len(message.token_ids)
    assert told == +generator.decoded
    answered = [message.greeting for message in generator.told if isinstance(message, GeneratorReady)]
    assert answered == sorted(set(answered))
    assert answered[-1] == next(greetings) - 1, "the newest greeting is answered last"


def test_what_runs_is_told_before_a_greeting_is_answered_and_nothing_of_it_later() -> None:
    generator = Generator()
    generator.lengths = {0: 50, 1: 50}
    generator.hear(Greet(1))
    for sample_id in (0, 1):
        generator.hear(generate(sample_id))
    for _ in range(8):
        generator.move()
    generator.hear(Greet(2))
    generator.rest()
    place = generator.told.index(GeneratorReady(2, 4, 64))
    assert generator.ends() == [0, 1]
    assert not generator.told[place + 1 :]
    assert generator.state.num_live == 0


def test_nothing_is_decoded_while_the_shaper_is_away_but_weights_are_taken() -> None:
    generator = Generator()
    generator.lengths = {0: 50}
    generator.hear(Greet(1))
    generator.hear(generate(0))
    for _ in range(4):
        generator.move()
    generator.state.handle(PeerDown("generators", SHAPER, 1, "it has ended"))
    assert isinstance(generator.move(), Wait)
    generator.state.ask_to_swap()
    assert [type(generator.move()) for _ in range(2)] == [Swap, Wait]
    assert generator.told[-1] == WeightsApplied(0, 0.0)
    generator.state.handle(PeerUp("generators", SHAPER, 1))
    assert isinstance(generator.move(), Decode)


def test_commands_of_the_shaper_before_are_dropped_by_a_greeting() -> None:
    generator = Generator()
    generator.hear(generate(5))
    assert generator.state.num_waiting == 0, "meant for the process before this one"
    generator.hear(Greet(1))
    generator.hear(generate(6))
    generator.hear(Greet(2))
    generator.rest()
    assert generator.state.num_live == generator.state.num_waiting == 0
    assert [type(message) for message in generator.told] == [GeneratorReady]
