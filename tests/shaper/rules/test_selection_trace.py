"""What each arm does to the length of responses, and how many prompts it leaves without a gradient, on real rollouts.

A step of policy gradient changes log pi(o) by its advantage times the learning rate, so to first order in that rate
the expected length of a prompt moves by `E[A l]`. Relative to the prompt's own mean length lbar that is, per unit of
rate and averaged over prompts,

    drift = mean over prompts of (1 / M) sum over the kept of A_i l_i / lbar

with A the group's normalised advantage and lbar over all 16 samples of the trace. Below zero the responses become
shorter. Standard errors are over prompts. At R = 16 a rule that draws no lots has one value, and it is the expected
one to its last digit, but for QLPO (-.0487, half a standard error off). At R = 10 the pool is a random part of each
prompt's 16, which alone moves a drift by .001; averaged over many such parts all arms come within .0003 of what is
expected, but for QLPO (-.0255, one standard error off).

The trace is data and not part of the project: `DARTS_TRACE` names it.
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from darts_async.advantage import group_advantages
from darts_async.config import RunConfig, ShapingConfig
from darts_async.shaper.estimates.planner import Planner
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.rules.selection import SelectionRule, selection_rule
from darts_async.shaper.token_accounts import StepStatistics
from launcher.display.length_notes import PAID_ON_THE_TRACE
from tests import ROOT
from tests.shaper.world import prompts

NEXT_TO_REPOSITORY = ROOT.parent / "shared/traces/dapo_math_7b.npz"
TRACE = Path(os.environ.get("DARTS_TRACE", NEXT_TO_REPOSITORY))
KEEP = 8
ARMS: dict[str, dict[str, object]] = {
    "random": {"rule": "random"},
    "shortest": {"rule": "shortest"},
    "dual end 7+1": {"rule": "dual_end"},
    "dual end 6+2": {"rule": "dual_end", "shortest": 6, "longest": 2},
    "qlpo": {"rule": "qlpo"},
    "dual end 7+1, guard": {"rule": "dual_end", "guard": True},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRACE.is_file(), reason=f"no trace at {TRACE}; DARTS_TRACE may name another place"),
]


@cache
def trace() -> tuple[np.ndarray, np.ndarray]:
    """Lengths in tokens and rewards, both [num_prompts, 16]."""
    with np.load(TRACE) as arrays:
        return arrays["lengths"], arrays["rewards"]


@cache
def pools(launch: int) -> tuple[Group, ...]:
    """One group of each prompt, all of its samples scored."""
    return fresh_pools(launch)


def fresh_pools(launch: int) -> tuple[Group, ...]:
    """The same, to be played with."""
    rng, prompt = np.random.default_rng(20), prompts(1)[0]
    groups = []
    for group_id, (lengths, rewards) in enumerate(zip(*trace(), strict=True)):
        chosen = rng.permutation(len(lengths))[:launch].tolist()
        samples = [
            Sample(i, Stage.SCORED, num_tokens=int(lengths[c]), finish_reason="stop", reward=float(rewards[c]))
            for i, c in enumerate(chosen)
        ]
        groups.append(Group(group_id, prompt, "train", samples))
    return tuple(groups)


@cache
def drift_and_zero_share(arm: str, launch: int) -> tuple[float, float, float]:
    """The drift, its standard error, and the share of prompts whose advantages are all zero."""
    rule = selection_rule(ShapingConfig.model_validate({"keep": KEEP, "launch": launch, **ARMS[arm]}))
    drifts, zeros = [], []
    for group, mean_length in zip(pools(launch), trace()[0].mean(1), strict=True):
        rule.to_cancel(group)
        kept = [sample for sample, _ in rule.select(group)]
        assert len(kept) == KEEP
        rewards = np.array([sample.reward for sample in kept], np.float32)
        advantages = group_advantages(rewards, np.ones(KEEP, np.float32), normalise=True)
        drifts.append(advantages @ np.array([sample.num_tokens for sample in kept]) / KEEP / mean_length)
        zeros.append(not advantages.any())
    return float(np.mean(drifts)), float(np.std(drifts) / np.sqrt(len(drifts))), float(np.mean(zeros))


@pytest.mark.parametrize(
    ("arm", "launch", "expected"),
    [
        ("random", 10, -0.0097),
        ("shortest", 10, -0.0014),
        ("dual end 7+1", 10, -0.0100),
        ("dual end 6+2", 10, -0.0114),
        ("qlpo", 10, -0.0237),
        ("dual end 7+1, guard", 10, -0.0104),
        ("random", 16, -0.0097),
        ("shortest", 16, 0.0019),
        ("dual end 7+1", 16, -0.0136),
        ("dual end 6+2", 16, -0.0170),
        ("qlpo", 16, -0.0495),
        ("dual end 7+1, guard", 16, -0.0149),
    ],
)
def test_the_length_drift_of_each_arm_is_the_measured_one(arm: str, launch: int, expected: float) -> None:
    drift, error, _ = drift_and_zero_share(arm, launch)
    assert error < 0.0025
    assert abs(drift - expected) < 2 * error, f"{drift:.5f} +- {error:.5f}"
    if launch == 16 and arm not in ("random", "qlpo"):
        assert drift == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arm", "percent"),
    [
        ("random", 52),
        ("shortest", 58),
        ("dual end 7+1", 55),
        ("dual end 6+2", 52),
        ("qlpo", 56),
        ("dual end 7+1, guard", 41),
    ],
)
def test_the_share_of_prompts_without_a_gradient_is_the_measured_one(arm: str, percent: int) -> None:
    share = drift_and_zero_share(arm, 16)[2]
    error = np.sqrt(share * (1 - share) / len(pools(16)))
    assert abs(share - percent / 100) < error, f"{share:.4f} +- {error:.4f}"


def played(rule: SelectionRule, group: Group) -> list[tuple[Sample, float]]:
    """The samples finish by length, and are scored at once."""
    for sample in group.samples:
        sample.stage = Stage.DECODING
    for sample in sorted(group.samples, key=lambda s: s.num_tokens):
        if sample.stage is Stage.DECODING:
            group.finish(sample, "stop")
            sample.stage = Stage.SCORED
            for cancelled in rule.to_cancel(group):
                cancelled.stage, cancelled.reward = Stage.ENDED, None
    return rule.select(group)


@pytest.mark.parametrize(("setting", "expected"), PAID_ON_THE_TRACE.items())
def test_what_a_rule_pays_for_length_is_what_the_dry_run_says(
    setting: tuple[str, str, int, float], expected: float
) -> None:
    rule, ends, launch, power = setting
    shortest, longest = map(int, ends.split("+")) if ends else (7, 1)
    baseline = "leave_one_out" if power == 1 else "group"
    shaping = {"rule": rule, "keep": KEEP, "launch": launch, "shortest": shortest, "longest": longest}
    config = RunConfig.model_validate({"shaping": {**shaping, "weight_power": power, "baseline": baseline}})
    statistics, planner = StepStatistics(), Planner(config)
    for group in fresh_pools(launch):
        group.weights = {sample.sample_id: weight for sample, weight in played(planner.rule(group), group)}
        statistics.completed(group, None)
        for sample in group.samples:
            sample.oldest_version = 0
        metrics = statistics.close(0, [group], [planner.counts(group)])
    assert metrics["run/pays_for_length"] == pytest.approx(expected, abs=0.015)


def test_shortest_alone_takes_the_pressure_on_length_away_and_the_long_end_brings_it_back() -> None:
    for launch in (10, 16):
        shortest, dual_end = drift_and_zero_share("shortest", launch), drift_and_zero_share("dual end 7+1", launch)
        assert dual_end[0] + 3 * dual_end[1] < shortest[0]
