"""The source of the weights of an update: complete parameters, one after another, in the order of the manifest.

A learner of several ranks has no complete parameter, so a source is not a mapping: it yields the tensors in turn, and
may release each one when the next is requested. Every round iterates from the beginning.
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
        """The specs of the tensors, in order."""

    def tensors(self) -> Generator[torch.Tensor]:
        """Each complete parameter, on any device. Called in the group's thread, which closes the iterator at the
        end."""


class LiveTensors:
    """The parameters themselves, without a copy. Tied parameters appear once, under their first name."""

    def __init__(self, named_tensors: NamedTensors) -> None:
        self._tensors = distinct_tensors(named_tensors)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return specs_of(self._tensors)

    def tensors(self) -> Generator[torch.Tensor]:
        yield from self._tensors.values()
