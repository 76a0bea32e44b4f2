"""Work split evenly over ranks: long samples cost more than their tokens say, because attention is quadratic.

`balance` is pure and the same on every rank, so no rank has to tell the others which samples are its own.

Largest first onto the least loaded rank (Graham, "Bounds on multiprocessing timing anomalies", 1969): the largest
load is at most 4/3 - 1/(3K) times the best possible one.

Invariants. Every index is on exactly one rank. The loads of two ranks differ by at most the cost of one item. The
result depends on nothing but the arguments: ties go to the lower index and the lower rank.
"""

import heapq
import math
from collections.abc import Sequence


def balance(
    lengths: Sequence[int], num_ranks: int, *, attention_tokens: float | None = None
) -> tuple[tuple[int, ...], ...]:
    """Which items each rank takes: `num_ranks` tuples of indices into `lengths`, ascending, empty for a rank left over.

    Args:
        lengths: tokens of each item, prompts included, >= 0.
        num_ranks: >= 1.
        attention_tokens: length at which attention costs as much as everything else; an item of n tokens counts
            `n + n^2 / attention_tokens`. None: tokens alone. `ModelFlops.attention_tokens` computes it.

    Raises: `ValueError` for a negative length or no rank.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; work is split over at least one rank")
    if min(lengths, default=0) < 0:
        raise ValueError(f"lengths has {min(lengths)} at place {list(lengths).index(min(lengths))}; tokens are counted")
    costs = [_cost(int(length), attention_tokens) for length in lengths]
    loads = [(0.0, rank) for rank in range(num_ranks)]  # a heap: the least loaded rank is first
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, rank = loads[0]
        shares[rank].append(item)
        heapq.heapreplace(loads, (load + costs[item], rank))
    return tuple(tuple(sorted(share)) for share in shares)


def token_batches(lengths: Sequence[int], tokens_per_batch: int, *, num_ranks: int = 1) -> tuple[tuple[int, ...], ...]:
    """Items in batches of at most `tokens_per_batch` tokens, about equally large; a longer item goes alone.

    With `num_ranks` ranks the number of batches is a multiple of it, because ranks that gather layers together have to
    make the same number of passes: rank r takes batches r, r + num_ranks, ... A batch is empty only where
    there are fewer items than batches.

    Raises: `ValueError` for no rank, a negative length or a budget below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch}; a batch holds at least one token")
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; work is split over at least one rank")
    most = math.ceil(len(lengths) / num_ranks)
    fewest = min(most, math.ceil(sum(lengths) / (tokens_per_batch * num_ranks)))
    for num_passes in range(max(1, fewest), most + 1):
        batches = balance(lengths, num_ranks * num_passes)
        if all(len(batch) <= 1 or sum(lengths[item] for item in batch) <= tokens_per_batch for batch in batches):
            return batches
    assert not lengths, "an item of its own is always a batch"
    return ()


def _cost(length: int, attention_tokens: float | None) -> float:
    return float(length) if attention_tokens is None else length + length * length / attention_tokens
