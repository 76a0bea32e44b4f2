"""What a visit to a prompt tells, and what it must not tell."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from darts_async.shaper.estimates import planner as module
from darts_async.shaper.estimates.hazard import GroupProgress, HazardRule, PruningChoice, hazard_prunes
from darts_async.shaper.estimates.planner import Planner
from darts_async.shaper.group import Group, Sample, Stage
from tests.shaper.world import prompts, world_config

PROMPT = prompts(1)[0]
FINISHED = {0: 20, 1: 22, 2: 25, 3: 30, 4: 24}
RUNNING = {5: 40, 6: 90, 7: 10}
HAZARD = {"mode": "hazard", "threshold": 0.05, "spare_probability": 0.3}


def group_of(group_id: int) -> Group:
    """Five have finished, of both rewards; of the three that run number 6 is far behind."""
    ended = [Sample(i, Stage.SCORED, num_tokens=n, finish_reason="stop", reward=i % 2) for i, n in FINISHED.items()]
    running = [Sample(i, Stage.DECODING, num_tokens=n) for i, n in RUNNING.items()]
    return Group(group_id, PROMPT, "train", ended + running, num_finished=len(ended))


def looked_at(outcome: str, monkeypatch: pytest.MonkeyPatch) -> list[GroupProgress]:
    """What hazard pruning sees of a group: first, and after this has become of its first candidate."""
    seen: list[GroupProgress] = []

    def watched(rule: HazardRule, progress: GroupProgress, seed: int) -> PruningChoice:
        seen.append(replace(progress, group_id=0))
        return hazard_prunes(rule, progress, seed)

    monkeypatch.setattr(module, "hazard_prunes", watched)
    shaping = {"rule": "random", "keep": 5, "launch": 8, "shortest": 3, "pruning": HAZARD}
    for group_id in range(100):  # the draw is made of the id
        planner, group = Planner(world_config(shaping=shaping)), group_of(group_id)
        seen.clear()
        pruned = planner.tail_to_prune(group)
        if group.spared == (None if outcome == "pruned" else 6):
            break
    for sample in pruned:
        sample.stage = Stage.CANCELLING
    candidate = group.samples[6]
    assert group.hazard_candidates[6] == 90
    candidate.num_tokens += 3 if outcome == "pruned" else 400  # a few come until the engine acknowledges
    if outcome == "spared and done":
        candidate.reward = 1.0
        group.finish(candidate, "stop")
        candidate.stage = Stage.SCORED
    group.samples[7].num_tokens = 26
    planner.tail_to_prune(group)
    assert len(seen) == 2
    return seen


@pytest.mark.parametrize("outcome", ["spared and running", "spared and done"])
def test_hazard_sees_the_same_whether_a_candidate_was_spared_or_pruned(
    outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise who is a candidate would depend on the draw that its weight makes up for."""
    assert looked_at(outcome, monkeypatch) == looked_at("pruned", monkeypatch)


def visit(planner: Planner, rewards: list[float], survivors: frozenset[int], *, shortest: int) -> None:
    """One in which a draw has left the survivors of all but the first."""
    ranks = {index: rank for rank, index in enumerate((*range(shortest), *sorted(survivors)))}
    samples = [
        Sample(i, Stage.SCORED, num_tokens=10 + i, finish_reason="stop", finish_rank=ranks[i], reward=r)
        if i in ranks
        else Sample(i, Stage.ENDED, num_tokens=10)
        for i, r in enumerate(rewards)
    ]
    planner.observe(Group(0, PROMPT, "train", samples))


@pytest.mark.parametrize("weight_power", [0.0, 1.0])
def test_the_pass_rate_is_that_of_all_launched_samples_on_average_over_draws(weight_power: float) -> None:
    """By enumeration. The long ones are wrong here; of the kept alone they are one in three, of all three in five."""
    rewards = [1.0, 1.0, 0.0, 0.0, 1.0]
    shaping = {"rule": "survivor", "keep": 3, "launch": 5, "shortest": 1, "longest": 2}
    config = world_config(shaping={**shaping, "weight_power": weight_power, "baseline": "history"})
    posteriors = []
    for draw in combinations(range(1, 5), 2):
        planner = Planner(config)
        visit(planner, rewards, frozenset(draw), shortest=1)
        record = planner.history.prompts[0]
        assert record.trials == 5
        posteriors.append(record.successes)
    assert np.mean(posteriors) == pytest.approx(sum(rewards))


def test_a_spared_sample_counts_for_the_tail_in_the_pass_rate() -> None:
    """Two candidates, each spared with probability rho, at most one of them: on average all eight are counted."""
    shaping = {"rule": "random", "keep": 5, "launch": 8, "shortest": 3, "pruning": HAZARD}
    rho = 0.2  # at most one over the candidates that there could be
    total, number = np.zeros(2), 0
    for spared, probability in ((5, rho), (6, rho), (None, 1 - 2 * rho)):
        planner, group = Planner(world_config(shaping=shaping)), group_of(0)
        group.spared = spared
        for sample in group.samples[5:]:
            if sample.sample_id in (spared, 7):
                sample.stage, sample.finish_reason, sample.reward = Stage.SCORED, "stop", 1.0
            else:
                sample.stage = Stage.ENDED
        planner.observe(group)
        record = planner.history.prompts[0]
        total += probability * np.array([record.successes, record.trials])
        number += 1
    assert number == 3
    assert total.tolist() == pytest.approx([2 + 3, 8])


def test_only_the_shortest_are_waited_for_where_redundancy_is_saturated() -> None:
    shaping = {"rule": "random", "keep": 4, "launch": 8, "shortest": 3, "longest": 1, "pruning": {"mode": "saturation"}}
    planner, saturated = Planner(world_config(shaping=shaping)), group_of(0)
    smaller = Group(1, PROMPT, "train", saturated.samples[:7], num_finished=5)
    assert planner.rule(saturated).to_cancel(saturated) == saturated.samples[5:]
    assert planner.rule(smaller).to_cancel(smaller) == []


def test_a_curriculum_passes_over_what_is_too_hard_or_too_easy_but_not_always() -> None:
    curriculum = {"lowest": 0.1, "highest": 0.9, "revisit_share": 0.25}
    planner, plain = Planner(world_config(prompts={"curriculum": curriculum})), Planner(world_config())
    rewards = {1: [0.0, 0.0], 2: [1.0, 1.0], 3: [1.0, 0.0], 4: [5.0, -5.0]}
    for each in (planner, plain):
        for prompt_id, of_prompt in rewards.items():
            each.history.observe(prompt_id, [10, 12], [], of_prompt)
    places = range(2000)
    shares = {i: sum(planner.passes_over(i, place) for place in places) / len(places) for i in range(5)}
    assert shares[0] == shares[3] == shares[4] == 0, "one never seen, and those inside; rewards are clipped"
    assert 0.7 < shares[1] == shares[2] < 0.8, "the same draw for the same place"
    assert not any(plain.passes_over(i, place) for i in rewards for place in places)
    planner.history.observe(1, [10], [], [1.0, 1.0, 1.0])
    assert not any(planner.passes_over(1, place) for place in places), "it has been learnt since"


def test_a_curriculum_without_an_inside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompts.curriculum.lowest is 0.9, but highest is 0.1; swap them"):
        world_config(prompts={"curriculum": {"lowest": 0.9, "highest": 0.1}})


def test_a_curriculum_that_passes_over_nothing_is_refused() -> None:
    for curriculum in ({"lowest": 0.0, "highest": 1.0}, {"lowest": 0, "highest": 1, "revisit_share": 0.5}):
        with pytest.raises(ValueError, match="passes over nothing with lowest 0 and highest 1; leave one of them"):
            world_config(prompts={"curriculum": curriculum})
