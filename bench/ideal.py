"""The schedule of an emulated run by itself: the same settings, simulated with processes and links that take no time.

What a run of the real processes takes beyond this, they cost; and generators that are idle here as well are idle
because nothing may be launched, not because they are fed too late.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from darts_async.config import RunConfig
from darts_async.simulation import EngineModel, LearnerModel, Models, simulate
from darts_async.simulation.workload import Draw

_COLUMNS_BETWEEN_VISITS = 7


class Ideal(Struct, frozen=True):
    """The same window of the simulated run."""

    step_s: float
    """Emulated seconds per step, in the mean."""
    generator_idle: float
    """Share of the window, in the mean over the generators."""


class _Lengths:
    """A workload of [num_prompts, num_columns] lengths; rewards mean nothing."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self._lengths = lengths

    def draw(self, prompt_id: int, sample_index: int, visit: int) -> Draw:
        """See `Workload`."""
        num_prompts, num_columns = self._lengths.shape
        column = (sample_index + _COLUMNS_BETWEEN_VISITS * visit) % num_columns
        return int(self._lengths[prompt_id % num_prompts, column]), 0.0


def simulated(settings: Mapping[str, Any], lengths: NDArray[np.int64], skip_steps: int, num_steps: int) -> Ideal:
    """The run of a cluster.yaml with scripted engines and learner.

    Args:
        settings: the cluster.yaml, in emulated tokens and seconds.
        lengths: [num_prompts, num_columns] in emulated tokens.
        skip_steps: steps before the window, 1 or more.
        num_steps: steps in it.
    """
    config = RunConfig.model_validate(settings)
    script, learner = config.generator.script, config.learner.script
    assert script is not None
    assert learner is not None
    engine = EngineModel(
        token_latency_s=script.token_latency_s,
        batch_for_double_latency=script.batch_for_double_latency,
        update_stall_s=script.update_stall_s,
    )
    models = Models(engine, learner=LearnerModel(learner.step_s, learner.token_s, learner.broadcast_s))
    result = simulate(config, _Lengths(lengths), models, num_prompts=len(lengths))
    begin, end = skip_steps, skip_steps + num_steps
    window_s = sum(result.step_s[begin:end])
    idle_s = result.idle_until_step_s[end - 1] - result.idle_until_step_s[begin - 1]
    return Ideal(window_s / num_steps, idle_s / (window_s * config.roles.generator.replicas))
