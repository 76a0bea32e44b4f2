"""Whole runs under a virtual clock, in which everything fails.

    CHAOS --> network: frames lost, repeated, late, out of order, cut off
         `--> processes: killed at named points and at any time, frozen, late to come back
    REAL      the shaper process with its journal and ledger, all decisions of learner and generator, the coordinator of
              the weights, the members of its groups, sessions, the scripted engine
    MODELLED  the shells of these decisions, the reward process, the collective, the disk, the launcher

`run.run_chaos(plan.draw_plan(seed), run_dir)` makes a run; the same seed makes the same run.
"""
