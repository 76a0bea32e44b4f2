"""Packing: the samples of a group behind one another in one row, without padding.

Sample `i` contributes `prompt + response_i[:-1]`, positions counting from 0 again: the last token predicts
nothing that is trained. Response token `j` is then predicted by the logits at place `start + prompt_length - 1 + j`,
so a sample's last `len(response)` places are exactly the ones whose logits are needed.

Invariants. Every response token of the group is a target exactly once, and those of a sample stand in one batch, in
order. The lengths sum to the packed tokens. A micro-batch exceeds the token budget only if it holds a single sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
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


def micro_batches(
    group: TrainGroup,
    advantages: NDArray[np.float32],
    tokens_per_micro_batch: int,
    shares: NDArray[np.float32] | None = None,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[PackedBatch]:
    """This rank's part of the group, in packed batches of at most `tokens_per_micro_batch` tokens; a longer sample goes
    alone. All ranks get the same number of batches, and about the same number of tokens in each.

    `advantages` is [num_samples], `shares` [num_tokens] (1 each if not given). Samples without a token are left out.
    The batches are about equally large: the peak of memory is what counts, and it is the largest one's.
    """
    assert len(group.prompt_tokens), "the first response token needs a token before it"
    samples = np.flatnonzero(group.num_tokens)
    lengths = (group.num_tokens[samples] + (len(group.prompt_tokens) - 1)).tolist()
    if shares is None:
        shares = np.ones(len(group.token_ids), np.float32)
    for batch in token_batches(lengths, tokens_per_micro_batch, num_ranks=num_ranks)[rank::num_ranks]:
        if batch:
            yield _pack(group, advantages, shares, samples[list(batch)])
        else:
            shortest = samples[[int(np.argmin(lengths))]]
            yield replace(_pack(group, advantages, np.zeros_like(shares), shortest), idle=True)


def _pack(
    group: TrainGroup, advantages: NDArray[np.float32], shares: NDArray[np.float32], samples: NDArray[np.intp]
) -> PackedBatch:
    num_targets = group.num_tokens[samples]
    ends = np.cumsum(group.num_tokens, dtype=np.int64)[samples]
    flat = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, num_targets, strict=True)])
    targets = group.token_ids[flat]
    lengths = num_targets + (len(group.prompt_tokens) - 1)
    responses = np.split(targets, np.cumsum(num_targets)[:-1])
    rows = [part for response in responses for part in (group.prompt_tokens, response[:-1])]
    places = [np.arange(end - count, end) for end, count in zip(np.cumsum(lengths), num_targets, strict=True)]
    staleness = group.step - group.versions[flat]
    return PackedBatch(
        input_ids=_int64(np.concatenate(rows)),
        position_ids=_int64(np.concatenate([np.arange(length) for length in lengths])),
        lengths=tuple(lengths.tolist()),
        logit_places=_int64(np.concatenate(places)),
        targets=_int64(targets),
        behaviour_logprobs=torch.from_numpy(group.logprobs[flat].astype(np.float32)),
        advantages=torch.from_numpy(np.repeat(advantages[samples], num_targets)),
        shares=torch.from_numpy(shares[flat]),
        # After a restart from an older checkpoint tokens may be newer than the step: neither on-policy nor stale.
        on_policy=torch.from_numpy(staleness == 0),
        staleness=torch.from_numpy(np.maximum(staleness, 0).astype(np.float32)),
        owners=_int64(np.repeat(np.arange(len(samples)), num_targets)),
    )


def _int64(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
