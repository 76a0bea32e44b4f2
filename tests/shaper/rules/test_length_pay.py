"""What selections pay for length, by hand and by enumeration, and what a user is told of it."""

from itertools import combinations

import numpy as np
import pytest

from darts_async.config import ShapingConfig
from darts_async.shaper.estimates.planner import Planner
from darts_async.shaper.group import Group, Sample, Stage
from darts_async.shaper.rules.length_pay import LengthTerms, Lot, length_terms
from darts_async.shaper.token_accounts import StepStatistics
from launcher.display.length_notes import PAID_ON_THE_TRACE, length_note
from tests.shaper.world import prompts, world_config

REWARDS = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
TOKENS = [10, 20, 30, 40, 60, 80]  # mean 40: the long ones are wrong


def lot(chosen: tuple[int, ...], weights: list[float] | None = None) -> Lot:
    return Lot([REWARDS[i] for i in chosen], [TOKENS[i] for i in chosen], weights or [1.0] * len(chosen))


EVERYTHING = lot(tuple(range(6)))


def test_the_terms_are_those_worked_out_by_hand() -> None:
    terms = length_terms(EVERYTHING, lot((0, 1, 2)))
    # x = .25 .5 .75 1 1.5 2, r - 1/2 = + + - + - -: sum of products (1.75 - 4.25) / 2 = -1.25, over 5
    assert terms.natural == pytest.approx(-1.25 / 5)
    assert terms.spread == pytest.approx(np.var([0.25, 0.5, 0.75, 1, 1.5, 2], ddof=1))
    # kept: r - 2/3 = 1/3 1/3 -2/3 against x: (.75 - 1.5) / 3 = -.25, over 2
    assert terms.selected == pytest.approx(-0.125)
    assert terms.pay == pytest.approx(0.125 / terms.spread)  # half of what a long wrong answer loses is taken back
    assert terms.slope == pytest.approx(-0.25 / terms.spread)


def test_what_is_trained_whole_pays_nothing_and_equal_lengths_cannot_tell() -> None:
    assert length_terms(EVERYTHING, EVERYTHING).pay == 0
    same = Lot([1.0, 0.0], [7, 7], [1.0, 1.0])
    assert length_terms(same, same).pay is None
    assert LengthTerms().slope is None
    assert length_terms(EVERYTHING, lot((3,))).selected == 0


def test_a_choice_at_random_pays_nothing_on_average() -> None:
    """By enumeration of what could be kept."""
    kept = [length_terms(EVERYTHING, lot(chosen)).selected for chosen in combinations(range(6), 3)]
    assert np.mean(kept) == pytest.approx(length_terms(EVERYTHING, EVERYTHING).natural)


def played(shaping: dict[str, object], survivors: tuple[int, ...] | None) -> dict[str, float]:
    """A group whose first three have finished when the survivor of the others is drawn."""
    planner = Planner(world_config(shaping={"keep": 4, "launch": 6, "shortest": 3, "longest": 1, **shaping}))
    samples = [
        Sample(i, Stage.SCORED, num_tokens=n, finish_reason="stop", oldest_version=0, reward=r)
        for i, (r, n) in enumerate(zip(REWARDS, TOKENS, strict=True))
    ]
    group = Group(0, prompts(1)[0], "train", samples, num_finished=6)
    if survivors is not None:
        for rank, index in enumerate((0, 1, 2, *survivors)):
            samples[index].finish_rank = rank
        for sample in samples[3:]:
            if sample.sample_id not in survivors:
                sample.stage, sample.reward = Stage.ENDED, None
    group.weights = {sample.sample_id: weight for sample, weight in planner.rule(group).select(group)}
    statistics = StepStatistics()
    statistics.completed(group, None)
    return statistics.close(0, [group], [planner.counts(group)])


def test_weighted_survivors_pay_nothing_and_unweighted_ones_do() -> None:
    whole = {"rule": "survivor", "weight_power": 1.0, "baseline": "history"}
    assert all(played(whole, (i,))["selection/pays_for_length"] == pytest.approx(0) for i in (3, 4, 5))
    unweighted = [played({"rule": "survivor"}, (i,))["selection/pays_for_length"] for i in (3, 4, 5)]
    assert np.mean(unweighted) > 0.01


def test_each_step_has_the_metric_and_so_has_the_run() -> None:
    metrics = played({"rule": "dual_end"}, None)
    assert metrics["selection/pays_for_length"] == metrics["run/pays_for_length"]
    expected = length_terms(EVERYTHING, lot((0, 1, 2, 5)))
    assert metrics["selection/pays_for_length"] == pytest.approx(expected.pay)
    assert metrics["selection/length_slope"] == pytest.approx(expected.slope)


def test_samples_that_were_cut_unseen_leave_no_number() -> None:
    shaping = {"rule": "shortest", "early_stop": True}
    assert "selection/pays_for_length" in played(shaping, None)
    assert "selection/pays_for_length" not in played(shaping, (3,))


# --- what is said before a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "normalises", "words"),
    [
        ({"rule": "none", "launch": 8}, True, ["Length is not rewarded. Every sample is trained on."]),
        ({"rule": "shortest", "launch": 8}, True, ["Length is not rewarded. Every sample is trained on."]),
        ({"rule": "shortest", "launch": 12}, True, ["Length is rewarded.", "+0.083 with 12 samples"]),
        ({"rule": "dual_end", "launch": 12}, True, ["Length is penalised", "-0.007 with 12 samples and ends 7+1"]),
        ({"rule": "dual_end", "early_stop": True}, True, ["acts like rule shortest"]),
        (
            {"rule": "survivor", "shortest": 6, "longest": 2},
            True,
            ["weight_power 0", "+0.035 with 12 samples and ends 6+2"],
        ),
        ({"rule": "survivor", "weight_power": 1.0, "baseline": "history"}, True, ["Length is not rewarded"]),
        (
            {"rule": "survivor", "shortest": 6, "longest": 2, "weight_power": 1.0, "baseline": "leave_one_out"},
            True,
            ["Length is not rewarded", "normalise_advantage", "weight_power 1 biased"],
        ),
        ({"rule": "qlpo", "launch": 12}, True, ["strongly penalised", "-0.244 with 12 samples"]),
    ],
)
def test_the_plan_of_a_run_says_what_its_rule_pays(
    settings: dict[str, object], normalises: bool, words: list[str]
) -> None:
    note = length_note(ShapingConfig.model_validate(settings), normalises=normalises)
    assert [word for word in words if word not in note] == []


def test_unbiased_settings_are_called_so_without_a_but() -> None:
    shaping = {"rule": "survivor", "shortest": 6, "longest": 2, "weight_power": 1.0, "baseline": "leave_one_out"}
    assert "weight_power 1 biased" not in length_note(ShapingConfig.model_validate(shaping), normalises=False)


def test_every_rule_has_its_sentence() -> None:
    rules = {"none", "random", "shortest", "longest", "dual_end", "survivor", "qlpo"}
    assert {name for name, _, _, _ in PAID_ON_THE_TRACE} | {"none", "random"} == rules
    for rule in rules:
        launch = 8 if rule == "none" else 10
        note = length_note(ShapingConfig.model_validate({"rule": rule, "launch": launch}), normalises=True)
        assert note.startswith("Length is ")
        assert ";" not in note, "one idea to a sentence"
        assert all(len(sentence.split()) < 22 or "this rule pays" in sentence for sentence in note.split(". "))
