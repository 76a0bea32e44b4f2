"""Whole runs under a virtual clock, in which everything fails.

    CHAOS --> network: frames lost, repeated, late, out of order, cut off
         `--> processes: killed at named points and at any time, frozen, late to come back
    REAL      the shaper process with its journal and ledger, all decisions of learner and generator, the coordinator of
              the weights, the members of its groups, sessions, the scripted engine
    MODELLED  what these decisions are done by, the reward process, the collective, the disk, the launcher

`run_chaos` makes one run out of a seed; the same seed makes the same run.
"""

from darts_async.simulation.chaos.plan import ChaosPlan, draw_plan
from darts_async.simulation.chaos.run import ChaosError, ChaosReport, run_chaos

__all__ = ["ChaosError", "ChaosPlan", "ChaosReport", "draw_plan", "run_chaos"]
