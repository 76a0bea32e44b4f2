"""Converts the metric sums of a rank to a message, and back."""

import torch

from darts_async.learner.metric_sums import Tally
from darts_async.protocol import StepTallied


def tallied(step: int, tally: Tally) -> StepTallied:
    """What a rank counted in a step."""
    histograms = {name: counts.numpy().astype("<f8").tobytes() for name, counts in tally.histograms.items()}
    return StepTallied(step, tally.sums, tally.counts, tally.maxima, histograms)


def tally_of(message: StepTallied) -> Tally:
    """The inverse of `tallied`."""
    histograms = {
        name: torch.frombuffer(bytearray(counts), dtype=torch.float64) for name, counts in message.histograms.items()
    }
    return Tally(message.sums, message.counts, message.maxima, histograms)
