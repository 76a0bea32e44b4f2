"""What may be asked of a running launcher, and what it answers: typed structs, one request and one reply each."""

from msgspec import Struct


class GetStatus(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """How does the run stand?"""


class RestartProcess(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """End a process (`generator/0`) or all of a role (`generator`), and start it again; or the agent of a node
    (`agent/NODE`), which no process notices."""

    process: str


class StopRun(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """End the run in order, as Ctrl-C does."""

    reason: str


Request = GetStatus | RestartProcess | StopRun


class ProcessState(Struct, frozen=True):
    """One process. `pid` is None while it does not run; `policy_version` is -1 without one."""

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
    """How many agents it has had."""
    keeper_pid: int | None


class RunState(Struct, frozen=True, tag=True):
    """How the run stands."""

    name: str
    run_dir: str
    ending: str | None
    """Why it is ending, if it is."""
    num_steps: int
    total_steps: int
    elapsed_s: float
    remaining_s: float | None
    processes: list[ProcessState]
    nodes: list[NodeState]
    notices: list[str]


class Done(Struct, frozen=True, tag=True):
    """It was done, or has begun."""

    text: str


class Refused(Struct, frozen=True, tag=True):
    """It cannot be done."""

    reason: str


Reply = RunState | Done | Refused
