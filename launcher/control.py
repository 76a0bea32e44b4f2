"""The launcher's end of the `launcher` link, as narrow as a run needs it: hear every process, tell one to leave.

This is also the seam for several machines: an agent that relays for the processes of its node is another
`Control`, and `run` does not change.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from darts_async.config import TransportConfig
from darts_async.protocol import LauncherToProcess, ProcessToLauncher
from darts_async.topology import LAUNCHER, RunPlan
from darts_async.transport import Endpoint, Link, Mailbox, PeerDown, Received, load_keys
from launcher.rundir import KEYS_DIR


@dataclass(frozen=True, slots=True)
class Silence:
    """The connection to a process is down; it may come back."""

    reason: str


@dataclass(frozen=True, slots=True)
class Heard:
    """Something came from a process, from this incarnation of it."""

    process: str
    incarnation: int
    body: ProcessToLauncher | Silence


class Control(Protocol):
    """Messages from and to the processes of a run."""

    async def receive(self, timeout_s: float) -> list[Heard]:
        """What has arrived, in order; empty after `timeout_s` without anything."""

    def send(self, process: str, message: LauncherToProcess) -> None:
        """Have a message delivered. A process that is gone does not get it, and that is no error."""

    def forget(self, process: str) -> None:
        """A process has ended: what it did not acknowledge is for nobody."""


class LinkControl:
    """The `launcher` link."""

    def __init__(self, link: Link, mailbox: Mailbox) -> None:
        self._link = link
        self._mailbox = mailbox

    async def receive(self, timeout_s: float) -> list[Heard]:
        """What has arrived. Acknowledges what the call before returned."""
        heard = []
        for event in await self._mailbox.receive(timeout_s):
            match event:
                case Received(message=message):
                    heard.append(Heard(event.peer, event.incarnation, cast(ProcessToLauncher, message)))
                case PeerDown(reason=reason):
                    heard.append(Heard(event.peer, event.incarnation, Silence(reason)))
        return heard

    def send(self, process: str, message: LauncherToProcess) -> None:
        """Queue a message; a process that is not connected yet gets it when it is."""
        self._link.send(process, message)

    def forget(self, process: str) -> None:
        """Do not wait for its acknowledgements when the link is closed."""
        self._link.forget(process)


@contextlib.asynccontextmanager
async def open_control(plan: RunPlan, run_dir: Path, config: TransportConfig) -> AsyncIterator[Control]:
    """Bind the `launcher` link. Raises `TransportError` if its address cannot be bound."""
    link_plan = plan.link("launcher")
    keys = load_keys(run_dir / KEYS_DIR, LAUNCHER)
    mailbox = Mailbox()
    endpoint = Endpoint(name=LAUNCHER, incarnation=1, keys=keys, config=config, mailbox=mailbox)
    try:
        link = endpoint.bind_link(
            name=link_plan.name,
            address=link_plan.address,
            receives=ProcessToLauncher,
            sends=LauncherToProcess,
            allowed={name: keys.public_of(name) for name in link_plan.members},
        )
        yield LinkControl(link, mailbox)
        mailbox.acknowledge()
    finally:
        await endpoint.close()
