"""The order in which prompts are visited: seeded, with a cursor that can be saved and resumed.

The order of each epoch is a permutation that only depends on the seed and the epoch, so the cursor is one number: how
many prompts have been drawn.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for generation and scoring."""

    prompt_id: int
    """Its place in the data set."""
    text: str
    """What the model is asked, as text: the reward function gets it."""
    token_ids: NDArray[np.int32]
    """The same with the chat template applied. [prompt_length]"""
    answer: str
    metadata_json: str = "{}"
    """The other fields of the record, as the text of a JSON object."""


class PromptSource(Protocol):
    """A stream of prompts without end."""

    @property
    def cursor(self) -> int:
        """Prompts drawn so far."""

    def draw(self) -> Prompt:
        """The next prompt."""

    def seek(self, cursor: int) -> None:
        """Go to where so many have been drawn."""


class ShuffledPrompts:
    """Visits a finite set in a new seeded order each epoch."""

    def __init__(self, prompts: tuple[Prompt, ...], *, seed: int, cursor: int = 0) -> None:
        assert prompts, "an empty data set is refused when it is loaded"
        self._prompts = prompts
        self._seed = seed
        self._cursor = cursor
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def cursor(self) -> int:
        """Prompts drawn so far."""
        return self._cursor

    def draw(self) -> Prompt:
        """The next prompt."""
        epoch, place = divmod(self._cursor, len(self._prompts))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts))
            self._epoch = epoch
        self._cursor += 1
        return self._prompts[int(self._order[place])]

    def seek(self, cursor: int) -> None:
        """Go to where so many have been drawn."""
        self._cursor = cursor
