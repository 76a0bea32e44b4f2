"""The elasticity of decoding, measured against profiles that are known."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from darts_async.config import RunConfig
from darts_async.protocol import StepCompleted, TokensDecoded
from darts_async.shaper.estimates.decode_elasticity import DecodePace
from darts_async.shaper.outbox import Output, SendTo
from darts_async.simulation.demand import LengthModel, LognormalWorkload
from darts_async.simulation.models import EngineModel, LearnerModel, Models
from darts_async.simulation.run import Simulation


def decode(
    pace: DecodePace, name: str, batches: list[int], step_s: Callable[[int], float], *, num_slots: int = 10_000
) -> None:
    """A generator that reports every four steps; in each report the batch is another."""
    now_s = 0.0
    for batch in [batches[0], *batches]:
        now_s += 4 * step_s(batch)
        held = range(batch)
        pace.reported(name, list(held), [4] * batch, held=set(held), num_slots=num_slots, now_s=now_s)


def mixed(low: int, high: int, num: int = 400) -> list[int]:
    """Batches between two sizes; each stands twice, because a tracer sees the mean of before and after."""
    return np.repeat(np.random.default_rng(0).integers(low, high, num), 2).tolist()


@pytest.mark.parametrize("double_at", [4.0, 36.0, 1e6])
def test_the_slope_of_an_affine_profile_is_found(double_at: float) -> None:
    pace, batches = DecodePace(), mixed(8, 64)
    decode(pace, "generator/0", batches, lambda b: 0.01 * (1 + b / double_at))
    mean = np.mean(batches)
    assert pace.elasticity == pytest.approx(mean / (double_at + mean), abs=0.05)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_slope_of_a_power_law_is_found(power: float) -> None:
    pace = DecodePace()
    decode(pace, "generator/0", mixed(20, 40), lambda b: 0.01 * b**power)
    assert pace.elasticity == pytest.approx(power, abs=0.06)


def test_redundancy_costs_its_full_price_until_something_is_known() -> None:
    pace = DecodePace()
    assert pace.elasticity == 1.0
    pace.reported("generator/0", [1], [3], held={1}, num_slots=4, now_s=1.0)
    assert pace.elasticity == 1.0
    decode(pace, "generator/0", [30] * 200, lambda _: 0.01)  # one batch size tells nothing about the others
    assert pace.elasticity == pytest.approx(1.0)


def test_where_all_slots_are_taken_the_rest_has_to_wait() -> None:
    pace = DecodePace()
    decode(pace, "generator/0", mixed(8, 64), lambda _: 0.01)
    before = pace.elasticity
    decode(pace, "generator/1", mixed(64, 65), lambda _: 0.01, num_slots=64)
    assert before < 0.05
    assert pace.elasticity == pytest.approx(0.5, abs=0.05)  # one of two generators is full


def test_machines_of_different_speed_do_not_look_like_a_slope() -> None:
    pace = DecodePace()
    decode(pace, "generator/0", mixed(8, 12), lambda _: 0.01)
    decode(pace, "generator/1", mixed(80, 120), lambda _: 0.10)
    assert pace.elasticity < 0.3


def test_a_pause_for_new_weights_is_no_decoding() -> None:
    pace = DecodePace()
    for paused in (True, False):
        pace.forget("generator/0")
        now_s = 0.0
        for batch in mixed(8, 64):
            now_s += 4 * 0.01
            pace.reported("generator/0", [1], [4], held=set(range(batch)), num_slots=99, now_s=now_s)
            if batch > 36:  # pauses fall together with large batches
                now_s += 1.0
                if paused:
                    pace.paused("generator/0", now_s)
        assert (pace.elasticity < 0.1) == paused


def test_a_sample_that_waited_for_its_slot_measures_nothing() -> None:
    pace = DecodePace()
    pace.reported("generator/0", [1], [1], held={1, 2}, num_slots=1, now_s=1000.0)
    assert pace.elasticity == 1.0
    pace.reported("generator/0", [], [], held={1, 2}, num_slots=1, now_s=1001.0)
    assert pace.elasticity == 1.0


@pytest.mark.parametrize(("num_slots", "double_at"), [(64, 64.0), (64, 8.0), (8, 64.0)])
def test_the_running_shaper_finds_the_elasticity_of_the_simulated_engines(num_slots: int, double_at: float) -> None:
    """A step of b samples takes 1 + b / b0: the elasticity at b is b / (b0 + b), and 1 where all slots are taken."""
    config = RunConfig.model_validate(
        {
            "learner": {"steps": 12, "groups_per_step": 8},
            "shaping": {"rule": "survivor", "keep": 4, "launch": 6, "shortest": 3, "longest": 1}
            | {"redundancy": {"total": "utility"}},
            "generator": {"num_slots": num_slots, "max_queued": 4},
            "staleness": {"max_staleness": 1, "cut_after_s": 1e6},
            "evaluation": {"samples_per_prompt": 0},
        }
    )
    engine = EngineModel(0.01, double_at, update_stall_s=0.3, flush_every_s=0.25)
    models = Models(engine, learner=LearnerModel(0.5, 1e-4, 0.4))
    workload = LognormalWorkload(LengthModel(mean_log=4.5, mean_log_sigma=-0.7), seed=5)
    simulation = Simulation(config, workload, models, num_prompts=200)
    handle, sent, truth = simulation.state.handle, [], []

    def spy(peer: str, message: object, now_s: float) -> list[Output]:
        outputs = handle(peer, message, now_s)  # type: ignore[arg-type]
        if isinstance(message, TokensDecoded):
            seat = simulation.state.work.generators.seats.get(peer)
            assert seat is not None
            batch = len(seat.sample_ids)
            truth.append(1.0 if batch >= num_slots else batch / (double_at + batch))
        sent.extend(o.message for o in outputs if isinstance(o, SendTo) and isinstance(o.message, StepCompleted))
        return outputs

    simulation.state.handle = spy  # type: ignore[method-assign,assignment]
    simulation.run()
    found = sent[-1].metrics["redundancy/elasticity"]
    assert found == pytest.approx(np.mean(truth), abs=0.1)
    assert json.dumps(sent[-1].metrics), "plain numbers"
