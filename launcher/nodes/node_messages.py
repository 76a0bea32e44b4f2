"""What the launcher orders of a node, and what a node reports: the messages of the link `agents`.

    LAUNCHER -> AGENT -> KEEPER   StartProcess, StopProcess, KillProcess, RestartAgent, EndNode
    KEEPER -> AGENT -> LAUNCHER   NodeStands, ProcessStarted, ProcessNotStarted, ProcessLeft

The agent of a node passes them on unread, between the authenticated link and the keeper that is its parent; beside them
it tells the keeper whether the launcher is heard (`Pulse`), and is told when all is over (`NodeEnded`).

An order may come twice, since an agent may die between passing it on and saying so; a report may be lost with the agent
that had it. So orders are idempotent (they name the incarnation that is meant), and every agent begins with
`NodeStands`, which says all that any report could have said.
"""

from darts_async.protocol import Message
from darts_async.topology.plan import ProcessSpec
from launcher.nodes.supervisor import ProcessExit, ProcessRecord


class StartProcess(Message, frozen=True):
    """Start this incarnation of a process; one before it that still runs is killed first. Answered by
    `ProcessStarted` or `ProcessNotStarted`; nothing where this incarnation, or a later one, was started before."""

    spec: ProcessSpec
    incarnation: int


class StopProcess(Message, frozen=True):
    """Ask a process to leave, and kill what is left of its session after `grace_s`."""

    name: str
    incarnation: int
    grace_s: float


class KillProcess(Message, frozen=True):
    """Kill the session of a process."""

    name: str
    incarnation: int


class RestartAgent(Message, frozen=True):
    """This incarnation of the agent ends, and the keeper starts the next one; processes go on. Whoever comes after it
    may be sent this again, if it ended before its word of having read this got through."""

    incarnation: int


class EndNode(Message, frozen=True):
    """Nothing more is wanted of the node: stop what runs, report it, and leave."""

    grace_s: float


Order = StartProcess | StopProcess | KillProcess | RestartAgent | EndNode


class NodeStands(Message, frozen=True):
    """How the node stands: what runs, and how the last incarnation of every other process ended. `keeper` is another
    one after the death of a keeper, which takes all its processes with it."""

    keeper: ProcessRecord
    running: list[ProcessRecord]
    ended: list[ProcessExit]


class ProcessStarted(Message, frozen=True):
    """A process runs."""

    record: ProcessRecord


class ProcessNotStarted(Message, frozen=True):
    """The system would not start it."""

    name: str
    incarnation: int
    error: str


class ProcessLeft(Message, frozen=True):
    """A process has ended, and with it the rest of its session."""

    exit: ProcessExit


Report = NodeStands | ProcessStarted | ProcessNotStarted | ProcessLeft


class Pulse(Message, frozen=True):
    """The agent lives, and the launcher is heard or not."""

    launcher_is_heard: bool


class NodeEnded(Message, frozen=True):
    """Everything has been reported: deliver it, and leave."""


ToKeeper = Order | Pulse
FromKeeper = Report | NodeEnded
