"""No answer is cut for being long; what never ends is."""

from typing import Any

import pytest

from darts_async.errors import DataError
from darts_async.shaper.estimates.patience import GROUPS_REMEMBERED, LEAST_S, LONGEST_CUT_S, LONGEST_TIMES, Patience
from darts_async.simulation.models import EngineModel, Models
from darts_async.simulation.report import SimulationResult
from darts_async.simulation.run import simulate
from tests.simulation.test_run import run_config


def test_the_limit_follows_the_longest_of_the_latest_groups() -> None:
    patience = Patience(None)
    assert patience.limit_s == LEAST_S
    for time_s in (3.0, 500.0, 7.0):
        patience.took(time_s)
    assert patience.limit_s == LONGEST_TIMES * 500
    for _ in range(GROUPS_REMEMBERED):
        patience.took(1.0)
    assert patience.limit_s == LEAST_S


def test_groups_that_never_end_are_not_waited_for_ever_longer() -> None:
    patience, limits_s = Patience(None), []
    for _ in range(12):
        limits_s.append(patience.limit_s)
        patience.cut(patience.limit_s)
    assert limits_s[:3] == [LEAST_S, LONGEST_TIMES * LEAST_S, LONGEST_TIMES**2 * LEAST_S]
    assert limits_s[-1] == LONGEST_TIMES * LONGEST_CUT_S
    patience.took(2 * LONGEST_CUT_S)
    assert patience.limit_s == LONGEST_TIMES * 2 * LONGEST_CUT_S


def test_a_given_limit_is_the_limit() -> None:
    patience = Patience(5.0)
    patience.took(500.0)
    assert patience.limit_s == 5.0


def test_another_process_of_the_run_knows_the_times() -> None:
    patience, other = Patience(None), Patience(None)
    patience.took(100.0)
    other.restore(patience.to_state())
    assert other.limit_s == patience.limit_s == 400.0


class LongThoughts:
    """A token takes a second. Prompts need 100 of them, every third one 280, and one first visit `longest`."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def draw(self, prompt_id: int, sample_index: int, visit: int) -> tuple[int, float]:
        if (prompt_id, visit) == (7, 0):
            return self.longest, float(sample_index % 2)
        return 280 if prompt_id % 3 == 0 else 100, float(sample_index % 2)


def simulated(staleness: dict[str, Any], longest: int = 280) -> SimulationResult:
    """Synchronous, so that the learner waits for every long group."""
    config = run_config(
        learner={"steps": 12, "groups_per_step": 2},
        staleness={"max_staleness": 0} | staleness,
        generator={"num_slots": 64, "max_context_tokens": 6000},
        sampling={"max_new_tokens": 5000},
    )
    models = Models(EngineModel(1.0, 1e9), 0.01, tick_every_s=1.0)
    return simulate(config, LongThoughts(longest), models, num_prompts=24)


def test_long_groups_are_not_cut_but_one_that_takes_many_times_as_long_as_any_is() -> None:
    with pytest.raises(DataError, match="groups were given up"):  # of groups that all take longer than that
        simulated({"cut_after_s": LEAST_S})
    result = simulated({"cut_after_s": None})
    assert "stale" not in result.samples_by_outcome
    assert simulated({"cut_after_s": None}, longest=4000).samples_by_outcome["stale"] == pytest.approx(4)
