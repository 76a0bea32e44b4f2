"""The launcher's view of all nodes and their processes. Pure: every input returns the actions to take.

The states of a node (`NODE_LIFE`):

    starting -> up      its agent says how the node is
    up       -> silent  the link to its agent is down
             -> lost    its keeper has ended
    silent   -> up      it is heard again
             -> lost    it is silent for `lost_after_s`, or its keeper has ended
    lost     -> up      its agent says how the node is

A lost node has no running process: its keeper ends them after a lease without the launcher, which is shorter than
`lost_after_s`. So they count as killed, and their restart policies apply. Orders to the node are delivered when it is
back.

A repeated report, or one about an incarnation that was given up, changes nothing; a process of such an incarnation is
killed. Every agent begins with the complete state of its node, which also shows exits and orders that were lost with an
earlier agent. Invariants: every incarnation that is started gives one `Ended` or `NotStarted`, and the next incarnation
starts only after that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import agent_name, keeper_name
from darts_async.transitions import Transitions
from darts_async.wire.backoff import backoff_s
from launcher.nodes import node_messages as messages
from launcher.nodes.node_messages import Order, Report, StartProcess
from launcher.nodes.supervisor import ProcessExit, ProcessRecord

COMES_UP_WITHIN_S = 60.0
"""Longest time between the start of an agent and its first report."""
_BACKOFF_S = (0.2, 20.0)
_KILLED = -9

NODE_LIFE = Transitions(
    {
        ("starting", "up"): "its agent says how the node is",
        ("up", "silent"): "the link to its agent is down",
        ("up", "lost"): "its keeper has ended",
        ("silent", "up"): "it is heard again",
        ("silent", "lost"): "it is silent for `lost_after_s`, or its keeper has ended",
        ("lost", "up"): "its agent says how the node is",
    }
)


@dataclass(frozen=True, slots=True)
class Tell:
    """Send an order to the agent of a node."""

    node: str
    order: Order


@dataclass(frozen=True, slots=True)
class Launch:
    """Start the agent of a node, if it has none."""

    node: str


@dataclass(frozen=True, slots=True)
class Started:
    """A process has started."""

    record: ProcessRecord


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The operating system of a node could not start a process."""

    name: str
    error: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A process has ended, or is given up with its node."""

    exit: ProcessExit


@dataclass(frozen=True, slots=True)
class NodeCame:
    """A node has reported its state: for the first time, through a new agent, or after an absence."""

    node: str
    agent_incarnation: int
    away_s: float | None


@dataclass(frozen=True, slots=True)
class NodeSilent:
    """The connection to a node is down."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node is given up until it is back."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class NodeFailed:
    """A node cannot be started, so the run cannot begin."""

    node: str
    reason: str
    culprit: str | None = None
    """The process whose log says more."""


Step = Tell | Launch | Started | NotStarted | Ended | NodeCame | NodeSilent | NodeLost | NodeFailed


@dataclass(slots=True)
class _Member:
    node: str
    order: StartProcess
    record: ProcessRecord | None = None
    """Once it is known to run."""
    is_unwanted: bool = False


@dataclass(slots=True)
class Node:
    name: str
    state: str = "starting"
    """A state of `NODE_LIFE`."""
    is_launching: bool = False
    keeper_pid: int | None = None
    agent_incarnation: int = 0
    silent_since_s: float | None = None
    lost_since_s: float | None = None
    num_failures: int = 0
    launch_at_s: float | None = None
    """While it is away: when to try again, or when the current launch has failed."""
    members: dict[str, _Member] = field(default_factory=dict)
    earlier: list[str] = field(default_factory=list)

    def to(self, state: str) -> None:
        """Enter another state. Raises `IllegalTransition`, with the story of the node."""
        if state != self.state:
            NODE_LIFE.check(self.state, state, lambda: f"node {self.name} ({', '.join([*self.earlier, self.state])})")
            self.earlier = [*self.earlier[-15:], self.state]
            self.state = state

    @property
    def is_up(self) -> bool:
        """Whether orders reach it, possibly late while it is silent."""
        return self.state in ("up", "silent")


class Fleet:
    """All nodes and processes. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self, plan: RunPlan, *, lost_after_s: float) -> None:
        self._specs = {spec.name: spec for spec in plan.processes}
        self._lost_after_s = lost_after_s
        self._grace_s: float | None = None  # of the processes, once the fleet is to end
        self.nodes = {name: Node(name) for name in plan.nodes}

    @property
    def running(self) -> tuple[str, ...]:
        """The processes that were ordered and have not ended."""
        return tuple(name for node in self.nodes.values() for name in node.members)

    @property
    def pids(self) -> dict[str, int]:
        """The pid of each process that is known to run, on its node."""
        members = (member for node in self.nodes.values() for member in node.members.items())
        return {name: member.record.pid for name, member in members if member.record is not None}

    @property
    def is_over(self) -> bool:
        return self._grace_s is not None and not any(node.is_up for node in self.nodes.values())

    # --- what is wanted --------------------------------------------------------------------------------------

    def begin(self, now_s: float) -> list[Step]:
        return [step for node in self.nodes.values() for step in self._launch(node, now_s)]

    def start(self, name: str, incarnation: int) -> list[Step]:
        """Start a process, as soon as its node is up."""
        assert name not in self.running, f"{name} is running"
        node = self._node_of(name)
        member = _Member(node.name, StartProcess(self._specs[name], incarnation))
        node.members[name] = member
        return [Tell(node.name, member.order)] if node.is_up else []

    def stop(self, name: str, grace_s: float) -> list[Step]:
        """Ask a process to leave, and kill it if it does not. No effect if it has ended."""
        return self._end_process(name, lambda incarnation: messages.StopProcess(name, incarnation, grace_s))

    def kill(self, name: str) -> list[Step]:
        """Kill a process. No effect if it has ended."""
        return self._end_process(name, lambda incarnation: messages.KillProcess(name, incarnation))

    def _end_process(self, name: str, order: Callable[[int], Order]) -> list[Step]:
        node = self._node_of(name)
        member = node.members.get(name)
        if member is None or not node.is_up:
            return self._give_up(node, name)
        member.is_unwanted = True
        return [Tell(node.name, order(member.order.incarnation))]

    def restart_agent(self, node: str) -> list[Step]:
        found = self.nodes[node]
        return [Tell(node, messages.RestartAgent(found.agent_incarnation))] if found.is_up else []

    def end(self, grace_s: float) -> list[Step]:
        """Make every node stop its processes, report their exits, and end."""
        self._grace_s = grace_s
        steps: list[Step] = []
        for node in self.nodes.values():
            node.launch_at_s = None
            if node.is_up:
                steps.append(Tell(node.name, messages.EndNode(grace_s)))
            else:
                steps += [step for name in tuple(node.members) for step in self._give_up(node, name)]
        return steps

    # --- what happens ----------------------------------------------------------------------------------------

    def reported(self, node_name: str, agent_incarnation: int, report: Report, now_s: float) -> list[Step]:
        node = self.nodes[node_name]
        match report:
            case messages.NodeStatus():
                return self._stands(node, agent_incarnation, report, now_s)
            case messages.ProcessStarted(record=record):
                return self._runs(node, record)
            case messages.ProcessNotStarted(name=name, incarnation=incarnation, error=error):
                if self._is_current(node, name, incarnation):
                    del node.members[name]
                    return [NotStarted(name, error)]
            case messages.ProcessLeft(exit=ended):
                return self._left(node, ended)
        return []

    def heard(self, node_name: str) -> None:
        """The link to the agent of a node is up."""
        node = self.nodes[node_name]
        if node.state == "silent":
            node.to("up")
        node.silent_since_s = None

    def silent(self, node_name: str, reason: str, now_s: float) -> list[Step]:
        """The link to the agent of a node is down."""
        node = self.nodes[node_name]
        if not node.is_up or node.silent_since_s is not None:
            return []
        if self._grace_s is not None:  # the last agent has left
            return self._lose(node, reason, now_s)
        node.to("silent")
        node.silent_since_s = now_s
        return [NodeSilent(node_name, reason)]

    def keeper_ended(self, node_name: str, reason: str, now_s: float) -> list[Step]:
        """The keeper of a node has ended, and with it all of its processes."""
        return self._lose(self.nodes[node_name], reason, now_s)

    def launch_failed(self, node_name: str, reason: str, now_s: float, culprit: str | None = None) -> list[Step]:
        """The agent of a node could not be started. If the node was never up, its orders fail too."""
        node = self.nodes[node_name]
        if node.state == "starting":
            node.is_launching, node.launch_at_s = False, None
            names, node.members = tuple(node.members), {}
            return [NodeFailed(node_name, reason, culprit), *(NotStarted(name, reason) for name in names)]
        node.is_launching = False
        node.num_failures += 1
        node.launch_at_s = now_s + backoff_s(node.num_failures, *_BACKOFF_S)
        return []

    def tick(self, now_s: float) -> list[Step]:
        steps: list[Step] = []
        for node in self.nodes.values():
            if node.is_up and node.silent_since_s is not None and now_s - node.silent_since_s >= self._lost_after_s:
                silent_s = now_s - node.silent_since_s
                steps += self._lose(node, f"it was not heard for another {silent_s:.0f} s", now_s)
            elif not node.is_up and node.launch_at_s is not None and now_s >= node.launch_at_s:
                if node.is_launching:
                    reason = f"its agent has not reported within {COMES_UP_WITHIN_S:g} s"
                    steps += self.launch_failed(node.name, reason, now_s, agent_name(node.name))
                else:
                    steps += self._launch(node, now_s)
        return steps

    # --- inside ----------------------------------------------------------------------------------------------

    def _node_of(self, name: str) -> Node:
        return self.nodes[self._specs[name].node]

    def _launch(self, node: Node, now_s: float) -> list[Step]:
        node.is_launching, node.launch_at_s = True, now_s + COMES_UP_WITHIN_S
        return [Launch(node.name)]

    def _stands(self, node: Node, agent_incarnation: int, report: messages.NodeStatus, now_s: float) -> list[Step]:
        away_s = None if node.lost_since_s is None else now_s - node.lost_since_s
        node.to("up")
        node.is_launching, node.launch_at_s, node.num_failures = False, None, 0
        node.silent_since_s = node.lost_since_s = None
        node.keeper_pid, node.agent_incarnation = report.keeper.pid, agent_incarnation
        steps: list[Step] = [NodeCame(node.name, agent_incarnation, away_s)]
        for record in report.running:
            steps += self._runs(node, record)
        for ended in report.ended:
            steps += self._left(node, ended)
        steps += self._give_up_running(node, {record.name for record in report.running})  # ended with their keeper
        # It was ordered to start and then to stop, but the keeper that knew of the stop is dead: do not start it again.
        unseen = [name for name, member in node.members.items() if member.record is None]
        for name in [name for name in unseen if self._grace_s is not None or node.members[name].is_unwanted]:
            steps += self._give_up(node, name)
        if self._grace_s is not None:  # it came up too late, or this agent does not know of the end
            return [*steps, Tell(node.name, messages.EndNode(self._grace_s))]
        return steps + [Tell(node.name, member.order) for member in node.members.values() if member.record is None]

    def _runs(self, node: Node, record: ProcessRecord) -> list[Step]:
        if not self._is_current(node, record.name, record.incarnation):
            return [Tell(node.name, messages.KillProcess(record.name, record.incarnation))]
        member = node.members[record.name]
        if member.record is not None:
            return []
        member.record = record
        return [Started(record)]

    def _left(self, node: Node, ended: ProcessExit) -> list[Step]:
        if not self._is_current(node, ended.name, ended.incarnation):
            return []
        del node.members[ended.name]
        return [Ended(ended)]

    def _is_current(self, node: Node, name: str, incarnation: int) -> bool:
        return name in node.members and node.members[name].order.incarnation == incarnation

    def _lose(self, node: Node, reason: str, now_s: float) -> list[Step]:
        """Its running processes are given up. Processes that were ordered and did not run yet wait for the node."""
        if not node.is_up:
            is_wanted = node.is_launching and self._grace_s is None
            return self.launch_failed(node.name, reason, now_s, keeper_name(node.name)) if is_wanted else []
        node.to("lost")
        node.silent_since_s, node.lost_since_s, node.keeper_pid = None, now_s, None
        gone = self._give_up_running(node, set())
        return gone if self._grace_s is not None else [NodeLost(node.name, reason), *gone, *self._launch(node, now_s)]

    def _give_up_running(self, node: Node, still: set[str]) -> list[Step]:
        gone = [name for name, member in node.members.items() if member.record is not None and name not in still]
        return [step for name in gone for step in self._give_up(node, name)]

    def _give_up(self, node: Node, name: str) -> list[Step]:
        member = node.members.pop(name, None)
        if member is None:
            return []
        pid = member.record.pid if member.record is not None else 0
        return [Ended(ProcessExit(name, pid, _KILLED, member.order.incarnation))]

    def validate(self) -> None:
        for node in self.nodes.values():
            assert (node.state == "silent") == (node.silent_since_s is not None), node.name
            assert not (node.is_up and node.is_launching), node.name
            assert node.is_up or not any(member.record for member in node.members.values()), node.name
            assert node.is_up == (node.keeper_pid is not None), node.name
