"""Right and wrong samples, and the signal guard: a group that could give a gradient does.

A group whose kept samples all have one reward has no advantage, and its cost is wasted. Where the pool of finished
samples has both kinds, the kept set must too, and one exchange is always enough: a kept set of one kind loses one
sample of that kind and gains one of the other.
"""

from collections.abc import Sequence
from statistics import fmean

from darts_async.shaper.group import Sample


def split_by_reward(pool: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Right and wrong samples, each in the order of the pool.

    A reward of at least the mean of the pool is right, so neither list is empty as soon as two rewards differ. A pool
    of one reward is all right if that is positive, and all wrong otherwise."""
    rewards = [reward_of(sample) for sample in pool]
    lowest, highest = min(rewards, default=0.0), max(rewards, default=0.0)
    if lowest == highest:
        return (list(pool), []) if highest > 0 else ([], list(pool))
    mean = min(fmean(rewards), highest)  # rounding may lift the mean of two neighbouring numbers above both
    right = [s for s in pool if reward_of(s) >= mean and reward_of(s) > lowest]
    wrong = [s for s in pool if reward_of(s) < mean or reward_of(s) == lowest]
    return right, wrong


def keep_signal(kept: list[Sample], line: Sequence[Sample], gives_way: Sample, *, num_preferred: int) -> list[Sample]:
    """`kept`, with `gives_way` exchanged for the nearest sample of a kind that is missing, if one is.

    Args:
        kept: what the rule chose from the line, `gives_way` among it.
        line: all samples to choose from, in the order that the rule chooses by.
        gives_way: the sample that the rule would have chosen last.
        num_preferred: later samples are only taken if none of this many first ones is of the missing kind.

    This exchange disturbs a rule least: only its most marginal choice is replaced, by the next one in its order. O(R).
    """
    chosen = set(kept)
    for kind in split_by_reward(line):
        if kind and chosen.isdisjoint(kind):
            place = {sample: position for position, sample in enumerate(line)}
            candidates = [s for s in kind if place[s] < num_preferred] or kind
            comes = min(candidates, key=lambda s: abs(place[s] - place[gives_way]))
            return [s for s in kept if s is not gives_way] + [comes]
    return kept


def reward_of(sample: Sample) -> float:
    """The reward of a scored sample."""
    assert sample.reward is not None, sample.sample_id
    return sample.reward
