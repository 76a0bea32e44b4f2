"""The prompts to ask next, and with how many samples each.

A budget is split among a batch of prompts, so prompts are drawn ahead by the batch. One whose group was given up is
asked again, with as many samples as before, but not forever. A curriculum may pass over what the source brings.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import Struct

from darts_async.prompts.source import Prompt, PromptSource

MAX_RETRIES_PER_PROMPT = 3
"""A prompt whose groups were given up this often is not asked again until the source brings it."""
MAX_PASSED_OVER = 1000
"""After so many in a row the next one is asked, whatever the curriculum says."""


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """A group to open."""

    prompt: Prompt
    num_samples: int
    asked_again: bool = False
    """An earlier group of the prompt was cut or dropped."""
    cursor: int = 0
    """Prompts that the source had brought when this one was drawn, itself included."""


class QueueState(Struct, frozen=True):
    """What a `PromptQueue` knows, and the cursor of its source."""

    source_cursor: int
    drawn: list[PlannedGroup]
    again: list[PlannedGroup]
    retries: Counter[int]
    num_passed_over: int = 0


class PromptQueue:
    """Prompts in the order of the source; see the module."""

    def __init__(
        self,
        source: PromptSource,
        split: Callable[[Sequence[int]], list[int]],
        batch: int,
        passes_over: Callable[[int, int], bool] = lambda prompt_id, place: False,
    ) -> None:
        """
        Args:
            split: gives the number of samples for each of a batch of prompt ids; it is called once per batch.
            passes_over: whether a prompt id that the source brings at this place is left out.
        """
        self._source = source
        self._split = split
        self._passes_over = passes_over
        self._batch = batch
        self._drawn: deque[PlannedGroup] = deque()
        self._again: deque[PlannedGroup] = deque()
        self._retries: Counter[int] = Counter()
        self.num_passed_over = 0

    @property
    def cursor(self) -> int:
        """Prompts of the source that have been asked or passed over: those that were drawn ahead are not."""
        return self._drawn[0].cursor - 1 if self._drawn else self._source.cursor

    def next(self) -> PlannedGroup:
        """One that is to be asked again, or the next of the source."""
        return self._again.popleft() if self._again else self.fresh()

    def fresh(self) -> PlannedGroup:
        """The next of the source."""
        if not self._drawn:
            drawn = [self._draw() for _ in range(self._batch)]
            counts = self._split([prompt.prompt_id for prompt, _ in drawn])
            self._drawn.extend(
                PlannedGroup(prompt, count, cursor=cursor)
                for (prompt, cursor), count in zip(drawn, counts, strict=True)
            )
        return self._drawn.popleft()

    def _draw(self) -> tuple[Prompt, int]:
        """The next prompt that is not passed over, and the cursor after it."""
        for _ in range(MAX_PASSED_OVER):
            place, prompt = self._source.cursor, self._source.draw()
            if not self._passes_over(prompt.prompt_id, place):
                return prompt, self._source.cursor
            self.num_passed_over += 1
        return self._source.draw(), self._source.cursor

    def ask_again(self, prompt: Prompt, num_samples: int) -> None:
        """The prompt's group was given up for reasons that are not its own."""
        self._again.append(PlannedGroup(prompt, num_samples, asked_again=True))

    def retry(self, prompt: Prompt, num_samples: int) -> None:
        """The prompt's group was given up: ask it again, unless that happened too often."""
        if self._retries[prompt.prompt_id] < MAX_RETRIES_PER_PROMPT:
            self._retries[prompt.prompt_id] += 1
            self.ask_again(prompt, num_samples)

    def completed(self, prompt_id: int) -> None:
        """A group of the prompt is complete: its retries are counted from zero again."""
        self._retries.pop(prompt_id, None)

    def rejected(self, prompt_id: int) -> None:
        """The engine cannot decode this prompt: it would be rejected again."""
        self._retries[prompt_id] = MAX_RETRIES_PER_PROMPT

    def to_state(self) -> QueueState:
        return QueueState(
            source_cursor=self._source.cursor,
            drawn=list(self._drawn),
            again=list(self._again),
            retries=self._retries,
            num_passed_over=self.num_passed_over,
        )

    def restore(self, state: QueueState) -> None:
        self._source.seek(state.source_cursor)
        self._drawn.extend(state.drawn)
        self._again.extend(state.again)
        self._retries = state.retries
        self.num_passed_over = state.num_passed_over
