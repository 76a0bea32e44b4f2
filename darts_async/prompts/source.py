"""The order in which prompts are visited: seeded, with a cursor that can be saved and resumed.

The order of each epoch is a permutation that only depends on the seed and the epoch, so the cursor is one number: how
many prompts have been drawn. The same holds of a mixture. Draw number n takes part c where

    fraction(offset + n * golden ratio) lies between the sums of the weights of the parts before c, and up to c.

The fractions are evenly spread, and so are those of any stretch of draws (Kronecker's sequence), so that the parts have
their shares in every step, up to a prompt or two. How often a part has been drawn follows from the cursor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_GOLDEN = (5**0.5 - 1) / 2
_SEEN_AT_ONCE = 1 << 16


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
    part: str = ""
    """The part of a mixture, or the set to evaluate on, that it is of."""
    reward: str = ""
    """The reward function of its part alone; empty for that of the section `reward`."""


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


class MixedPrompts:
    """Visits the parts of a mixture in proportion to their weights, and the prompts of each as `ShuffledPrompts` does.

    Example:
        >>> prompts = [Prompt(n, "", np.zeros(1, np.int32), "", part="few" if n < 2 else "many") for n in range(9)]
        >>> source = MixedPrompts(prompts, {"few": 3.0, "many": 1.0}, seed=0)
        >>> [source.draw().part for _ in range(8)]
        ['few', 'few', 'many', 'few', 'few', 'few', 'few', 'many']
    """

    def __init__(self, prompts: Sequence[Prompt], weights: Mapping[str, float], *, seed: int) -> None:
        """Args:
        prompts: of all parts.
        weights: of each part, by name; positive.
        """
        self._parts = [
            ShuffledPrompts(tuple(each for each in prompts if each.part == name), seed=_seed_of(seed, place))
            for place, name in enumerate(weights)
        ]
        self._bounds = np.array([*accumulate(weights.values())]) / sum(weights.values())
        self._offset = float(np.random.default_rng(seed).random())
        self._cursor = 0

    @property
    def cursor(self) -> int:
        """Prompts drawn so far."""
        return self._cursor

    def draw(self) -> Prompt:
        """The next prompt."""
        part = int(self._parts_of(self._cursor, self._cursor + 1)[0])
        self._cursor += 1
        return self._parts[part].draw()

    def seek(self, cursor: int) -> None:
        """Go to where so many have been drawn."""
        drawn = np.zeros(len(self._parts), np.int64)
        for start in range(0, cursor, _SEEN_AT_ONCE):
            places = self._parts_of(start, min(cursor, start + _SEEN_AT_ONCE))
            drawn += np.bincount(places, minlength=len(self._parts))
        for part, number in zip(self._parts, drawn, strict=True):
            part.seek(int(number))
        self._cursor = cursor

    def _parts_of(self, start: int, end: int) -> NDArray[np.int64]:
        """The parts of the draws from `start` to before `end`."""
        fractions = (self._offset + np.arange(start, end) * _GOLDEN) % 1.0
        return np.minimum(np.searchsorted(self._bounds, fractions, side="right"), len(self._parts) - 1)


def _seed_of(seed: int, place: int) -> int:
    return int(np.random.default_rng((seed, place)).integers(1 << 62))
