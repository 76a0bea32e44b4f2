"""The messages of the link `agents`: orders of the launcher to a node, and reports of a node.

    LAUNCHER -> AGENT -> KEEPER   StartProcess, StopProcess, KillProcess, RestartAgent, EndNode
    KEEPER -> AGENT -> LAUNCHER   NodeStatus, ProcessStarted, ProcessNotStarted, ProcessLeft

The agent of a node relays them unread between the authenticated link and its parent, the keeper. It also tells the
keeper whether the launcher is heard (`Pulse`), and learns from it when the node has ended (`NodeEnded`).

An order may arrive twice, because an agent may die before it acknowledges an order that it has relayed. A report may be
lost with its agent. So orders are idempotent (they name an incarnation), and every agent begins with `NodeStatus`,
which contains what all earlier reports said.
"""

from darts_async.protocol import Message
from darts_async.topology.plan import ProcessSpec
from launcher.nodes.supervisor import ProcessExit, ProcessRecord


class StartProcess(Message, frozen=True):
    """Start this incarnation of a process, after killing an earlier one that still runs. Answered by `ProcessStarted`
    or `ProcessNotStarted`. No effect if this incarnation, or a later one, was started before."""

    spec: ProcessSpec
    incarnation: int


class StopProcess(Message, frozen=True):
    """Ask a process to leave, and kill the rest of its session after `grace_s`."""

    name: str
    incarnation: int
    grace_s: float


class KillProcess(Message, frozen=True):
    """Kill the session of a process."""

    name: str
    incarnation: int


class RestartAgent(Message, frozen=True):
    """This incarnation of the agent ends, and the keeper starts the next one. Other processes continue. A later agent
    may receive this message again, if it was not acknowledged."""

    incarnation: int


class EndNode(Message, frozen=True):
    """Stop all processes of the node, report their exits, and leave."""

    grace_s: float


Order = StartProcess | StopProcess | KillProcess | RestartAgent | EndNode


class NodeStatus(Message, frozen=True):
    """The state of the node: its running processes, and how the last incarnation of every other process ended. A new
    `keeper` means that the previous one died, and with it all of its processes."""

    keeper: ProcessRecord
    running: list[ProcessRecord]
    ended: list[ProcessExit]


class ProcessStarted(Message, frozen=True):
    """A process has started."""

    record: ProcessRecord


class ProcessNotStarted(Message, frozen=True):
    """The operating system could not start a process."""

    name: str
    incarnation: int
    error: str


class ProcessLeft(Message, frozen=True):
    """A process and the rest of its session have ended."""

    exit: ProcessExit


Report = NodeStatus | ProcessStarted | ProcessNotStarted | ProcessLeft


class Pulse(Message, frozen=True):
    """The agent is alive. Says whether it hears the launcher."""

    launcher_is_heard: bool


class NodeEnded(Message, frozen=True):
    """The node has ended: deliver the last reports, and leave."""


ToKeeper = Order | Pulse
FromKeeper = Report | NodeEnded
