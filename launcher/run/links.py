"""The launcher's links: receive from processes and node agents, ask processes to leave, and send orders to nodes."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from darts_async.config import TransportConfig
from darts_async.protocol import LauncherToProcess, ProcessToLauncher
from darts_async.topology.links import AGENTS_LINK, LAUNCHER_LINK
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import LAUNCHER, agent_name
from darts_async.topology.run_files import KEYS_DIR
from darts_async.transport import Endpoint, Event, Link, Mailbox, PeerDown, PeerUp, Received, Unreadable, load_keys
from launcher.nodes.node_messages import Order, Report


@dataclass(frozen=True, slots=True)
class Silence:
    """The connection to a process is down, perhaps for a time."""

    reason: str


@dataclass(frozen=True, slots=True)
class Presence:
    """The connection to an agent is up."""


@dataclass(frozen=True, slots=True)
class Gibberish:
    """A frame that is not a message of the link. It is lost."""

    reason: str


@dataclass(frozen=True, slots=True)
class HeardOfNode:
    """A message or event of this incarnation of the agent of a node."""

    node: str
    incarnation: int
    body: Report | Presence | Silence | Gibberish


@dataclass(frozen=True, slots=True)
class Heard:
    """A message or event of this incarnation of a process."""

    process: str
    incarnation: int
    body: ProcessToLauncher | Silence | Gibberish


class Control(Protocol):
    """Messages from and to the processes of a run."""

    async def receive(self, timeout_s: float) -> list[Heard | HeardOfNode]:
        """What has arrived, in order; empty if nothing arrives within `timeout_s`."""

    def send(self, process: str, message: LauncherToProcess) -> None:
        """Send a message. It is not an error if the process has ended."""

    def forget(self, process: str) -> None:
        """A process has ended: drop the messages that it did not acknowledge."""

    def order(self, node: str, order: Order) -> None:
        """Send an order to the agent of a node, or to its successor."""

    def forget_node(self, node: str) -> None:
        """A node is given up: drop the orders that its agent did not acknowledge."""


class LinkControl:
    """The links `launcher` and `agents`."""

    def __init__(self, link: Link, agents: Link, mailbox: Mailbox) -> None:
        self._link = link
        self._agents = agents
        self._mailbox = mailbox

    async def receive(self, timeout_s: float) -> list[Heard | HeardOfNode]:
        """What has arrived. Acknowledges what the previous call returned."""
        heard: list[Heard | HeardOfNode] = []
        for event in await self._mailbox.receive(timeout_s):
            if event.link == AGENTS_LINK.name:
                heard.append(_of_node(event))
                continue
            match event:
                case Received(message=message):
                    heard.append(Heard(event.peer, event.incarnation, cast(ProcessToLauncher, message)))
                case PeerDown(reason=reason):
                    heard.append(Heard(event.peer, event.incarnation, Silence(reason)))
                case Unreadable(reason=reason):
                    heard.append(Heard(event.peer, event.incarnation, Gibberish(reason)))
        return heard

    def send(self, process: str, message: LauncherToProcess) -> None:
        """Queue a message. A process that is not connected yet gets it later."""
        self._link.send(process, message)

    def forget(self, process: str) -> None:
        """Do not wait for its acknowledgements when the link is closed."""
        self._link.forget(process)

    def order(self, node: str, order: Order) -> None:
        """Queue an order."""
        self._agents.send(agent_name(node), order)

    def forget_node(self, node: str) -> None:
        """Drop the orders that have not been acknowledged."""
        self._agents.forget(agent_name(node))


def _of_node(event: Event) -> HeardOfNode:
    node, incarnation = event.peer.partition("/")[2], event.incarnation
    match event:
        case Received(message=message):
            return HeardOfNode(node, incarnation, cast(Report, message))
        case PeerDown(reason=reason):
            return HeardOfNode(node, incarnation, Silence(reason))
        case PeerUp():
            return HeardOfNode(node, incarnation, Presence())
        case Unreadable(reason=reason):
            return HeardOfNode(node, incarnation, Gibberish(reason))


@contextlib.asynccontextmanager
async def open_control(plan: RunPlan, run_dir: Path, config: TransportConfig, life: int = 1) -> AsyncIterator[Control]:
    """Bind both links; `life` numbers the starts of the launcher. Raises `TransportError` if an address is not
    available."""
    keys = load_keys(run_dir / KEYS_DIR, LAUNCHER)
    mailbox = Mailbox()
    endpoint = Endpoint(name=LAUNCHER, incarnation=life, keys=keys, config=config, mailbox=mailbox)

    def bind(name: str, receives: Any, sends: Any) -> Link:
        link = plan.link(name)
        allowed = {member: keys.public_of(member) for member in link.members}
        return endpoint.bind_link(name=name, address=link.address, receives=receives, sends=sends, allowed=allowed)

    try:
        link = bind(LAUNCHER_LINK.name, ProcessToLauncher, LauncherToProcess)
        yield LinkControl(link, bind(AGENTS_LINK.name, Report, Order), mailbox)
        mailbox.acknowledge()
    finally:
        await endpoint.close()
