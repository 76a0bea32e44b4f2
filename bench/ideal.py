"""The schedule of an emulated run by itself: the same settings, simulated with processes and links that take no time.

What a run of the real processes takes beyond this, they cost; and generators that are idle here as well are idle
because nothing may be launched, not because they are fed too late.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec import Struct

from darts_async.config import RunConfig
from darts_async.generator.scripted import ScriptedEngine
from darts_async.prompts.load import load_prompts
from darts_async.protocol import Generate, SamplingParams, sample_id_of
from darts_async.simulation.demand import Draw
from darts_async.simulation.models import EngineModel, LearnerModel, Models
from darts_async.simulation.run import simulate


class Ideal(Struct, frozen=True):
    """The same window of the simulated run."""

    step_s: float
    """Emulated seconds per step, in the mean."""
    generator_idle: float
    """Share of the window, in the mean over the generators."""


class _Scripted:
    """A workload: the lengths that the scripted engine gives to the same prompts. Rewards mean nothing."""

    def __init__(self, config: RunConfig) -> None:
        script = config.generator.script
        assert script is not None
        self._engine = ScriptedEngine(script, num_slots=1, max_context_tokens=1, seed=config.seed)
        self._prompts = {prompt.prompt_id: prompt.token_ids for prompt in load_prompts(config).train}
        self._sampling = SamplingParams(**config.sampling.model_dump(exclude={"stop"}))
        self._nothing = np.empty(0, np.int32)

    @property
    def num_prompts(self) -> int:
        """To train on."""
        return len(self._prompts)

    def draw(self, prompt_id: int, sample_index: int, visit: int) -> Draw:
        """See `Workload`."""
        sample_id, prompt = sample_id_of(visit, sample_index), self._prompts[prompt_id]
        asked = Generate(sample_id, prompt, self._nothing, seed=sample_id, sampling=self._sampling)
        return self._engine.scripted_length(asked), 0.0


def simulated(settings: Mapping[str, Any], skip_steps: int, num_steps: int) -> Ideal:
    """The run of a cluster.yaml with scripted engines and learner.

    Args:
        settings: the cluster.yaml, in emulated tokens and seconds.
        skip_steps: steps before the window, 1 or more.
        num_steps: steps in it.

    Raises:
        ConfigError: the trace of the script cannot be read.
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
    workload = _Scripted(config)
    result = simulate(config, workload, models, num_prompts=workload.num_prompts)
    begin, end = skip_steps, skip_steps + num_steps
    window_s = sum(result.step_s[begin:end])
    idle_s = result.idle_until_step_s[end - 1] - result.idle_until_step_s[begin - 1]
    return Ideal(window_s / num_steps, idle_s / (window_s * config.roles.generator.replicas))
