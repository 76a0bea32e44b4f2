"""Simulated runs: the real shaper with modelled generators, rewards and a learner, in virtual time.

`simulate(config, workload, models)` is the whole interface. The policy never changes in a simulation, so what it
measures is the mechanism alone: which schedule does the same work sooner, not whether the policy learns.
"""

from darts_async.simulation.demand import (
    LONG_THOUGHT,
    MATH_7B,
    FixedWorkload,
    LengthModel,
    LognormalWorkload,
    TraceWorkload,
    Workload,
)
from darts_async.simulation.models import EngineModel, LearnerModel, Models, RewardModel
from darts_async.simulation.report import SimulationResult
from darts_async.simulation.run import simulate

__all__ = [
    "LONG_THOUGHT",
    "MATH_7B",
    "EngineModel",
    "FixedWorkload",
    "LearnerModel",
    "LengthModel",
    "LognormalWorkload",
    "Models",
    "RewardModel",
    "SimulationResult",
    "TraceWorkload",
    "Workload",
    "simulate",
]
