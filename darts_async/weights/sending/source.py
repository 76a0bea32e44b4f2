"""Where the weights of an update come from: whole parameters, one after another, in the order of the manifest.

A learner of several ranks has no whole parameter anywhere, so a source is not a mapping: it yields each tensor when
its turn comes, and the one before may be gone by then. It is asked again from the beginning for every round.
"""

from collections.abc import Generator
from typing import Protocol

import torch

from darts_async.protocol import TensorSpec
from darts_async.weights.bucket_layout import NamedTensors, distinct_tensors, specs_of


class WeightSource(Protocol):
    """The parameters of one version."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What `tensors` yields, in order."""

    def tensors(self) -> Generator[torch.Tensor]:
        """Each parameter, whole, on any device; called in the thread of the broadcast group, which closes the iterator
        when it needs no more."""


class LiveTensors:
    """The parameters themselves, without a copy. Tied ones appear once, under their first name."""

    def __init__(self, named_tensors: NamedTensors) -> None:
        self._tensors = distinct_tensors(named_tensors)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """One for each parameter."""
        return specs_of(self._tensors)

    def tensors(self) -> Generator[torch.Tensor]:
        """The parameters."""
        yield from self._tensors.values()
