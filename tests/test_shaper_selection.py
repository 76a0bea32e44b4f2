"""Which samples are kept, by each rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.config import ShapingConfig
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.selection import DualEnd, KeepAll, Survivor, selection_rule
from tests.shaper_world import prompts

PROMPT = prompts(1)[0]


def group_of(lengths: list[int], *, capped: frozenset[int] = frozenset(), stage: Stage = Stage.SCORED) -> Group:
    samples = [
        Sample(i, stage=stage, num_tokens=n, finish_reason="length" if i in capped else "stop", reward=0.0)
        for i, n in enumerate(lengths)
    ]
    return Group(0, PROMPT, "train", samples)


def ids(kept: list[tuple[Sample, float]]) -> list[int]:
    return [sample.sample_id for sample, _ in kept]


def test_dual_end_keeps_the_shortest_and_the_longest_in_launch_order() -> None:
    rule = DualEnd(shortest=2, longest=1, exclude_capped=True, early_stop=False)
    assert ids(rule.select(group_of([50, 10, 40, 90, 20]))) == [1, 3, 4]


def test_dual_end_passes_over_capped_samples_unless_too_few_others_are_left() -> None:
    rule = DualEnd(shortest=2, longest=1, exclude_capped=True, early_stop=False)
    lengths = [50, 10, 99, 99, 20]
    assert ids(rule.select(group_of(lengths, capped=frozenset({2, 3})))) == [0, 1, 4]
    assert ids(rule.select(group_of(lengths, capped=frozenset({0, 2, 3})))) == [0, 1, 4]
    with_capped = DualEnd(shortest=2, longest=1, exclude_capped=False, early_stop=False)
    assert ids(with_capped.select(group_of(lengths, capped=frozenset({2, 3})))) == [1, 3, 4]


@given(st.lists(st.integers(1, 50), min_size=4, max_size=20), st.integers(0, 4))
def test_dual_end_keeps_exactly_k_plus_l_and_nothing_kept_is_between_the_ends(lengths: list[int], longest: int) -> None:
    rule = DualEnd(shortest=4 - longest, longest=longest, exclude_capped=True, early_stop=False)
    kept = ids(rule.select(group_of(lengths)))
    assert len(kept) == 4
    assert kept == sorted(kept)
    ordered = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    assert set(kept) == set(ordered[: 4 - longest]) | set(ordered[len(ordered) - longest :])


@pytest.mark.parametrize(
    "rule",
    [
        KeepAll(),
        DualEnd(3, 1, exclude_capped=True, early_stop=False),
        DualEnd(3, 1, exclude_capped=True, early_stop=True),
        Survivor(3, 1, weight_power=0.7),
    ],
)
def test_with_as_many_launched_as_kept_every_rule_is_plain_grpo(rule: KeepAll | DualEnd | Survivor) -> None:
    group = group_of([5, 3, 9, 9], capped=frozenset({2}))
    for stage in (Stage.DECODING, Stage.SCORED):
        for sample in group.samples[3:]:
            sample.stage = stage
        assert rule.to_cancel(group, seed=1) == []
    assert rule.select(group) == [(sample, 1.0) for sample in group.samples]


def test_early_stop_cancels_everybody_who_runs_when_m_have_finished() -> None:
    rule = DualEnd(shortest=2, longest=1, exclude_capped=True, early_stop=True)
    group = group_of([1, 2, 3, 4, 5], stage=Stage.DECODING)
    for sample in group.samples[:2]:
        sample.stage = Stage.FINISHED
    assert rule.to_cancel(group, seed=0) == []
    group.samples[4].stage = Stage.FINISHED
    assert [s.sample_id for s in rule.to_cancel(group, seed=0)] == [2, 3]


def survivors_of(seed: int, *, group_id: int = 0) -> set[int]:
    group = group_of([1] * 8, stage=Stage.DECODING)
    group.group_id = group_id
    for sample in group.samples[:3]:
        sample.stage = Stage.FINISHED
    rule = Survivor(shortest=3, longest=2, weight_power=1.0)
    cancelled = {s.sample_id for s in rule.to_cancel(group, seed=seed)}
    assert len(cancelled) == 8 - 3 - 2
    assert group.survivors == {3, 4, 5, 6, 7} - cancelled
    assert rule.to_cancel(group, seed=seed) == []  # the draw is made once
    return set(group.survivors)


def test_the_survivor_draw_is_uniform_and_reproducible() -> None:
    assert survivors_of(5) == survivors_of(5)
    draws = [survivors_of(7, group_id=g) for g in range(2000)]
    share = np.array([np.mean([i in draw for draw in draws]) for i in range(3, 8)])
    assert np.abs(share - 2 / 5).max() < 4 * np.sqrt(0.4 * 0.6 / 2000)


def test_survivors_weigh_the_inverse_of_their_inclusion_probability_to_the_power() -> None:
    for power, expected in ((0.0, 1.0), (0.5, 2.5**0.5), (1.0, 2.5)):
        group = group_of([1] * 8)
        group.survivors = frozenset({4, 6})
        for index in (3, 5, 7):
            group.samples[index].stage = Stage.CANCELLING
        kept = Survivor(shortest=3, longest=2, weight_power=power).select(group)
        assert ids(kept) == [0, 1, 2, 4, 6]
        assert [weight for _, weight in kept] == pytest.approx([1, 1, 1, expected, expected])


def test_the_configuration_names_the_rule() -> None:
    assert isinstance(selection_rule(ShapingConfig(rule="none", launch=8)), KeepAll)
    assert isinstance(selection_rule(ShapingConfig()), DualEnd)
    assert isinstance(selection_rule(ShapingConfig(rule="survivor")), Survivor)
