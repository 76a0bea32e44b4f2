"""Simulated runs: the real shaper with modelled generators, rewards and a learner, in virtual time.

`run.simulate(config, workload, models)` makes one; `demand` has the workloads, `models` the speeds, `report` the
result. The policy never changes in a simulation, so it measures the mechanism alone: which schedule does the same work
sooner, not whether the policy learns.
"""
