"""Splits work evenly over ranks and passes.

`balance` is pure and the same on every rank, so no rank has to tell the others which samples are its own.

Largest first onto the least loaded rank (Graham, "Bounds on multiprocessing timing anomalies", 1969): the largest
load is at most 4/3 - 1/(3K) times the best possible one.

Invariants. Every index is on exactly one rank. The loads of two ranks differ by at most one item. Ties go to the lower
index and the lower rank.
"""

import heapq
import math
from collections.abc import Sequence

from darts_async.learner.packing.tree import Tree

Branch = tuple[int, int]
"""The tree, and which of its branches."""


def balance(lengths: Sequence[int], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Which items each rank takes: `num_ranks` tuples of indices into `lengths`, ascending, empty for a rank left over.

    `lengths` are the tokens of each item, >= 0. Raises `ValueError` for a negative length or no rank.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; work is split over at least one rank")
    if min(lengths, default=0) < 0:
        raise ValueError(f"lengths has {min(lengths)} at place {list(lengths).index(min(lengths))}; tokens are counted")
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap: the least loaded rank is first
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        load, rank = loads[0]
        shares[rank].append(item)
        heapq.heapreplace(loads, (load + lengths[item], rank))
    return tuple(tuple(sorted(share)) for share in shares)


def tree_batches(trees: Sequence[Tree], tokens_per_batch: int, *, num_ranks: int = 1) -> tuple[tuple[Branch, ...], ...]:
    """The branches of all trees (each has at least one) in batches of at most `tokens_per_batch` tokens, about equally
    large; a longer one goes alone. A batch holds a trunk once, however many of its branches it has.

    The number of batches is a multiple of `num_ranks`, because ranks that gather layers together must make the same
    number of passes: rank r takes batches r, r + num_ranks, ..., so that those of one pass are alike. A batch is empty
    only where there are fewer branches than batches. Raises `ValueError` for no rank or a budget below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch}; a batch holds at least one token")
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; work is split over at least one rank")
    most = math.ceil(sum(len(tree.branches) for tree in trees) / num_ranks)
    fewest = min(most, math.ceil(sum(tree.num_tokens for tree in trees) / (tokens_per_batch * num_ranks)))
    for num_passes in range(max(1, fewest), most + 1):
        found = _best_batches(trees, num_passes, num_ranks, tokens_per_batch)
        if found is not None:
            return found
    assert not most, "a branch of its own is always a batch"
    return ()


def _best_batches(
    trees: Sequence[Tree], num_passes: int, num_ranks: int, tokens_per_batch: int
) -> tuple[tuple[Branch, ...], ...] | None:
    """The quickest split into so many passes, each of which takes as long as its largest batch; None if none fits.

    Whole trees share most, but may be too coarse for even batches, so they are cut finer and finer. The tokens that are
    compared include the cost of a cut: the trunk in one more batch.
    """
    best, least = None, math.inf
    size = float(max(tree.num_tokens for tree in trees))
    while True:
        parts = [part for place, tree in enumerate(trees) for part in _parts(place, tree, size)]
        shares = balance([_num_tokens(trees, part) for part in parts], num_passes * num_ranks)
        batches = [tuple(sorted(branch for item in share for branch in parts[item])) for share in shares]
        batches.sort(key=lambda batch: -_num_tokens(trees, batch))
        loads = [_num_tokens(trees, batch) for batch in batches]
        fits = all(len(batch) <= 1 or load <= tokens_per_batch for batch, load in zip(batches, loads, strict=True))
        if fits and sum(loads[::num_ranks]) < least:
            best, least = tuple(batches), sum(loads[::num_ranks])
        if len(batches) == 1 or all(len(part) == 1 for part in parts):
            return best
        size /= 2


def _parts(place: int, tree: Tree, size: float) -> list[tuple[Branch, ...]]:
    """The branches of a tree in parts of about `size` tokens, or of one branch."""
    num_parts = min(len(tree.branches), math.ceil(tree.num_tokens / size))
    # One more, so that a branch without tokens counts too: its sample has a target.
    shares = balance([tokens + 1 for tokens in tree.branches], num_parts)
    return [tuple((place, branch) for branch in share) for share in shares]


def _num_tokens(trees: Sequence[Tree], branches: Sequence[Branch]) -> int:
    trunks = sum(trees[place].trunk for place in {place for place, _ in branches})
    return trunks + sum(trees[place].branches[branch] for place, branch in branches)
