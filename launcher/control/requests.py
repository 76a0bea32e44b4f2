"""The requests to a running launcher and its replies: typed structs, one reply to each request."""

from msgspec import Struct


class GetStatus(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Ask for the state of the run."""


class RestartProcess(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Restart a process (`generator/0`), all processes of a role (`generator`), or the agent of a node (`agent/NODE`),
    which leaves the processes of the node alone."""

    process: str


class StopRun(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """End the run in order, as Ctrl-C does."""

    reason: str


Request = GetStatus | RestartProcess | StopRun


class ProcessState(Struct, frozen=True):
    """One process. `pid` is None while it does not run; `policy_version` is -1 if it has none."""

    name: str
    state: str
    pid: int | None
    policy_version: int
    num_in_flight: int
    tokens_per_s: float
    uptime_s: float
    restarts: int


class NodeState(Struct, frozen=True):
    """One node: starting, up, silent or lost."""

    name: str
    state: str
    agent_incarnation: int
    """Number of agents that the node has had."""
    keeper_pid: int | None


class RunState(Struct, frozen=True, tag=True):
    name: str
    run_dir: str
    ending: str | None
    """Why the run is ending, if it is."""
    num_steps: int
    total_steps: int
    elapsed_s: float
    remaining_s: float | None
    processes: list[ProcessState]
    nodes: list[NodeState]
    notices: list[str]


class Done(Struct, frozen=True, tag=True):
    """The request was carried out, or its work has begun."""

    text: str


class Refused(Struct, frozen=True, tag=True):
    """The request cannot be carried out."""

    reason: str


Reply = RunState | Done | Refused
