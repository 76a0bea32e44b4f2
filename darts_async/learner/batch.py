"""Packing: the samples of one or several groups behind one another in one row, without padding.

Sample `i` contributes `prompt + response_i[:-1]`, positions counting from 0 again: the last token predicts
nothing that is trained. Response token `j` is then predicted by the logits at place `start + prompt_length - 1 + j`,
so a sample's last `len(response)` places are exactly the ones whose logits are needed.

Invariants. Every response token of the groups is a target exactly once, and those of a sample stand in one batch, in
order. The lengths sum to the packed tokens. A micro-batch exceeds the token budget only if it holds a single sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darts_async.learner.balance import token_batches
from darts_async.learner.losses.sequences import Sequences
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
    shares: Tensor  # [num_targets] float32, of the loss; 0 where the token is left out
    on_policy: Tensor  # [num_targets] bool, decoded by the version in training
    staleness: Tensor  # [num_targets] float32, in versions, >= 0
    owners: Tensor  # [num_targets] int64, the place in `lengths` of the target's sample

    idle: bool = False
    """Only there because another rank makes a pass; its shares are 0 and its metrics mean nothing."""

    @property
    def sequences(self) -> Sequences:
        """The samples of the targets."""
        return Sequences(self.owners, len(self.lengths))

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A group, and what its samples and tokens count for."""

    group: TrainGroup
    advantages: NDArray[np.float32]  # [num_samples]
    shares: NDArray[np.float32]  # [num_tokens], of the loss


def num_packed_tokens(group: TrainGroup) -> int:
    """What the group takes of a batch."""
    return len(group.token_ids) + int(np.count_nonzero(group.num_tokens)) * (len(group.prompt_tokens) - 1)


def micro_batches(
    groups: Sequence[Weighted], tokens_per_micro_batch: int, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[PackedBatch]:
    """This rank's part of the groups, in packed batches of at most `tokens_per_micro_batch` tokens; a longer sample
    goes alone. All ranks get the same number of batches, and about the same number of tokens in each.

    Samples without a token are left out. The batches are about equally large: the peak of memory is what counts, and it
    is the largest one's.
    """
    samples = [sample for weighted in groups for sample in _samples(weighted)]
    lengths = [sample.length for sample in samples]
    for batch in token_batches(lengths, tokens_per_micro_batch, num_ranks=num_ranks)[rank::num_ranks]:
        if batch:
            yield _pack([samples[item] for item in batch])
        else:
            shortest = _pack([samples[int(np.argmin(lengths))]])
            yield replace(shortest, shares=torch.zeros_like(shortest.shares), idle=True)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample of at least one token."""

    group: TrainGroup
    advantage: np.float32
    shares: NDArray[np.float32]  # [num_tokens]
    tokens: slice  # its response, of those of the group

    @property
    def num_targets(self) -> int:
        return int(self.tokens.stop - self.tokens.start)

    @property
    def length(self) -> int:
        """Packed tokens."""
        return len(self.group.prompt_tokens) - 1 + self.num_targets


def _samples(weighted: Weighted) -> Iterator[_Sample]:
    group = weighted.group
    assert len(group.prompt_tokens), "the first response token needs a token before it"
    ends = np.cumsum(group.num_tokens, dtype=np.int64).tolist()
    for start, end, advantage in zip([0, *ends], ends, weighted.advantages, strict=False):
        if end > start:
            yield _Sample(group, advantage, weighted.shares[start:end], slice(start, end))


def _pack(samples: Sequence[_Sample]) -> PackedBatch:
    num_targets = [sample.num_targets for sample in samples]
    lengths = [sample.length for sample in samples]
    responses = [sample.group.token_ids[sample.tokens] for sample in samples]
    prompts = [sample.group.prompt_tokens for sample in samples]
    rows = [part for prompt, response in zip(prompts, responses, strict=True) for part in (prompt, response[:-1])]
    places = [np.arange(end - count, end) for end, count in zip(accumulate(lengths), num_targets, strict=True)]
    staleness = np.concatenate([sample.group.step - sample.group.versions[sample.tokens] for sample in samples])
    logprobs = np.concatenate([sample.group.logprobs[sample.tokens] for sample in samples])
    advantages = np.array([sample.advantage for sample in samples], np.float32)
    return PackedBatch(
        input_ids=_int64(np.concatenate(rows)),
        position_ids=_int64(np.concatenate([np.arange(length) for length in lengths])),
        lengths=tuple(lengths),
        logit_places=_int64(np.concatenate(places)),
        targets=_int64(np.concatenate(responses)),
        behaviour_logprobs=torch.from_numpy(logprobs.astype(np.float32)),
        advantages=torch.from_numpy(np.repeat(advantages, num_targets)),
        shares=torch.from_numpy(np.concatenate([sample.shares for sample in samples])),
        # After a restart from an older checkpoint tokens may be newer than the step: neither on-policy nor stale.
        on_policy=torch.from_numpy(staleness == 0),
        staleness=torch.from_numpy(np.maximum(staleness, 0).astype(np.float32)),
        owners=_int64(np.repeat(np.arange(len(samples)), num_targets)),
    )


def _int64(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
