"""The agent of a node relays messages between the launcher and the keeper, its parent.

It uses the authenticated link `agents`; `node_messages` says what may arrive twice. It has no state. When it dies, the
keeper starts another agent, which begins with the state of the node, and no other process is affected.
"""

import argparse
import asyncio
import socket
import sys
import time
from pathlib import Path
from typing import cast

import structlog
import uvloop
import yaml

from darts_async.config import RunConfig
from darts_async.errors import DartsError
from darts_async.faults import install, present
from darts_async.telemetry import logging_to
from darts_async.topology.links import AGENTS_LINK
from darts_async.topology.plan import read_plan
from darts_async.topology.roles import LAUNCHER, agent_name
from darts_async.topology.run_files import CONFIG_FILE, KEYS_DIR, LOGS_DIR, log_path
from darts_async.transport import Endpoint, Link, Mailbox, PeerDown, PeerUp, Received, load_keys
from darts_async.wire.channel import Channel
from launcher.nodes.node_messages import FromKeeper, NodeEnded, Order, Pulse, Report, RestartAgent

PULSE_S = 0.5
FAREWELL_S = 8.0
"""How long the last reports may take to be acknowledged."""

log = structlog.get_logger()


class Agent:
    """Relays between a link and a keeper."""

    def __init__(self, incarnation: int, link: Link, mailbox: Mailbox, channel: Channel[FromKeeper]) -> None:
        self._incarnation = incarnation
        self._link = link
        self._mailbox = mailbox
        self._channel = channel
        self._over = asyncio.Event()

    async def relay(self) -> None:
        """Relay until the keeper has ended or says so, or another agent replaces this one."""
        async with asyncio.TaskGroup() as tasks:
            relays = [
                tasks.create_task(self._pass_orders(), name="pass orders"),
                tasks.create_task(self._pass_reports(), name="pass reports"),
            ]
            await self._over.wait()
            for relay in relays:
                relay.cancel()

    async def _pass_orders(self) -> None:
        launcher_is_heard, pulse_at_s = False, 0.0
        while True:
            for event in await self._mailbox.receive(PULSE_S):
                match event:
                    case PeerUp():
                        launcher_is_heard = True
                    case PeerDown(reason=reason):
                        launcher_is_heard = False
                        log.warning("launcher_silent", reason=reason)
                    case Received(message=RestartAgent(incarnation=incarnation)):
                        if incarnation == self._incarnation:
                            self._over.set()
                    case Received(message=order):
                        present().reach("agent.before_order")
                        self._channel.send(cast(Order, order))
            if time.monotonic() >= pulse_at_s:
                self._channel.send(Pulse(launcher_is_heard))
                pulse_at_s = time.monotonic() + PULSE_S

    async def _pass_reports(self) -> None:
        while (message := await self._channel.receive()) is not None and not isinstance(message, NodeEnded):
            present().reach("agent.before_report")
            self._link.send(LAUNCHER, message)
        self._over.set()


async def _run(arguments: argparse.Namespace, config: RunConfig) -> None:
    name, run_dir = agent_name(arguments.node), arguments.run_dir
    install(name, arguments.incarnation)
    keys, mailbox = load_keys(run_dir / KEYS_DIR, name), Mailbox()
    channel: Channel[FromKeeper] = await Channel.over(socket.socket(fileno=arguments.channel), FromKeeper)
    endpoint = Endpoint(name, arguments.incarnation, keys, config.transport, mailbox)
    try:
        link = endpoint.connect_link(
            name=AGENTS_LINK.name,
            address=read_plan(run_dir).link(AGENTS_LINK.name).address,
            peer=LAUNCHER,
            peer_key=keys.public_of(LAUNCHER),
            receives=Order,
            sends=Report,
        )
        await Agent(arguments.incarnation, link, mailbox, channel).relay()
        mailbox.acknowledge()
        await link.close(FAREWELL_S)
    finally:
        await channel.close()
        await endpoint.close()


def main() -> None:
    """Entry point: `launcher.nodes.agent --run-dir DIR --node NAME --incarnation N --channel FD`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--channel", type=int, required=True)
    arguments = parser.parse_args()
    name = agent_name(arguments.node)
    config = RunConfig.model_validate(yaml.safe_load((arguments.run_dir / CONFIG_FILE).read_text()))
    path, telemetry = log_path(arguments.run_dir / LOGS_DIR, name), config.telemetry
    with logging_to(path, process=name, level=telemetry.log_level, max_mb=telemetry.log_max_mb):
        try:
            uvloop.run(_run(arguments, config))
        except* DartsError as group:
            for error in group.exceptions:
                log.error("died", error=str(error))
            sys.exit(1)


if __name__ == "__main__":
    main()
