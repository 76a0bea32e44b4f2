"""Simulated runs: the real shaper, modelled peers."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_async.config import RunConfig, ShapingConfig
from darts_async.protocol import TrainGroup, WeightsApplied
from darts_async.shaper.ledger import SampleEnded
from darts_async.shaper.outbox import Output
from darts_async.shaper.state import Incoming
from darts_async.simulation.demand import FixedWorkload, LengthModel, LognormalWorkload, Workload
from darts_async.simulation.models import EngineModel, LearnerModel, Models
from darts_async.simulation.report import GroupStatistics, OpenGroup, SimulationResult
from darts_async.simulation.run import Simulation, simulate

SHORT = LognormalWorkload(LengthModel(mean_log=3.0, prompt_sigma=0.5, mean_log_sigma=-0.7), seed=5)
MODELS = Models(EngineModel(update_stall_s=0.3), 0.02, LearnerModel(0.5, 1e-4, 0.4))
SHAPINGS = {
    "none": {"rule": "none", "launch": 4},
    "dual_end": {"rule": "dual_end", "launch": 6},
    "early_stop": {"rule": "dual_end", "launch": 6, "early_stop": True},
    "survivor": {"rule": "survivor", "launch": 7},
}


def run_config(**sections: dict) -> RunConfig:
    base: dict[str, dict] = {
        "learner": {"steps": 5, "groups_per_step": 4},
        "shaping": {"rule": "none", "keep": 4, "launch": 4, "shortest": 3, "longest": 1},
        "staleness": {"max_staleness": 2, "cut_after_s": 1e6},
        "generator": {"num_slots": 8, "max_queued": 2},
        "evaluation": {"samples_per_prompt": 0},
        "roles": {"generator": {"replicas": 2}},
    }
    return RunConfig.model_validate({name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


class Listed:
    """The same lengths for every group; every other sample is right."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def draw(self, prompt_id: int, sample_index: int, visit: int) -> tuple[int, float]:
        return self.lengths[sample_index], float(sample_index % 2)


def alone(workload: Workload, models: Models, **sections: dict) -> SimulationResult:
    """One engine with room for everything, synchronous."""
    sections = {"staleness": {"max_staleness": 0}, "generator": {"num_slots": 64}} | sections
    return simulate(run_config(roles={"generator": {"replicas": 1}}, **sections), workload, models)


def test_a_run_repeats_bit_for_bit() -> None:
    config = run_config(shaping=SHAPINGS["survivor"])
    assert simulate(config, SHORT, MODELS) == simulate(config, SHORT, MODELS)


def test_another_seed_is_another_run() -> None:
    results = [simulate(run_config().model_copy(update={"seed": seed}), SHORT, MODELS) for seed in (0, 1)]
    assert results[0].makespan_s != results[1].makespan_s


def test_the_makespan_of_fixed_lengths_is_what_one_works_out_by_hand() -> None:
    models = Models(EngineModel(0.01, 64, update_stall_s=0.3), 0.25, LearnerModel(2.0, 0.001, 0.5))
    steps = {"learner": {"steps": 3, "groups_per_step": 2}}
    result = alone(FixedWorkload(100), models, **steps)
    decode_s = 100 * 0.01 * (1 + 8 / 64)
    train_s = 2 * 4 * 100 * 0.001
    assert result.makespan_s == pytest.approx(3 * (decode_s + 0.25 + train_s + 2.0 + 0.5 + 0.3))
    assert result.step_s == pytest.approx((decode_s + 0.25 + train_s + 2.0, *[decode_s + 0.25 + train_s + 2.8] * 2))
    assert result.generator_s == pytest.approx({"decode": 3 * decode_s, "stall": 0.9, "idle": 3 * (2.75 + train_s)})
    assert result.slot_use == pytest.approx(3 * decode_s * 8 / 64 / result.makespan_s)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 500), min_size=2, max_size=12))
def test_one_synchronous_group_takes_what_the_rollout_time_model_says(lengths: list[int]) -> None:
    shaping = {"rule": "none", "keep": len(lengths), "launch": len(lengths)}
    workload = Listed(*lengths)
    result = alone(
        workload, Models(EngineModel(0.01, 64)), shaping=shaping, learner={"steps": 1, "groups_per_step": 1},
        sampling={"max_new_tokens": 500},
    )  # fmt: skip
    expected_s, before = 0.0, 0
    for m, length in enumerate(sorted(lengths), start=1):
        expected_s += (length - before) * 0.01 * (1 + (len(lengths) - m + 1) / 64)
        before = length
    assert result.makespan_s == pytest.approx(expected_s)
    assert result.num_tokens_decoded == sum(lengths)


def test_a_cancelled_sample_costs_the_tokens_up_to_the_boundary_and_no_more() -> None:
    shaping = {"rule": "survivor", "keep": 4, "launch": 6}
    once = {"steps": 1, "groups_per_step": 1}
    result = alone(Listed(10, 10, 10, 100, 100, 100), Models(EngineModel(0.01, 64)), shaping=shaping, learner=once)
    assert result.tokens_by_outcome == {"trained": 130, "cancelled": 20}
    assert result.makespan_s == pytest.approx(0.01 * (10 * (1 + 6 / 64) + 90 * (1 + 1 / 64)))


def test_a_full_engine_makes_samples_wait_for_a_slot() -> None:
    once = {"steps": 1, "groups_per_step": 1}
    result = alone(Listed(10, 20, 30, 40), Models(EngineModel(1.0, 1e9)), learner=once, generator={"num_slots": 2})
    # slot one: 10 then 30; slot two: 20 then 40
    assert result.makespan_s == pytest.approx(60.0)
    assert result.group_s == pytest.approx((60.0,))


def test_samples_at_the_cap_are_cut_there() -> None:
    once = {"steps": 1, "groups_per_step": 1}
    result = alone(FixedWorkload(1000), Models(), learner=once, sampling={"max_new_tokens": 200})
    assert result.tokens_by_outcome == {"trained": 4 * 200}


@pytest.mark.parametrize("shaping", SHAPINGS)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    max_staleness=st.integers(0, 3),
    num_generators=st.integers(1, 3),
    drain=st.booleans(),
    flush_every_s=st.none() | st.floats(0.01, 1.0),
    reward_s=st.sampled_from((0.0, 0.1)),
)
def test_every_token_and_every_second_is_accounted_for_within_the_staleness_bound(
    shaping: str,
    seed: int,
    max_staleness: int,
    num_generators: int,
    drain: bool,
    flush_every_s: float | None,
    reward_s: float,
) -> None:
    config = run_config(
        shaping=SHAPINGS[shaping],
        staleness={"max_staleness": max_staleness},
        roles={"generator": {"replicas": num_generators}},
    )
    engine = EngineModel(update_stall_s=0.2, drain_before_update=drain, flush_every_s=flush_every_s)
    models = dataclasses.replace(MODELS, engine=engine, reward_s=reward_s)
    result = simulate(config, LognormalWorkload(LengthModel(mean_log=3.0), seed=seed), models)
    assert sum(result.tokens_by_outcome.values()) == result.num_tokens_decoded
    assert result.samples_by_outcome["trained"] == 5 * 4 * 4
    assert result.num_samples == sum(size * groups for size, groups in result.launched.items())
    assert sum(result.tokens_by_staleness.values()) == result.tokens_by_outcome["trained"]
    assert result.staleness_max <= max_staleness
    assert sum(result.generator_s.values()) == pytest.approx(num_generators * result.makespan_s)
    assert sum(result.learner_s.values()) == pytest.approx(result.makespan_s)
    assert sum(result.step_s) <= result.makespan_s
    assert 0 < result.slot_use <= 1


def test_the_state_is_valid_after_every_instant() -> None:
    simulation = Simulation(run_config(shaping=SHAPINGS["survivor"]), SHORT, MODELS, num_prompts=50)
    simulation.run(after_instant=simulation.state.validate)
    assert simulation.result().num_trained_groups == 20


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_asynchronous_is_not_slower_than_synchronous_over_the_same_prompts(shaping: str) -> None:
    def makespan_s(max_staleness: int, seed: int) -> float:
        config = run_config(shaping=SHAPINGS[shaping], staleness={"max_staleness": max_staleness})
        return simulate(config.model_copy(update={"seed": seed}), SHORT, MODELS).makespan_s

    assert sum(makespan_s(2, seed) for seed in range(4)) < sum(makespan_s(0, seed) for seed in range(4))


def test_draining_before_an_update_costs_time() -> None:
    def result(drain: bool) -> SimulationResult:
        engine = dataclasses.replace(MODELS.engine, drain_before_update=drain)
        return simulate(run_config(), SHORT, Models(engine, learner=LearnerModel(broadcast_s=0.1)))

    assert result(drain=True).makespan_s > result(drain=False).makespan_s


def test_a_drained_engine_decodes_every_sample_under_one_version() -> None:
    engine = dataclasses.replace(MODELS.engine, drain_before_update=True)
    simulation = Simulation(run_config(), SHORT, dataclasses.replace(MODELS, engine=engine), num_prompts=50)
    handle, ended = simulation.state.handle, []

    def spy(peer: str, message: Incoming, now_s: float) -> list[Output]:
        outputs = handle(peer, message, now_s)
        ended.extend(output for output in outputs if isinstance(output, SampleEnded))
        return outputs

    simulation.state.handle = spy  # type: ignore[method-assign]
    simulation.run()
    assert len(ended) == 80
    assert all(record.oldest_version == record.newest_version for record in ended)


def test_with_as_many_launched_as_kept_every_rule_gives_the_same_run() -> None:
    rules = ("none", "random", "dual_end", "survivor", "qlpo")
    results = [simulate(run_config(shaping={"rule": rule, "launch": 4}), SHORT, MODELS) for rule in rules]
    assert all(result == results[0] for result in results)


def test_drift_is_zero_where_all_lengths_are_equal_and_negative_where_the_wrong_ones_are_long() -> None:
    once = {"steps": 1, "groups_per_step": 1}
    assert alone(FixedWorkload(50), Models(), learner=once).length_drift == pytest.approx(0.0)
    # even samples are wrong and long: advantages -1, +1, so the mean of A l is (-30 + 10 - 30 + 10) / 4, E[l] = 20
    assert alone(Listed(30, 10, 30, 10), Models(), learner=once).length_drift == pytest.approx(-10 / 20, rel=1e-5)


def test_drift_is_of_the_advantages_that_the_learner_would_compute_from_the_weights() -> None:
    statistics, arrays = GroupStatistics(ShapingConfig()), np.zeros(60, np.int32)
    message = TrainGroup(
        group_id=0,
        step=0,
        prompt_tokens=arrays[:1],
        num_tokens=np.array([10, 20, 30], np.int32),
        token_ids=arrays,
        logprobs=arrays.astype(np.float32),
        versions=arrays,
        rewards=np.array([1, 1, 0], np.float32),
        weights=np.array([1, 1, 6], np.float32),
    )
    statistics.shipped(message, OpenGroup(0.0, [(10, 1.0), (20, 1.0), (30, 0.0)], num_left=3))
    # baseline 2 / 8, variance 2 / 8 * 6 / 8: weighted advantages 3/4, 3/4 and -6/4, over sqrt(3) / 4
    assert statistics.length_drift == pytest.approx((0.75 * 30 - 1.5 * 30) / (3**0.5 / 4) / 3 / 20, rel=1e-4)


def test_a_group_with_equal_rewards_counts_as_without_advantage() -> None:
    once = {"steps": 1, "groups_per_step": 2}
    assert alone(FixedWorkload(50, wrong_every=0), Models(), learner=once).zero_advantage_share == 1.0
    assert alone(FixedWorkload(50, wrong_every=2), Models(), learner=once).zero_advantage_share == 0.0


def test_a_group_that_alone_keeps_the_learner_waiting_is_cut_and_its_prompt_asked_again() -> None:
    class OneIsEndless:
        def draw(self, prompt_id: int, sample_index: int, visit: int) -> tuple[int, float]:
            return (200 if (prompt_id, sample_index, visit) == (1, 0, 0) else 5), float(sample_index % 2)

    config = run_config(learner={"steps": 3, "groups_per_step": 2}, staleness={"max_staleness": 0, "cut_after_s": 0.5})
    result = simulate(config, OneIsEndless(), Models(reward_s=0.01, tick_every_s=0.1), num_prompts=4)
    assert result.samples_by_outcome["stale"] == 4
    assert result.launched == {4: 7}
    assert sum(result.tokens_by_outcome.values()) == result.num_tokens_decoded


def test_a_run_that_cannot_go_on_says_so_instead_of_ticking_for_ever() -> None:
    simulation = Simulation(run_config(), SHORT, MODELS, num_prompts=8)
    simulation.clock.send = lambda sender, message: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="deadlock"):
        simulation.run()


def test_stalls_are_reported_with_the_version() -> None:
    simulation = Simulation(run_config(), SHORT, MODELS, num_prompts=8)
    seen: list[WeightsApplied] = []
    send = simulation.clock.send

    def spy(sender: str, message: object) -> None:
        if isinstance(message, WeightsApplied):
            seen.append(message)
        send(sender, message)  # type: ignore[arg-type]

    simulation.clock.send = spy  # type: ignore[method-assign,assignment]
    simulation.run()
    assert [m.policy_version for m in seen] == [v for v in range(6) for _ in range(2)]
    assert {m.stall_s for m in seen if m.policy_version} == {0.3}
