"""Which tokens of a packed row see which: the row is a sequence of trees.

The responses to one prompt are the branches of its tree. Every token sees the tokens before it of its trunk and of its
own branch. So the prompt is in the row once, whatever its number of responses, and log-probabilities and gradients are
those of the samples one by one, up to rounding.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Tree(NamedTuple):
    """`trunk` tokens, and then those of each branch. A sample that shares nothing is only a trunk."""

    trunk: int
    """>= 1."""
    branches: tuple[int, ...] = ()
    """Tokens of each, >= 0."""

    @property
    def num_tokens(self) -> int:
        return self.trunk + sum(self.branches)

    def positions(self) -> Iterator[int]:
        """The position of each token in its sample: [num_tokens]."""
        yield from range(self.trunk)
        for branch in self.branches:
            yield from range(self.trunk, self.trunk + branch)

    def segments(self) -> Iterator[tuple[int, int]]:
        """Of the trunk and of each branch with tokens: how many tokens, and how many before them they see."""
        yield self.trunk, 0
        for branch in self.branches:
            if branch:
                yield branch, self.trunk
