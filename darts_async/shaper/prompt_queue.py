"""The prompts to ask next, and with how many samples each.

A budget is split among a batch of prompts, so a batch is drawn ahead of the groups that are opened one at a time. A
prompt whose group came to nothing is asked again, with as many samples as before.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import Struct

from darts_async.prompts.source import Prompt, PromptSource


@dataclass(frozen=True, slots=True)
class Launch:
    """A group to open."""

    prompt: Prompt
    num_samples: int
    asked_again: bool = False
    """An earlier group of the prompt was cut or dropped."""
    as_spare: bool = False
    """It is opened outside the staleness window."""


class QueueState(Struct, frozen=True):
    """What a `PromptQueue` knows, and where its source stands."""

    source_cursor: int
    drawn: list[Launch]
    again: list[Launch]


class PromptQueue:
    """Prompts in the order of the source; see the module."""

    def __init__(self, source: PromptSource, split: Callable[[Sequence[int]], list[int]], batch: int) -> None:
        """`split` gives the number of samples for each of a batch of prompt ids; it is called once per batch."""
        self._source = source
        self._split = split
        self._batch = batch
        self._drawn: deque[Launch] = deque()
        self._again: deque[Launch] = deque()

    @property
    def cursor(self) -> int:
        """Prompts of the source that have been asked: those that were drawn ahead are not."""
        return self._source.cursor - len(self._drawn)

    def next(self) -> Launch:
        """One that is to be asked again, or the next of the source."""
        return self._again.popleft() if self._again else self.fresh()

    def fresh(self) -> Launch:
        """The next of the source."""
        if not self._drawn:
            prompts = [self._source.draw() for _ in range(self._batch)]
            counts = self._split([prompt.prompt_id for prompt in prompts])
            self._drawn.extend(map(Launch, prompts, counts))
        return self._drawn.popleft()

    def ask_again(self, prompt: Prompt, num_samples: int) -> None:
        """The prompt's group came to nothing."""
        self._again.append(Launch(prompt, num_samples, asked_again=True))

    def to_state(self) -> QueueState:
        """For `restore`."""
        return QueueState(self._source.cursor, list(self._drawn), list(self._again))

    def restore(self, state: QueueState) -> None:
        """Go on where `to_state` was taken."""
        self._source.seek(state.source_cursor)
        self._drawn.extend(state.drawn)
        self._again.extend(state.again)
