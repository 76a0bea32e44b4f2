"""The speeds of engines, reward functions and a learner."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineModel:
    """A generator with continuous batching: one token for every running sample per decode step."""

    token_latency_s: float = 0.01
    """A decode step with one sample in the batch, minus the cost of that sample."""
    batch_for_double_latency: float = 64.0
    """A decode step of b samples takes token_latency_s * (1 + b / this)."""
    update_stall_s: float = 0.0
    """Pause for new weights, at a step boundary."""
    drain_before_update: bool = False
    """Finish what runs, and start nothing, before new weights are taken; otherwise they are taken in flight."""
    flush_every_s: float | None = None
    """Also report all tokens so far at this interval. None: only when a sample ends and when the version changes, which
    is enough for the bookkeeping, and fastest."""

    def step_s(self, batch_size: int) -> float:
        """Time of one decode step."""
        return self.token_latency_s * (1 + batch_size / self.batch_for_double_latency)


@dataclass(frozen=True, slots=True)
class LearnerModel:
    """Takes groups as they arrive, each for its tokens, then the optimiser step, then the broadcast.

    As in the learner process, groups of the next step are taken while the broadcast is under way, and the next
    optimiser step waits for it.
    """

    step_s: float = 0.0
    """Optimiser step."""
    token_s: float = 0.0
    """Forward and backward of one trained token."""
    broadcast_s: float = 0.0
    """From the step to the moment the new weights lie beside the old ones in every generator."""


@dataclass(frozen=True, slots=True)
class Models:
    """All of them."""

    engine: EngineModel = EngineModel()
    reward_s: float = 0.0
    """Every response takes so long to score; any number are scored at once."""
    learner: LearnerModel = LearnerModel()
    tick_every_s: float = 1.0
    """How often the shaper looks at the clock."""
