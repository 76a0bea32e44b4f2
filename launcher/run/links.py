"""The launcher's links: receive from processes and node agents, ask processes to leave, and send orders to nodes."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from darts_async.config import TransportConfig
from darts_async.protocol import LauncherToProcess, ProcessToLauncher
from darts_async.topology.links import AGENTS_LINK, LAUNCHER_LINK
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import LAUNCHER, agent_name
from darts_async.topology.run_files import KEYS_DIR
from darts_async.transport import Endpoint, Event, Link, Mailbox, load_keys
from launcher.nodes.node_messages import Order, Report


class Control:
    """The links `launcher` and `agents`. Nothing that is sent has to be connected yet, or still."""

    def __init__(self, link: Link, agents: Link, mailbox: Mailbox) -> None:
        self._link = link
        self._agents = agents
        self._mailbox = mailbox

    async def receive(self, timeout_s: float) -> list[Event]:
        """What has arrived on both links, in order. Acknowledges what the previous call returned."""
        return await self._mailbox.receive(timeout_s)

    def send(self, process: str, message: LauncherToProcess) -> None:
        self._link.send(process, message)

    def forget(self, process: str) -> None:
        """A process has ended: drop the messages that it did not acknowledge."""
        self._link.forget(process)

    def order(self, node: str, order: Order) -> None:
        """Send an order to the agent of a node, or to its successor."""
        self._agents.send(agent_name(node), order)

    def forget_node(self, node: str) -> None:
        """A node is given up: drop the orders that its agent did not acknowledge."""
        self._agents.forget(agent_name(node))


@contextlib.asynccontextmanager
async def open_control(plan: RunPlan, run_dir: Path, config: TransportConfig, life: int = 1) -> AsyncIterator[Control]:
    """Bind both links. Raises `TransportError` if an address is not available."""
    keys = load_keys(run_dir / KEYS_DIR, LAUNCHER)
    mailbox = Mailbox()
    endpoint = Endpoint(name=LAUNCHER, incarnation=life, keys=keys, config=config, mailbox=mailbox)

    def bind(name: str, receives: Any, sends: Any) -> Link:
        link = plan.link(name)
        allowed = {member: keys.public_of(member) for member in link.members}
        return endpoint.bind_link(name=name, address=link.address, receives=receives, sends=sends, allowed=allowed)

    try:
        link = bind(LAUNCHER_LINK.name, ProcessToLauncher, LauncherToProcess)
        yield Control(link, bind(AGENTS_LINK.name, Report, Order), mailbox)
        mailbox.acknowledge()
    finally:
        await endpoint.close()
