"""Packing: the samples of one or several groups one after another in one row, without padding.

Sample `i` contributes `response_i[:-1]`, because its last token predicts nothing. Its positions continue those of its
prompt, which is before it, or once before all of the row's samples that share it (see `tree`). Response token `j > 0`
is predicted by the logits at the place of token `j - 1`, the first one by those at the prompt's last place.

Invariants. Every response token of the groups is a target exactly once, and those of a sample are in one batch, in
order. A micro-batch exceeds the token budget only if it holds a single sample.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darts_async.learner.packing.balance import tree_batches
from darts_async.learner.packing.sequences import Sequences
from darts_async.learner.packing.tree import Tree
from darts_async.learner.ranks.rank_info import ALONE, RankInfo
from darts_async.protocol import TrainGroup


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Trees one after another, and what is known about each response token (`targets`)."""

    input_ids: Tensor  # [num_packed_tokens] int64
    position_ids: Tensor  # [num_packed_tokens] int64, each token's place in its sample
    trees: tuple[Tree, ...]  # num_packed_tokens in all
    num_samples: int
    logit_places: Tensor  # [num_targets] int64, the packed token whose logits predict the target
    targets: Tensor  # [num_targets] int64
    behaviour_logprobs: Tensor  # [num_targets] float32
    advantages: Tensor  # [num_targets] float32, that of the target's sample
    shares: Tensor  # [num_targets] float32, of the loss; 0 where the token is left out
    weights: Tensor  # [num_targets] float32, the inclusion weight of the target's sample
    on_policy: Tensor  # [num_targets] bool, decoded by the version in training
    staleness: Tensor  # [num_targets] float32, in versions, >= 0
    owners: Tensor  # [num_targets] int64, the target's sample

    idle: bool = False
    """It is only there because another rank makes a pass: its shares are 0 and its metrics mean nothing."""

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.owners, self.num_samples)

    def to(self, device: torch.device) -> "PackedBatch":
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A group, and what its samples and tokens count for."""

    group: TrainGroup
    advantages: NDArray[np.float32]  # [num_samples]
    shares: NDArray[np.float32]  # [num_tokens], of the loss


def micro_batches(
    groups: Sequence[Weighted],
    tokens_per_micro_batch: int,
    *,
    share_prompts: bool = True,
    rank_info: RankInfo = ALONE,
) -> Iterator[PackedBatch]:
    """This rank's part of the groups, in packed batches of at most `tokens_per_micro_batch` tokens; a longer sample
    goes alone. All ranks get the same number of batches, and about the same number of tokens in each. With
    `share_prompts` a prompt is in a batch once, however many of its samples are.

    Samples without a token are left out.
    """
    families = [family for weighted in groups if (family := [*_samples(weighted)])]
    if not share_prompts:
        families = [[sample] for family in families for sample in family]
    trees = [_tree(family) for family in families]
    rank, num_ranks = rank_info.rank, rank_info.num_ranks
    for batch in tree_batches(trees, tokens_per_micro_batch, num_ranks=num_ranks)[rank::num_ranks]:
        if batch:
            parts = itertools.groupby(batch, key=lambda branch: branch[0])
            yield _pack([[families[tree][branch] for tree, branch in part] for _, part in parts])
        else:
            shortest = _pack([[min(itertools.chain(*families), key=lambda sample: sample.length)]])
            yield replace(shortest, shares=torch.zeros_like(shortest.shares), idle=True)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample of at least one token."""

    group: TrainGroup
    advantage: np.float32
    weight: np.float32
    shares: NDArray[np.float32]  # [num_tokens]
    tokens: slice  # its response, of those of the group

    @property
    def num_targets(self) -> int:
        return int(self.tokens.stop - self.tokens.start)

    @property
    def length(self) -> int:
        return len(self.group.prompt_tokens) - 1 + self.num_targets


def _samples(weighted: Weighted) -> Iterator[_Sample]:
    group = weighted.group
    assert len(group.prompt_tokens), "the first response token needs a token before it"
    ends = np.cumsum(group.num_tokens, dtype=np.int64).tolist()
    for start, end, advantage, weight in zip([0, *ends], ends, weighted.advantages, group.weights, strict=False):
        if end > start:
            yield _Sample(group, advantage, weight, weighted.shares[start:end], slice(start, end))


def _tree(samples: Sequence[_Sample]) -> Tree:
    return Tree(len(samples[0].group.prompt_tokens), tuple(sample.num_targets - 1 for sample in samples))


def _pack(families: Sequence[Sequence[_Sample]]) -> PackedBatch:
    trees = [_tree(family) for family in families]
    samples = [sample for family in families for sample in family]
    num_targets = [sample.num_targets for sample in samples]
    responses = [sample.group.token_ids[sample.tokens] for sample in samples]
    staleness = np.concatenate([sample.group.step - sample.group.versions[sample.tokens] for sample in samples])
    logprobs = np.concatenate([sample.group.logprobs[sample.tokens] for sample in samples])
    advantages = np.array([sample.advantage for sample in samples], np.float32)
    return PackedBatch(
        input_ids=_int64(np.concatenate([part for family in families for part in _tokens(family)])),
        position_ids=torch.tensor([position for tree in trees for position in tree.positions()]),
        trees=tuple(tree if len(tree.branches) > 1 else Tree(tree.num_tokens) for tree in trees),
        num_samples=len(samples),
        logit_places=_int64(np.concatenate([*_logit_places(trees)])),
        targets=_int64(np.concatenate(responses)),
        behaviour_logprobs=torch.from_numpy(logprobs.astype(np.float32)),
        advantages=torch.from_numpy(np.repeat(advantages, num_targets)),
        shares=torch.from_numpy(np.concatenate([sample.shares for sample in samples])),
        # After a restart from an older checkpoint tokens may be newer than the step: neither on-policy nor stale.
        on_policy=torch.from_numpy(staleness == 0),
        staleness=torch.from_numpy(np.maximum(staleness, 0).astype(np.float32)),
        weights=torch.from_numpy(np.repeat(np.array([sample.weight for sample in samples], np.float32), num_targets)),
        owners=_int64(np.repeat(np.arange(len(samples)), num_targets)),
    )


def _tokens(family: Sequence[_Sample]) -> Iterator[NDArray[np.int32]]:
    yield family[0].group.prompt_tokens
    for sample in family:
        yield sample.group.token_ids[sample.tokens][:-1]


def _logit_places(trees: Sequence[Tree]) -> Iterator[NDArray[np.int64]]:
    """Of each sample's targets: the last place of its trunk, and then those of its branch."""
    place = 0
    for tree in trees:
        place += tree.trunk
        fork = np.array([place - 1])
        for branch in tree.branches:
            yield np.concatenate([fork, np.arange(place, place + branch)])
            place += branch


def _int64(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
