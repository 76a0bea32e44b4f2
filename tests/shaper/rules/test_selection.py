"""Which samples are kept, by each rule, and that the survivors' sums are unbiased."""

from functools import cache
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from darts_async.advantage import Decoded, group_advantages, leave_one_out
from darts_async.config import ShapingConfig
from darts_async.protocol import FinishReason
from darts_async.shaper.group import Group, Sample, Stage, train_group
from darts_async.shaper.rules.length_rules import DualEnd, Order, Quadrants
from darts_async.shaper.rules.selection import RandomKeep, SelectionRule, Survivor, selection_rule
from darts_async.shaper.rules.signal_guard import split_by_reward
from tests.learner.world import gradients, make_group, make_trainer
from tests.shaper.world import prompts

PROMPT = prompts(1)[0]
ORDERS: tuple[Order, ...] = ("tokens", "completion")
ARMS = ("none", "random", "shortest", "longest", "dual_end", "survivor", "qlpo")


def group_of(
    lengths: list[int],
    rewards: list[float] | None = None,
    *,
    capped: frozenset[int] = frozenset(),
    stage: Stage = Stage.SCORED,
) -> Group:
    samples = [
        Sample(i, stage=stage, num_tokens=n, finish_reason="length" if i in capped else "stop", reward=r)
        for i, (n, r) in enumerate(zip(lengths, rewards or [0.0] * len(lengths), strict=True))
    ]
    return Group(0, PROMPT, "train", samples)


def finished(group: Group, order: list[int]) -> None:
    """Say that the samples finished in this order, and the others did not."""
    for rank, index in enumerate(order):
        group.samples[index].finish_rank = rank


def ids(kept: list[tuple[Sample, float]]) -> list[int]:
    return [sample.sample_id for sample, _ in kept]


def dual_end(
    shortest: int, longest: int, *, exclude_capped: bool = True, early_stop: bool = False, guard: bool = False
) -> DualEnd:
    return DualEnd(shortest, longest, exclude_capped=exclude_capped, early_stop=early_stop, guard=guard)


def play(rule: SelectionRule, group: Group, order: list[int]) -> list[tuple[Sample, float]]:
    """Let the samples finish in this order, each scored at once, and select when nobody runs."""
    reasons: list[FinishReason] = [sample.finish_reason or "stop" for sample in group.samples]
    for sample in group.samples:
        sample.stage, sample.finish_rank = Stage.DECODING, None
    group.num_finished = 0
    for index in order:
        sample = group.samples[index]
        if sample.stage is Stage.DECODING:
            group.finish(sample, reasons[index])
            for loser in rule.to_cancel(group):
                loser.stage = Stage.CANCELLING
            sample.stage = Stage.SCORED
            for loser in rule.to_cancel(group):
                loser.stage = Stage.CANCELLING
    return rule.select(group)


# --- the ends ------------------------------------------------------------------------------------------------


def test_dual_end_keeps_the_shortest_and_the_longest_in_launch_order() -> None:
    assert ids(dual_end(2, 1).select(group_of([50, 10, 40, 90, 20]))) == [1, 3, 4]


def test_dual_end_passes_over_capped_samples_unless_too_few_others_are_left() -> None:
    lengths = [50, 10, 99, 99, 20]
    assert ids(dual_end(2, 1).select(group_of(lengths, capped=frozenset({2, 3})))) == [0, 1, 4]
    assert ids(dual_end(2, 1).select(group_of(lengths, capped=frozenset({0, 2, 3})))) == [0, 1, 4]
    with_capped = dual_end(2, 1, exclude_capped=False)
    assert ids(with_capped.select(group_of(lengths, capped=frozenset({2, 3})))) == [1, 3, 4]


def test_shortest_and_longest_are_one_end_alone() -> None:
    group = group_of([50, 10, 40, 90, 20, 30])
    config = ShapingConfig(rule="shortest", keep=3, launch=6)
    assert ids(selection_rule(config).select(group)) == [1, 4, 5]
    assert ids(selection_rule(config.model_copy(update={"rule": "longest"})).select(group)) == [0, 2, 3]


@given(st.lists(st.integers(1, 50), min_size=4, max_size=20), st.integers(0, 4))
def test_dual_end_keeps_exactly_k_plus_l_and_nothing_kept_is_between_the_ends(lengths: list[int], longest: int) -> None:
    kept = ids(dual_end(4 - longest, longest).select(group_of(lengths)))
    assert len(kept) == 4
    assert kept == sorted(kept)
    ordered = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    assert set(kept) == set(ordered[: 4 - longest]) | set(ordered[len(ordered) - longest :])


def test_early_stop_cancels_everybody_who_runs_when_m_have_finished_that_may_have_a_reward() -> None:
    rule = dual_end(2, 1, early_stop=True)
    group = group_of([1, 2, 3, 4, 5], stage=Stage.DECODING)
    for sample in group.samples[:2]:
        group.finish(sample, "stop")
    assert rule.to_cancel(group) == []
    group.finish(group.samples[4], "stop")
    group.samples[4].stage = Stage.UNSCORABLE
    assert rule.to_cancel(group) == []
    group.finish(group.samples[3], "stop")
    assert [s.sample_id for s in rule.to_cancel(group)] == [2]


@pytest.mark.slow
@given(st.permutations(range(8)), st.booleans())
def test_completion_order_is_token_order_where_samples_start_together_and_decode_at_one_speed(
    lengths: list[int], exclude_capped: bool
) -> None:
    order = sorted(range(8), key=lambda i: lengths[i])
    by_tokens, by_completion = (DualEnd(3, 1, exclude_capped, early_stop=False, order=o) for o in ORDERS)
    group = group_of(lengths, capped=frozenset({2}))
    assert ids(play(by_tokens, group, order)) == ids(play(by_completion, group, order))


def test_completion_order_prefers_whoever_started_early_or_ran_fast() -> None:
    lengths = [10, 40, 30, 20]
    finished = [1, 2, 0, 3]  # sample 0 had to wait for a slot, and sample 3 ran on a slow replica
    by_tokens, by_completion = (DualEnd(2, 0, exclude_capped=True, early_stop=False, order=o) for o in ORDERS)
    assert ids(play(by_tokens, group_of(lengths), finished)) == [0, 3]
    assert ids(play(by_completion, group_of(lengths), finished)) == [1, 2]


# --- by lot --------------------------------------------------------------------------------------------------


def test_random_keeps_every_sample_equally_often_and_reproducibly() -> None:
    def kept(seed: int, group_id: int) -> list[int]:
        group = group_of([1] * 6)
        group.group_id = group_id
        return ids(play(RandomKeep(2, seed=seed), group, list(range(6))))

    assert kept(5, 3) == kept(5, 3)
    draws = [kept(7, group_id) for group_id in range(2000)]
    share = np.array([np.mean([i in draw for draw in draws]) for i in range(6)])
    assert np.abs(share - 1 / 3).max() < 4 * np.sqrt(1 / 3 * 2 / 3 / 2000)


def test_random_gives_the_place_of_a_sample_without_reward_to_the_next_lot() -> None:
    group = group_of([1] * 4)
    line = [ids(RandomKeep(count + 1).select(group)) for count in range(3)]
    (first,) = line[0]
    group.samples[first].stage = Stage.UNSCORABLE
    assert ids(RandomKeep(2).select(group)) == sorted(set(line[2]) - {first})


# --- survivors -----------------------------------------------------------------------------------------------


def survivors_of(seed: int, *, group_id: int = 0) -> set[int]:
    group = group_of([1] * 8, stage=Stage.DECODING)
    group.group_id = group_id
    for sample in group.samples[:3]:
        group.finish(sample, "stop")
    rule = Survivor(shortest=3, longest=2, weight_power=1.0, seed=seed)
    losers = rule.to_cancel(group)
    assert len(losers) == 8 - 3 - 2
    for loser in losers:
        loser.stage = Stage.CANCELLING
    assert rule.to_cancel(group) == []  # the draw is made once
    survivors = group.samples[3:]
    return {sample.sample_id for sample in survivors if sample not in losers}


def test_the_survivor_draw_is_uniform_and_reproducible() -> None:
    assert survivors_of(5) == survivors_of(5)
    draws = [survivors_of(7, group_id=g) for g in range(2000)]
    share = np.array([np.mean([i in draw for draw in draws]) for i in range(3, 8)])
    assert np.abs(share - 2 / 5).max() < 4 * np.sqrt(0.4 * 0.6 / 2000)


def test_survivors_weigh_the_inverse_of_their_inclusion_probability_to_the_power() -> None:
    for power, expected in ((0.0, 1.0), (0.5, 2.5**0.5), (1.0, 2.5)):
        group = group_of([1] * 8)
        finished(group, [0, 1, 2, 4, 6])
        for index in (3, 5, 7):
            group.samples[index].stage = Stage.CANCELLING
        kept = Survivor(shortest=3, longest=2, weight_power=power).select(group)
        assert ids(kept) == [0, 1, 2, 4, 6]
        scale = 5 / (3 + 2 * expected)
        assert [weight for _, weight in kept] == pytest.approx([scale] * 3 + [scale * expected] * 2)


OUTCOME_LENGTHS = np.array([1, 2, 2])
OUTCOME_REWARDS = np.array([0.25, 0.0, 1.0])
POLICY = np.array([0.2, 0.3, 0.5])
SCORES = np.eye(3) - POLICY  # gradient of log softmax at each outcome, by logit
LAUNCHED, HEAD, SURVIVORS = 4, 1, 2
KEPT = HEAD + SURVIVORS


def finish_orders(outcomes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All orders, the shorter first, those of one length in any order."""
    lengths = OUTCOME_LENGTHS[list(outcomes)]
    orders = permutations(range(len(outcomes)))
    return [order for order in orders if np.all(np.diff(lengths[list(order)]) >= 0)]


@cache
def survivor_worlds(launched: int = LAUNCHED) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Every group, finish order and draw: its probability, the outcomes kept and their weights."""
    rule, worlds = Survivor(HEAD, SURVIVORS, weight_power=1.0), []
    for outcomes in product(range(3), repeat=launched):
        orders = finish_orders(outcomes)
        for order in orders:
            draws = list(combinations(order[HEAD:], SURVIVORS))
            for draw in draws:
                group = group_of([int(OUTCOME_LENGTHS[o]) for o in outcomes], stage=Stage.CANCELLING)
                finished(group, [*order[:HEAD], *draw])
                for index in (*order[:HEAD], *draw):
                    group.samples[index].stage = Stage.SCORED
                kept = rule.select(group)
                probability = float(POLICY[list(outcomes)].prod()) / len(orders) / len(draws)
                chosen, weights = [outcomes[i] for i in ids(kept)], [weight for _, weight in kept]
                worlds.append((probability, np.array(chosen), np.array(weights)))
    return worlds


def expected_gradient(baseline: str, launched: int = LAUNCHED, num_scored: int = KEPT) -> np.ndarray:
    """Whichever `num_scored` of those that were decoded have a reward."""
    total, draws = np.zeros(3), [list(draw) for draw in combinations(range(KEPT), num_scored)]
    for probability, decoded, all_weights in survivor_worlds(launched):
        for draw in draws:
            outcomes, weights = decoded[draw], all_weights[draw]
            rewards = OUTCOME_REWARDS[outcomes]
            better = {
                "none": lambda r, w: r,
                "history": lambda r, w: r - 0.37,
                "group": lambda r, w: r - w @ r / w.sum(),
                "leave_one_out": lambda r, w: leave_one_out(r, w, Decoded(HEAD, SURVIVORS)),
            }[baseline](rewards, weights)
            total += probability / len(draws) * (weights * better) @ SCORES[outcomes]
    return total


def test_weighted_survivor_sums_are_unbiased() -> None:
    assert sum(probability for probability, _, _ in survivor_worlds()) == pytest.approx(1, abs=1e-12)
    anything = np.array([3.7, -1.1, 8.9]) * OUTCOME_REWARDS + OUTCOME_LENGTHS**2
    estimate = sum(probability * weights @ anything[outcomes] for probability, outcomes, weights in survivor_worlds())
    assert estimate == pytest.approx(KEPT * POLICY @ anything, abs=1e-12)


def test_weighted_survivor_sums_are_unbiased_too_where_rewards_fail_for_reasons_of_their_own() -> None:
    """Whichever two of the three samples that were decoded have a reward: 2/3 of the sum over all, in expectation."""
    anything = np.array([3.7, -1.1, 8.9]) * OUTCOME_REWARDS + OUTCOME_LENGTHS**2
    for num_scored in (1, 2):
        draws = list(combinations(range(HEAD + SURVIVORS), num_scored))
        estimate = sum(
            probability / len(draws) * weights[list(draw)] @ anything[outcomes[list(draw)]]
            for probability, outcomes, weights in survivor_worlds()
            for draw in draws
        )
        share = num_scored / (HEAD + SURVIVORS)
        assert estimate == pytest.approx(share * KEPT * POLICY @ anything, abs=1e-12)


def test_a_survivor_that_has_no_reward_changes_no_weight() -> None:
    group = group_of([1] * 8)
    finished(group, [0, 1, 2, 4, 6])
    for index in (3, 5, 7):
        group.samples[index].stage = Stage.CANCELLING
    for index in (0, 6):
        group.samples[index].stage = Stage.UNSCORABLE
    kept = Survivor(shortest=3, longest=2, weight_power=1.0).select(group)
    assert [(s.sample_id, weight) for s, weight in kept] == [(1, 0.625), (2, 0.625), (4, 1.5625)]


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_keeps_all_that_is_left_where_rewards_failed(name: str) -> None:
    config = ShapingConfig.model_validate({"rule": name, "keep": 4, "launch": 4, "shortest": 3, "longest": 1})
    group, rule = group_of([5, 3, 9, 7], [0.0, 1.0, 0.0, 1.0]), selection_rule(config)
    play(rule, group, [1, 0, 3, 2])
    group.samples[3].stage = Stage.UNSCORABLE
    assert rule.select(group) == [(sample, 1.0) for sample in group.samples[:3]]


@pytest.mark.parametrize("launched", [KEPT, LAUNCHED, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("baseline", ["none", "history", "leave_one_out"])
def test_the_policy_gradient_of_weighted_survivors_is_unbiased(baseline: str, launched: int) -> None:
    """And the same however many samples a prompt was launched with: it counts as much as any other."""
    exact = KEPT * (POLICY * OUTCOME_REWARDS) @ SCORES
    np.testing.assert_allclose(expected_gradient(baseline, launched), exact, atol=1e-12)


@pytest.mark.parametrize("launched", [KEPT, LAUNCHED, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("baseline", ["none", "history", "leave_one_out"])
def test_it_is_unbiased_too_where_rewards_failed(baseline: str, launched: int) -> None:
    """Two of the three that were decoded have a reward, and count for two thirds of a group."""
    exact = KEPT * (POLICY * OUTCOME_REWARDS) @ SCORES
    np.testing.assert_allclose(expected_gradient(baseline, launched, 2), 2 / 3 * exact, atol=1e-12)


def test_the_group_mean_as_baseline_makes_it_biased_by_more_than_a_factor() -> None:
    exact = KEPT * (POLICY * OUTCOME_REWARDS) @ SCORES
    biased = expected_gradient("group")
    best_factor = biased @ exact / (exact @ exact)
    assert np.abs(biased - best_factor * exact).max() > 1e-2 * np.abs(exact).max()


# --- quadrants -----------------------------------------------------------------------------------------------


def test_qlpo_keeps_short_right_and_long_wrong_ones_and_some_of_the_other_ends() -> None:
    lengths = list(range(1, 17))  # the right ones are 1 .. 8 long, the wrong ones 9 .. 16
    group = group_of(lengths, [1.0] * 8 + [0.0] * 8)
    # N+ = N- = 4: ceil(4 / (4 / 3)) = 3 from one end, 1 from the other
    assert [s.num_tokens for s, _ in Quadrants(8, 1 / 3).select(group)] == [1, 2, 3, 8, 9, 14, 15, 16]
    # alpha = 1: halves
    assert [s.num_tokens for s, _ in Quadrants(8, 1.0).select(group)] == [1, 2, 7, 8, 9, 10, 15, 16]


def test_qlpo_keeps_the_proportion_of_the_pool() -> None:
    group = group_of(list(range(10)), [1.0] * 2 + [0.0] * 8)
    # N+ = round(4 * 2 / 10) = 1; N- = 3: ceil(9 / 4) = 3 longest
    assert ids(Quadrants(4, 1 / 3).select(group)) == [0, 7, 8, 9]


def test_qlpo_rounds_a_rare_kind_away_and_its_guard_does_not() -> None:
    lengths, rewards = list(range(16)), [0.0] * 5 + [1.0] + [0.0] * 10
    assert ids(Quadrants(8, 1 / 3).select(group_of(lengths, rewards))) == [0, 1, 10, 11, 12, 13, 14, 15]
    guarded = Quadrants(8, 1 / 3, guard=True)
    assert ids(guarded.select(group_of(lengths, rewards))) == [0, 5, 10, 11, 12, 13, 14, 15]


# --- the guard -----------------------------------------------------------------------------------------------


def test_the_guard_exchanges_the_kth_shortest_for_the_shortest_of_the_missing_kind() -> None:
    lengths = [10, 20, 30, 40, 50, 60]
    rewards = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert ids(dual_end(2, 1).select(group_of(lengths, rewards))) == [0, 1, 5]
    assert ids(dual_end(2, 1, guard=True).select(group_of(lengths, rewards))) == [0, 3, 5]


def test_the_guard_exchanges_at_the_long_end_where_that_is_the_larger() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert ids(dual_end(1, 2, guard=True).select(group_of([10, 20, 30, 40, 50, 60], rewards))) == [0, 2, 5]


def test_the_guard_takes_a_capped_sample_only_if_no_other_is_of_the_missing_kind() -> None:
    rule, lengths = dual_end(1, 2, guard=True), [10, 20, 30, 40, 50, 60, 99]
    rewards = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]  # the capped one is nearer to 50, which gives way
    assert ids(rule.select(group_of(lengths, rewards, capped=frozenset({6})))) == [0, 1, 5]
    rewards[1] = 1.0
    assert ids(rule.select(group_of(lengths, rewards, capped=frozenset({6})))) == [0, 5, 6]


def test_the_guard_changes_nothing_where_both_kinds_are_kept_or_only_one_exists() -> None:
    lengths = [10, 20, 30, 40, 50]
    for rewards in ([1.0, 0.0, 0.0, 1.0, 1.0], [0.0] * 5, [1.0] * 5):
        group = group_of(lengths, rewards)
        assert dual_end(2, 1, guard=True).select(group) == dual_end(2, 1).select(group)


def test_the_guard_of_random_exchanges_the_last_that_is_kept_for_the_next_of_the_missing_kind() -> None:
    group = group_of([1] * 6)
    line: list[int] = []  # the order that was drawn
    for count in range(1, 7):
        line += set(ids(RandomKeep(count, seed=4).select(group))) - set(line)
    for place, index in enumerate(line):
        group.samples[index].reward = 1.0 if place < 4 else 0.0
    kept = RandomKeep(3, guard=True, seed=4).select(group)
    assert set(ids(kept)) == {line[place] for place in (0, 1, 4)}


@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, -5.0, 0.1 + 2**-56]), max_size=12))
def test_rewards_split_into_two_kinds_as_soon_as_two_differ(rewards: list[float]) -> None:
    right, wrong = split_by_reward(group_of([1] * len(rewards), rewards).samples)
    assert len(right) + len(wrong) == len(rewards)
    assert (bool(right) and bool(wrong)) == (len(set(rewards)) > 1)
    assert all((r.reward or 0) > (w.reward or 0) for r in right for w in wrong)


def test_right_is_a_reward_of_at_least_the_mean_of_the_pool() -> None:
    right, wrong = split_by_reward(group_of([1] * 4, [0.0, 0.5, 0.25, 0.25]).samples)  # mean 0.25
    assert [s.sample_id for s in right] == [1, 2, 3]
    assert [s.sample_id for s in wrong] == [0]
    assert split_by_reward(group_of([1], [-1.0]).samples)[0] == []


# --- every arm -----------------------------------------------------------------------------------------------


def arm(name: str, launch: int, *, guard: bool = False, shortest: int = 3, **settings: object) -> SelectionRule:
    keep = launch if name == "none" else 4
    values = {"rule": name, "keep": keep, "launch": launch, "shortest": shortest, "longest": keep - shortest}
    return selection_rule(ShapingConfig.model_validate({**values, "guard": guard, **settings}))


SAMPLES = st.tuples(st.integers(1, 9), st.sampled_from([0.0, 1.0, 0.3]), st.booleans())


@pytest.mark.slow
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("name", ARMS)
@given(
    samples=st.lists(SAMPLES, min_size=4, max_size=12),
    shortest=st.integers(1, 4),
    order=st.sampled_from(ORDERS),
    early_stop=st.booleans(),
    data=st.data(),
)
def test_every_arm_keeps_exactly_m_in_launch_order(
    name: str,
    guard: bool,
    samples: list[tuple[int, float, bool]],
    shortest: int,
    order: str,
    early_stop: bool,
    data: st.DataObject,
) -> None:
    lengths, rewards, capped = zip(*samples, strict=True)
    group = group_of(list(lengths), list(rewards), capped=frozenset(i for i, cut in enumerate(capped) if cut))
    if name == "none":
        shortest = len(samples)
    rule = arm(name, len(samples), guard=guard, shortest=shortest, order=order, early_stop=early_stop)
    kept = play(rule, group, data.draw(st.permutations(range(len(samples)))))
    assert len(kept) == (len(samples) if name == "none" else 4)
    assert ids(kept) == sorted(set(ids(kept)))
    pool = group.at(Stage.SCORED)
    if guard:
        chosen = {sample for sample, _ in kept}
        assert all(not chosen.isdisjoint(kind) for kind in split_by_reward(pool) if kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", [a for a in ARMS if a not in ("none", "survivor")])
@given(samples=st.lists(SAMPLES, min_size=4, max_size=12), shortest=st.integers(0, 4))
def test_the_guard_exchanges_at_most_one_sample(
    name: str, samples: list[tuple[int, float, bool]], shortest: int
) -> None:
    lengths, rewards, capped = zip(*samples, strict=True)
    group = group_of(list(lengths), list(rewards), capped=frozenset(i for i, cut in enumerate(capped) if cut))
    everybody = list(range(len(samples)))
    plain = {s for s, _ in play(arm(name, len(samples), shortest=shortest), group, everybody)}
    guarded = {s for s, _ in play(arm(name, len(samples), shortest=shortest, guard=True), group, everybody)}
    signal_lost = any(kind and plain.isdisjoint(kind) for kind in split_by_reward(group.at(Stage.SCORED)))
    assert len(guarded - plain) == int(signal_lost)


@pytest.mark.parametrize("settings", [{}, {"guard": True}, {"order": "completion"}, {"early_stop": True}])
@pytest.mark.parametrize("name", ARMS)
def test_with_as_many_launched_as_kept_every_arm_is_plain_grpo_bit_for_bit(
    name: str, settings: dict[str, object]
) -> None:
    for longest, power in ((1, 0.7), (2, 1.0)):
        shaping = {"rule": name, "keep": 4, "launch": 4, "shortest": 4 - longest, "longest": longest, **settings}
        baseline = "leave_one_out" if power == 1 else "group"
        config = ShapingConfig.model_validate({**shaping, "weight_power": power, "baseline": baseline})
        group = group_of([5, 3, 9, 9], [0.1, 0.0, 1.0, 1.0], capped=frozenset({2}))
        kept = play(selection_rule(config), group, [3, 1, 0, 2])
        assert kept == [(sample, 1.0) for sample in group.samples]
        trained, plain = as_trained(group, kept), as_trained(group, [(s, 1.0) for s in group.samples])
        np.testing.assert_array_equal(trained[0], plain[0])
        for rewards, weights in (trained, plain):
            advantages = group_advantages(rewards, weights, normalise=True, baseline=config.baseline)
            expected = group_advantages(plain[0], np.ones(4, np.float32), normalise=True, baseline=config.baseline)
            assert advantages.tobytes() == expected.tobytes()


@pytest.mark.slow
def test_with_as_many_launched_as_kept_the_gradient_of_every_arm_is_that_of_plain_grpo_bit_for_bit() -> None:
    recorded = make_group([5, 3, 9, 7], rewards=[0.1, 0.0, 1.0, 1.0])
    ends = np.cumsum(recorded.num_tokens).tolist()

    def gradient(name: str) -> dict[str, bytes]:
        group = group_of(recorded.num_tokens.tolist(), recorded.rewards.tolist())
        for sample, begin, end in zip(group.samples, [0, *ends], ends, strict=False):
            sample.append(0, recorded.token_ids[begin:end], recorded.logprobs[begin:end])
            sample.num_tokens = end - begin
        shaping = {"rule": name, "keep": 4, "launch": 4, "shortest": 3, "longest": 1}
        kept = play(selection_rule(ShapingConfig.model_validate(shaping)), group, [1, 0, 3, 2])
        group.weights, group.step = {sample.sample_id: weight for sample, weight in kept}, 0
        trainer = make_trainer()
        trainer.add_groups([train_group(group)])
        return {name: tensor.numpy().tobytes() for name, tensor in gradients(trainer).items()}

    plain = gradient("none")
    assert any(any(tensor) for tensor in plain.values())
    for name in ARMS:
        assert gradient(name) == plain, name


def as_trained(group: Group, kept: list[tuple[Sample, float]]) -> tuple[np.ndarray, np.ndarray]:
    for sample in group.samples:
        sample.chunks = [(0, np.zeros(sample.num_tokens, np.int32), np.zeros(sample.num_tokens, np.float32))]
    group.weights, group.step = {sample.sample_id: weight for sample, weight in kept}, 0
    message = train_group(group)
    return message.rewards, message.weights


def test_a_shipped_group_carries_the_pass_rate_that_it_was_opened_with() -> None:
    group = group_of([2, 3], [0.0, 1.0])
    as_trained(group, [(sample, 1.0) for sample in group.samples])
    assert train_group(group).baseline is None
    group.baseline = 0.375
    assert train_group(group).baseline == 0.375


# --- the configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("none", dual_end(8, 0)),
        ("random", RandomKeep(8)),
        ("shortest", dual_end(8, 0, early_stop=True)),
        ("longest", dual_end(0, 8)),
        ("dual_end", dual_end(7, 1, early_stop=True)),
        ("survivor", Survivor(7, 1, 0.0)),
        ("qlpo", Quadrants(8, 1 / 3)),
    ],
)
def test_one_setting_names_the_arm(name: str, rule: SelectionRule) -> None:
    launch = 8 if name == "none" else 10
    config = ShapingConfig.model_validate({"rule": name, "launch": launch, "early_stop": True})
    assert selection_rule(config) == rule


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 9}, ["shortest (7)", "longest (1)", "keep is 9"]),
        ({"rule": "survivor", "shortest": 5}, ["shortest (5)", "longest (1)", "keep is 8"]),
        ({"launch": 7}, ["launch (7)", "keep (8)"]),
        ({"rule": "qlpo", "launch": 7}, ["launch (7)", "keep (8)"]),
        ({"rule": "none"}, ["launch is 10", "keep is 8"]),
        ({"rule": "dual_ends"}, ["dual_ends", "'dual_end'", "'qlpo'"]),
        ({"rule": "survivor", "shortest": 0, "longest": 8}, ["survivor", "shortest", "is 0"]),
        ({"rule": "survivor", "weight_power": 1.0}, ["weight_power 1", "baseline group"]),
        (
            {"rule": "survivor", "weight_power": 1.0, "baseline": "leave_one_out"},
            ["leave_one_out", "weight_power 1", "longest", "it is 1"],
        ),
        (
            {"rule": "survivor", "weight_power": 0.5, "baseline": "leave_one_out"},
            ["leave_one_out", "weight_power is 0.5"],
        ),
        (
            {"rule": "survivor", "weight_power": 0.5, "shortest": 8, "longest": 0},
            ["weight_power is 0.5", "longest is 0"],
        ),
        ({"rule": "random", "keep": 1, "guard": True}, ["guard", "keep is 1"]),
        ({"rule": "random", "keep": 1, "baseline": "leave_one_out"}, ["leave_one_out", "keep is 1"]),
        ({"rule": "none", "launch": 8, "redundancy": {"total": "fixed"}}, ["redundancy.total", "'fixed'", "rule none"]),
        ({"launch": 17, "redundancy": {"total": "fixed"}}, ["launch (17)", "twice shaping.keep (8)"]),
        ({"redundancy": {"split": "papers"}}, ["papers", "'paper'", "'reward_aware'"]),
        ({"redundancy": {"batch": 0}}, ["redundancy.batch", "greater than 0"]),
        ({"redundancy": {"latency_elasticity": 1.5}}, ["latency_elasticity", "1.5"]),
        ({"rule": "none", "launch": 8, "pruning": {"mode": "hazard"}}, ["pruning.mode", "'hazard'", "rule none"]),
        ({"pruning": {"mode": "saturation"}}, ["saturation", "twice shaping.keep (8)", "launch is 10"]),
        ({"rule": "survivor", "weight_power": 0.5, "pruning": {"mode": "hazard"}}, ["hazard", "weight_power", "0.5"]),
        (
            {"baseline": "leave_one_out", "pruning": {"mode": "hazard"}},
            ["hazard", "leave_one_out", "spare_probability"],
        ),
        (
            {"rule": "random", "baseline": "leave_one_out", "pruning": {"mode": "hazard", "spare_probability": 0.5}},
            ["hazard", "leave_one_out", "0.5"],
        ),
        ({"rule": "qlpo", "keep": 4, "pruning": {"mode": "hazard"}}, ["hazard", "shortest (7)", "keep (4)"]),
        ({"pruning": {"threshold": 0}}, ["threshold", "greater than 0"]),
        ({"rule": "qlpo", "qlpo_alpha": -0.5}, ["qlpo_alpha", "-0.5"]),
        ({"weight_power": 1.5}, ["weight_power", "1.5"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_both_values(
    settings: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ValidationError) as refusal:
        ShapingConfig.model_validate(settings)
    assert [word for word in words if word not in str(refusal.value)] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_power": 1.0, "baseline": "history"},
        {"weight_power": 1.0, "baseline": "leave_one_out", "shortest": 6, "longest": 2},
        {"weight_power": 0.7},
        {"baseline": "leave_one_out"},
        {"baseline": "leave_one_out", "pruning": {"mode": "hazard", "spare_probability": 0.0}},
        {"baseline": "history", "pruning": {"mode": "hazard"}},
    ],
)
def test_baselines_that_fit_the_weights_are_accepted(settings: dict[str, object]) -> None:
    assert ShapingConfig.model_validate({"rule": "survivor", **settings}).rule == "survivor"
