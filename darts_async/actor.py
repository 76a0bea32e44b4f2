"""The main loop that all processes share: open, receive, handle, send, close.

A process is an *actor*: it owns its state and communicates only by messages. `main` opens the links of this process and
passes events to the actor one after another. They are acknowledged when the next batch is requested. Long work runs in
tasks of one task group: if a task fails, the process ends with its error, and the launcher reports it.

Shutdown order: the actor is asked to end (`shutdown`) and reports when it is `done`; its tasks are cancelled and
awaited; it `close`s its resources; the last status is sent; the links wait for acknowledgements.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import structlog
import uvloop
import yaml

from darts_async.config import RunConfig
from darts_async.errors import (
    NO_SPACE_EXIT_CODE,
    PERMANENT_ERRORS,
    PERMANENT_EXIT_CODE,
    DartsError,
    OutboxFullError,
    ProtocolError,
)
from darts_async.faults import Faults, install
from darts_async.machine.full_disk import Patience, is_no_space
from darts_async.machine.spawn import raise_open_files
from darts_async.protocol import Message, PeerRefused, ProcessEnded, ProcessStatus, Shutdown
from darts_async.telemetry import BusyClock, logging_to
from darts_async.topology.links import LAUNCHER_LINK, RANKS_LINK, link_named
from darts_async.topology.plan import RunPlan, read_plan
from darts_async.topology.roles import LAUNCHER
from darts_async.topology.run_files import CONFIG_FILE, KEYS_DIR, LOGS_DIR, log_path
from darts_async.trace import Trace, trace_path
from darts_async.transport import Endpoint, Event, Link, Mailbox, PeerDown, Received, RunKeys, Unreadable, load_keys

TERMINATED = Shutdown("SIGTERM", finished=False)
"""The process must leave, whatever happens to the run."""

THREADS_END_WITHIN_S = 5.0
"""A process that ends by an error waits this long for its threads."""

MAX_REASON_CHARACTERS = 500
"""Longest reason of a refusal in the report to the launcher; a reason may quote the peer's message."""

TICK_S = 0.25
"""The actor's `tick` is called at least this often."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """What an actor shows of itself."""

    state: str
    policy_version: int = -1
    num_tokens: int = 0
    num_in_flight: int = 0


class Actor(Protocol):
    """A process of the run."""

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Load what takes long; start the tasks."""

    def handle(self, event: Event) -> None:
        """An event of a link (except the launcher's). A message may have any content that its type allows. The actor
        must refuse an invalid message (`Runtime.refuse`) before it has any effect."""

    def tick(self, now_s: float) -> None:
        """Time has passed, and all events so far are handled. `now_s` is monotonic."""

    def shutdown(self, message: Shutdown) -> None:
        """The launcher or a signal (`TERMINATED`) asks the process to end."""

    @property
    def done(self) -> bool:
        """Whether the loop may end."""

    def gauges(self) -> Gauges:
        """The gauges of the status."""

    async def close(self) -> None:
        """Release all resources. Called once, after all tasks of the actor have ended, also after an error."""


@dataclass
class Runtime:
    """The context of an actor: its identity, the run, and its links."""

    name: str
    incarnation: int
    run_dir: Path
    config: RunConfig
    plan: RunPlan
    keys: RunKeys
    mailbox: Mailbox
    endpoint: Endpoint
    links: dict[str, Link] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    clock: BusyClock = field(default_factory=BusyClock)
    faults: Faults = field(default_factory=Faults)
    patience: Patience = field(default_factory=lambda: Patience(0.0))
    """For writes outside the event loop."""
    heard: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """What an earlier incarnation has stored: see `Endpoint.bind_link`. Set it before the links are opened."""

    refused: dict[tuple[str, str], int] = field(default_factory=dict)
    """{(link, peer): the newest refused incarnation}"""

    @property
    def host(self) -> str:
        """Address of this node, which all sockets of the process bind to."""
        return self.plan.process(self.name).host

    def send(self, link: str, peer: str, message: Message) -> None:
        """Queue a message for a peer. A peer that is up, but has not read until its outbox is full, is refused."""
        try:
            self.links[link].send(peer, message)
        except OutboxFullError as error:
            if self.plan.link(link).hub != self.name or peer not in self.links[link].peers:
                raise
            self._refuse(link, peer, self.links[link].incarnation(peer), str(error))

    def refuse(self, event: Event, reason: str) -> None:
        """Refuse this incarnation of a peer, because it sends invalid messages. Its link ends as if it had died
        (`PeerDown` follows), its other messages are dropped, and the launcher restarts it. So a faulty peer only harms
        itself.

        A member that refuses its hub waits for the hub's next incarnation: see `accusations`.

        Raises:
            ProtocolError: the peer is the first rank of the learner. All ranks restart together, so this one ends.
        """
        if event.link == RANKS_LINK.name and self.plan.link(event.link).hub != self.name:
            self.tell_launcher(PeerRefused(event.peer, event.incarnation, reason[:MAX_REASON_CHARACTERS]))
            raise ProtocolError(f"{event.peer} sends an invalid message: {reason}")
        self._refuse(event.link, event.peer, event.incarnation, reason)

    def is_refused(self, event: Event) -> bool:
        """Whether this is a message of a refused incarnation."""
        refused = self.refused.get((event.link, event.peer), -1)
        return isinstance(event, Received | Unreadable) and event.incarnation <= refused

    def _refuse(self, link: str, peer: str, incarnation: int, reason: str) -> None:
        structlog.get_logger().error("peer_refused", link=link, peer=peer, incarnation=incarnation, reason=reason)
        known = min(incarnation, self.links[link].incarnation(peer))
        self.refused[link, peer] = max(known, self.refused.get((link, peer), -1))
        self.links[link].end(peer, known, forget=self.plan.link(link).hub == self.name)
        self.tell_launcher(PeerRefused(peer, incarnation, reason[:MAX_REASON_CHARACTERS]))

    def tell_launcher(self, message: Message) -> None:
        """Queue a message for the launcher."""
        self.send(LAUNCHER_LINK.name, LAUNCHER, message)

    def process_ended(self, ended: ProcessEnded) -> None:
        """The launcher reports the end of a process. Messages of a hub to it are dropped; messages of a member are kept
        for the next incarnation of the hub."""
        for plan in self.plan.links:
            link, is_hub = self.links.get(plan.name), plan.hub == self.name
            if link is not None and ended.name in (plan.members if is_hub else (plan.hub,)):
                link.end(ended.name, ended.incarnation, forget=is_hub)

    def open_links(self) -> None:
        """Bind the links whose hub this process is, and connect the others."""
        for plan in self.plan.links:
            said, name, address, key_of = link_named(plan.name), plan.name, plan.address, self.keys.public_of
            hub, member = said.hub_sends, said.member_sends
            if plan.hub == self.name:
                allowed = {each: key_of(each) for each in plan.members}
                self.links[name] = self.endpoint.bind_link(
                    name=name, address=address, receives=member, sends=hub, allowed=allowed, heard=self.heard
                )
            elif self.name in plan.members:
                self.links[name] = self.endpoint.connect_link(
                    name=name, address=address, peer=plan.hub, peer_key=key_of(plan.hub), receives=hub, sends=member
                )


class _Done(Exception):
    """Raised in a task group to end the tasks in it."""


async def run_actor(runtime: Runtime, actor: Actor) -> None:
    """Pass events to the actor until it is done, then end its tasks and close it."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_report(runtime, actor), name="status")
            tasks.create_task(actor.open(tasks), name="open")
            await _feed(runtime, actor)
            raise _Done
    except* _Done:
        pass
    finally:
        await actor.close()
    runtime.tell_launcher(_report_now(runtime, actor, loop_lag_s=0.0))
    runtime.mailbox.acknowledge()
    structlog.get_logger().info("ended", uptime_s=runtime.clock.uptime_s, cpu_s=time.process_time())


async def _feed(runtime: Runtime, actor: Actor) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, actor.shutdown, TERMINATED)
    while not actor.done:
        for event in await runtime.mailbox.receive(TICK_S):
            _dispatch(runtime, actor, event)
        actor.tick(time.monotonic())


def _dispatch(runtime: Runtime, actor: Actor, event: Event) -> None:
    match event:
        case Received(link=LAUNCHER_LINK.name, message=ProcessEnded() as ended):
            runtime.process_ended(ended)
        case Received(link=LAUNCHER_LINK.name, message=Shutdown() as message):
            actor.shutdown(message)
        case PeerDown(link=LAUNCHER_LINK.name, reason=reason):  # had it died, the kernel would have ended this process
            structlog.get_logger().warning("launcher_silent", reason=reason)
        case Unreadable(link=LAUNCHER_LINK.name, reason=reason):  # no other process can change it
            structlog.get_logger().error("launcher_unreadable", reason=reason)
        case _ if event.link == LAUNCHER_LINK.name or runtime.is_refused(event):
            return
        case Unreadable(reason=reason):
            runtime.refuse(event, reason)
        case _:
            actor.handle(event)


async def _report(runtime: Runtime, actor: Actor) -> None:
    """Status at a fixed interval. A sleep that is too long shows that the event loop was held."""
    interval_s = runtime.config.telemetry.status_every_s
    lag_s = 0.0
    while True:
        runtime.tell_launcher(_report_now(runtime, actor, loop_lag_s=max(0.0, lag_s)))
        before_s = time.perf_counter()
        await asyncio.sleep(interval_s)
        lag_s = time.perf_counter() - before_s - interval_s


def _report_now(runtime: Runtime, actor: Actor, *, loop_lag_s: float) -> ProcessStatus:
    """The status. The trace is written up to now."""
    gauges = actor.gauges()
    runtime.clock.cut()
    runtime.trace.level(
        tokens=gauges.num_tokens,
        in_flight=gauges.num_in_flight,
        policy_version=gauges.policy_version,
        loop_lag_s=loop_lag_s,
        memory_mb=psutil.Process().memory_info().rss / 1e6,
    )
    runtime.trace.flush()
    return ProcessStatus(
        **asdict(gauges),
        uptime_s=runtime.clock.uptime_s,
        busy_s=runtime.clock.busy_s(),
        loop_lag_s=loop_lag_s,
        hindrance=runtime.patience.hindrance,
    )


def main(make_actor: Callable[[Runtime], Actor]) -> None:
    """Entry point of every process: `MODULE --run-dir DIR --name ROLE/N --incarnation N`."""
    raise_open_files()
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    arguments = parser.parse_args()
    config = RunConfig.model_validate(yaml.safe_load((arguments.run_dir / CONFIG_FILE).read_text()))
    path, telemetry = log_path(arguments.run_dir / LOGS_DIR, arguments.name), config.telemetry
    with logging_to(path, process=arguments.name, level=telemetry.log_level, max_mb=telemetry.log_max_mb):
        try:
            uvloop.run(_run(make_actor, config, arguments.run_dir, arguments.name, arguments.incarnation))
        except Exception as error:  # the end of a process: an error without an exit code is raised again
            _say_why(arguments.name, _leaves(error))
            code = _exit_code(_leaves(error))
            if code is None:
                raise
            _leave(code)
        finally:
            gc.freeze()  # or the interpreter searches all of torch for garbage before it ends: one or two seconds


def _say_why(name: str, errors: list[Exception]) -> None:
    """To the log and to standard error; a full disk accepts neither."""
    for error in errors:
        structlog.get_logger().error("died", error=str(error), kind=type(error).__name__)
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")


def _exit_code(errors: list[Exception]) -> int | None:
    """The exit code for errors; None if one of them is a bug, whose traceback is needed."""
    if any(isinstance(error, PERMANENT_ERRORS) for error in errors):
        return PERMANENT_EXIT_CODE
    if any(map(is_no_space, errors)):
        return NO_SPACE_EXIT_CODE
    return 1 if all(isinstance(error, DartsError) for error in errors) else None


def _leave(code: int) -> None:
    """End with this exit code. The interpreter would wait for every thread, but one that hangs in a collective may be
    why this process ends."""
    deadline_s = time.monotonic() + THREADS_END_WITHIN_S
    threads = [each for each in threading.enumerate() if each is not threading.main_thread() and not each.daemon]
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    hanging = [thread.name for thread in threads if thread.is_alive()]
    if hanging:
        structlog.get_logger().error("threads_hang", threads=hanging)
    if hanging or code == NO_SPACE_EXIT_CODE:  # the interpreter would change the code where it cannot flush its output
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


async def _run(
    make_actor: Callable[[Runtime], Actor], config: RunConfig, run_dir: Path, name: str, incarnation: int
) -> None:
    faults = install(name, incarnation)
    mailbox = Mailbox()
    keys = load_keys(run_dir / KEYS_DIR, name)
    endpoint = Endpoint(name=name, incarnation=incarnation, keys=keys, config=config.transport, mailbox=mailbox)
    runtime = Runtime(name, incarnation, run_dir, config, read_plan(run_dir), keys, mailbox, endpoint)
    runtime.faults, runtime.patience = faults, Patience(config.telemetry.no_space_timeout_s)
    if config.telemetry.trace:
        path, max_bytes = trace_path(run_dir, name, incarnation), int(config.telemetry.trace_max_mb * 1e6)
        has_samples = config.telemetry.trace_samples
        runtime.trace = Trace(path, name, incarnation, max_bytes, has_samples=has_samples)
        runtime.clock = BusyClock(runtime.trace)
    try:
        actor = make_actor(runtime)
        runtime.open_links()
        await run_actor(runtime, actor)
    finally:
        runtime.trace.close()
        await endpoint.close()


def _leaves(error: Exception) -> list[Exception]:
    """The errors of a nested group, or the one."""
    if not isinstance(error, ExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
