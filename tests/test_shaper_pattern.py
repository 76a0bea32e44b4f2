"""Whether short responses are right more often: what groups have to show, and what follows from it."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.config import RunConfig
from darts_async.shaper.pattern import Pattern
from darts_async.simulation import LengthModel, LognormalWorkload, SimulationResult, simulate

GROUPS = st.lists(
    st.lists(st.tuples(st.integers(1, 1 << 15), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12),
    max_size=200,
)


def observe(pattern: Pattern, rng: random.Random, correlation: float, num_groups: int) -> None:
    """Groups of 8 in which a sample that is longer by a standard deviation is right more or less often."""
    for _ in range(num_groups):
        spread = [rng.gauss(0, 1) for _ in range(8)]
        rewards = [float(rng.gauss(0, 1) + correlation * z > 0) for z in spread]
        pattern.observe([round(500 * 2**z) for z in spread], rewards)
        pattern.validate()


def test_it_is_seen_and_seen_to_be_over() -> None:
    pattern, rng = Pattern(), random.Random(0)
    observe(pattern, rng, -1.0, 5)
    assert not pattern.short_is_right, "five groups are no evidence"
    observe(pattern, rng, -1.0, 15)
    assert pattern.short_is_right
    observe(pattern, rng, +1.0, 100)
    assert not pattern.short_is_right
    observe(pattern, rng, -1.0, 200)
    assert pattern.short_is_right


@pytest.mark.parametrize(("correlation", "low", "high"), [(0.0, 0.0, 0.12), (0.5, 0.0, 0.01), (-0.5, 0.95, 1.0)])
def test_chance_is_seldom_taken_for_it(correlation: float, low: float, high: float) -> None:
    """Share of the time that it is said, over 40 runs of 150 groups."""
    shares = []
    for seed in range(40):
        pattern, rng = Pattern(), random.Random(seed)
        for _ in range(15):
            observe(pattern, rng, correlation, 10)
            shares.append(pattern.short_is_right)
    assert low <= sum(shares[40:]) / len(shares[40:]) <= high


def test_groups_without_a_difference_say_nothing() -> None:
    pattern = Pattern()
    for rewards in ([1.0] * 8, [0.0] * 8, [1.0], []):
        pattern.observe([100 * (place + 1) for place in range(len(rewards))], rewards)
    assert pattern == Pattern()


def test_evidence_that_does_not_vary_is_finite() -> None:
    pattern = Pattern()
    for _ in range(20):
        pattern.observe([100, 200], [1.0, 0.0])
    assert pattern.short_is_right
    assert -1e9 < pattern.evidence < -2


@given(groups=GROUPS)
def test_whatever_comes(groups: list[list[tuple[int, float]]]) -> None:
    pattern = Pattern()
    for group in groups:
        pattern.observe([length for length, _ in group], [reward for _, reward in group])
        pattern.validate()
        assert abs(pattern.evidence) < 1e12
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(pattern)), Pattern) == pattern


def simulated(rule: str, correlation: float, when: str, redundancy: str = "off") -> SimulationResult:
    config = RunConfig.model_validate(
        {
            "learner": {"steps": 30, "groups_per_step": 8},
            "shaping": {"rule": rule, "keep": 8, "launch": 12, "shortest": 6, "longest": 2, "when": when}
            | {"redundancy": {"total": redundancy, "batch": 8}},
            "generator": {"num_slots": 64, "max_context_tokens": 1 << 15},
            "sampling": {"max_new_tokens": 1 << 14},
            "staleness": {"cut_after_s": 1e6},
            "evaluation": {"samples_per_prompt": 0},
        }
    )
    model = LengthModel(
        pass_rate_a=4.0, pass_rate_b=4.0, reward_correlation_mean=correlation, reward_correlation_sd=0.1
    )
    return simulate(config, LognormalWorkload(model, seed=3), num_prompts=120)


@pytest.mark.parametrize("rule", ["qlpo", "survivor", "dual_end"])
def test_a_run_launches_more_once_it_pays(rule: str) -> None:
    launched = simulated(rule, -0.6, "short_is_right").launched
    assert set(launched) == {8, 12}
    assert launched[12] > 2 * launched[8]


@pytest.mark.parametrize("redundancy", ["off", "fixed"])
def test_a_run_trains_all_that_it_launches_where_long_is_right(redundancy: str) -> None:
    found = simulated("qlpo", +0.6, "short_is_right", redundancy)
    assert set(found.launched) == {8}
    assert found.tokens_by_fate["trained"] == found.num_tokens_decoded
    assert 8 not in simulated("qlpo", +0.6, "always").launched


def test_a_rule_that_launches_what_it_trains_has_no_use_for_it() -> None:
    with pytest.raises(ValueError, match=r"shaping.when is 'short_is_right', but shaping.rule none"):
        RunConfig.model_validate({"shaping": {"rule": "none", "keep": 8, "launch": 8, "when": "short_is_right"}})
