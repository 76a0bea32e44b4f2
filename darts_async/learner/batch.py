"""Packing: the samples of a group behind one another in one row, without padding.

Sample `i` contributes `prompt + response_i[:-1]`, positions counting from 0 again: the last token predicts
nothing that is trained. Response token `j` is then predicted by the logits at place `start + prompt_length - 1 + j`,
so a sample's last `len(response)` places are exactly the ones whose logits are needed.

Invariants. Every response token of the group is a target exactly once, in the group's order. The lengths sum to the
packed tokens. A micro-batch exceeds the token budget only if it holds a single sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darts_async.protocol import TrainGroup


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences behind one another, and what is known about each response token (`targets`)."""

    input_ids: Tensor  # [num_packed_tokens] int64
    position_ids: Tensor  # [num_packed_tokens] int64, from 0 in each sequence
    lengths: tuple[int, ...]  # [num_sequences], the sum is num_packed_tokens
    logit_places: Tensor  # [num_targets] int64, the packed token whose logits predict the target
    targets: Tensor  # [num_targets] int64
    behaviour_logprobs: Tensor  # [num_targets] float32
    advantages: Tensor  # [num_targets] float32, that of the target's sample
    on_policy: Tensor  # [num_targets] bool, decoded by the version in training

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if name != "lengths"})


def micro_batches(
    group: TrainGroup, advantages: NDArray[np.float32], tokens_per_micro_batch: int
) -> Iterator[PackedBatch]:
    """The group in packed batches of at most `tokens_per_micro_batch` tokens; a longer sample goes alone.

    `advantages` is [num_samples]. Samples without a token are left out.
    """
    assert len(group.prompt_tokens), "the first response token needs a token before it"
    ends = np.cumsum(group.num_tokens, dtype=np.int64)
    packed_lengths = group.num_tokens + (len(group.prompt_tokens) - 1)
    samples: list[int] = []
    num_packed = 0
    for sample in np.flatnonzero(group.num_tokens).tolist():
        if samples and num_packed + packed_lengths[sample] > tokens_per_micro_batch:
            yield _pack(group, advantages, ends, samples)
            samples, num_packed = [], 0
        samples.append(sample)
        num_packed += int(packed_lengths[sample])
    if samples:
        yield _pack(group, advantages, ends, samples)


def _pack(
    group: TrainGroup, advantages: NDArray[np.float32], ends: NDArray[np.int64], samples: list[int]
) -> PackedBatch:
    # Samples without a token lie between `samples` at most, so their tokens are one slice of the group's.
    num_targets = group.num_tokens[samples]
    flat = slice(int(ends[samples[0]] - num_targets[0]), int(ends[samples[-1]]))
    targets = group.token_ids[flat]
    lengths = num_targets + (len(group.prompt_tokens) - 1)
    responses = np.split(targets, np.cumsum(num_targets)[:-1])
    rows = [part for response in responses for part in (group.prompt_tokens, response[:-1])]
    places = [np.arange(end - count, end) for end, count in zip(np.cumsum(lengths), num_targets, strict=True)]
    return PackedBatch(
        input_ids=_int64(np.concatenate(rows)),
        position_ids=_int64(np.concatenate([np.arange(length) for length in lengths])),
        lengths=tuple(lengths.tolist()),
        logit_places=_int64(np.concatenate(places)),
        targets=_int64(targets),
        behaviour_logprobs=torch.from_numpy(group.logprobs[flat].astype(np.float32)),
        advantages=torch.from_numpy(np.repeat(advantages[samples], num_targets)),
        on_policy=torch.from_numpy(group.versions[flat] == group.step),
    )


def _int64(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
