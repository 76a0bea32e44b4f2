"""From settings to processes and links: pure, so that a dry run shows exactly what a run would start.

    link         bound by     members
    generators   shaper       generator/*     work out, tokens back
    rewards      shaper       reward/*        responses out, rewards back
    learner      shaper       learner/*       groups out, commits back
    weights      learner      generator/*     control of the weight broadcast
    launcher     launcher     every process   status, shutdown

Addresses are an argument: which ports are free is a question for the machine, not for the plan.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from darts_async.config import RoleConfig, RunConfig
from darts_async.topology import LAUNCHER, LinkPlan, ProcessSpec, RunPlan

Role = Literal["shaper", "learner", "reward", "generator"]

ROLES: tuple[Role, ...] = ("shaper", "learner", "reward", "generator")
"""In the order of starting: hubs first, so that members find them listening."""

_SHAPER = "shaper/0"
_LEARNER = "learner/0"

LINKS: tuple[tuple[str, str, tuple[Role, ...]], ...] = (
    ("generators", _SHAPER, ("generator",)),
    ("rewards", _SHAPER, ("reward",)),
    ("learner", _SHAPER, ("learner",)),
    ("weights", _LEARNER, ("generator",)),
    ("launcher", LAUNCHER, ROLES),
)
"""Name, hub and member roles of every link, in the order of their ports."""


def plan_run(config: RunConfig, run_dir: Path, addresses: Sequence[str]) -> RunPlan:
    """The processes and links of a run; `addresses[i]` is for link i of `LINKS`."""
    return RunPlan(
        processes=tuple(_processes(config, run_dir)),
        links=tuple(
            LinkPlan(name, hub, address, tuple(name for role in roles for name in _names(config, role)))
            for (name, hub, roles), address in zip(LINKS, addresses, strict=True)
        ),
    )


def link_addresses(host: str, ports: Sequence[int]) -> tuple[str, ...]:
    """One ZeroMQ address per port. An IPv6 host is put in brackets."""
    shown_host = f"[{host}]" if ":" in host else host
    return tuple(f"tcp://{shown_host}:{port}" for port in ports)


def reports_per_step(plan: RunPlan) -> dict[str, int]:
    """How often each process speaks about an optimiser step: the shaper once, the learner when it has taken the
    step and when the version is published."""
    return {**dict.fromkeys(plan.names("shaper"), 1), **dict.fromkeys(plan.names("learner"), 2)}


def role_config(config: RunConfig, role: Role) -> RoleConfig:
    """The settings of a role."""
    roles: dict[Role, RoleConfig] = {
        "shaper": config.roles.shaper,
        "learner": config.roles.learner,
        "reward": config.roles.reward,
        "generator": config.roles.generator,
    }
    return roles[role]


def _names(config: RunConfig, role: Role) -> Iterator[str]:
    return (f"{role}/{number}" for number in range(role_config(config, role).replicas))


def _processes(config: RunConfig, run_dir: Path) -> Iterator[ProcessSpec]:
    for role in ROLES:
        settings = role_config(config, role)
        for name in _names(config, role):
            argv = _command(role, name, run_dir)
            yield ProcessSpec(name, role, argv, _environment(settings), settings.start_timeout_s)


def _command(role: Role, name: str, run_dir: Path) -> tuple[str, ...]:
    module = f"darts_async.{role}.process"
    return (sys.executable, "-m", module, "--run-dir", str(run_dir), "--name", name, "--incarnation", "1")


def _environment(settings: RoleConfig) -> dict[str, str]:
    """Numerical libraries take every core unless told otherwise, and the processes would fight for them."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCH_NUM_THREADS")
    return {**dict.fromkeys(variables, str(settings.threads)), "TOKENIZERS_PARALLELISM": "false"}
