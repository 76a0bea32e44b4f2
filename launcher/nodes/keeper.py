"""The keeper of a node: the parent of the node's agent and of all its processes.

    launcher -- a child, or over ssh --> KEEPER --> agent       talks to the launcher, may die at any time
                                           |`-----> generator/0 ...
                                           `------> the kernel ends all of them if the keeper dies

The keeper carries out orders (see `node_messages`). On its own it does only three things. It restarts the agent when
the agent has ended or hangs, without effect on other processes. It remembers running processes and past exits, so that
a new agent can report them. It ends the node when the launcher has not been heard for the length of a lease. So no
process outlives its launcher for longer than that, and no exit is lost.

It opens no port and reads only its agent's messages.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import os
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from darts_async.errors import NoSpaceError, ProtocolError
from darts_async.faults import install, present
from darts_async.machine.spawn import module_command, raise_open_files, spawn
from darts_async.protocol import Message
from darts_async.telemetry import logging_to
from darts_async.topology.roles import agent_name, keeper_name
from darts_async.topology.run_files import LOGS_DIR, NODES_DIR, log_path
from darts_async.wire.backoff import backoff_s
from darts_async.wire.channel import Channel
from launcher.nodes import node_messages as messages
from launcher.nodes.detached import detach, end_keeper
from launcher.nodes.node_messages import StartProcess, ToKeeper
from launcher.nodes.node_record import NodeRecord, end_leftovers, locked, read_node_record, write_node_record
from launcher.nodes.scratch import owner_of, sweep
from launcher.nodes.supervisor import ProcessExit, ProcessRecord, Supervisor, open_output, start_time_s
from launcher.nodes.warm_start import Forks, Orphans
from launcher.run_dir.logs import bound_outputs, last_lines
from launcher.run_dir.place import inode_of

AGENT_SILENT_S = 20.0
"""An agent that has not given a sign of life for this long hangs."""
AGENT_LEAVES_S = 10.0
"""How long the last agent has to deliver the last reports."""
AGENT_TRIES = 3
"""A keeper gives up when its first agents end without a sign of life this many times in a row."""
GRACE_S = 5.0
"""Grace of processes that are ended because the lease is over."""
FIRST_HEARD_WITHIN_S = 60.0
"""The first lease; the shorter one of the settings begins when the launcher is first heard."""
_BACKOFF_S = (0.05, 5.0)
_LONG_LIFE_S = 60.0
_TICK_S = 0.25
_NUM_LAST_WORDS = 8
_DISK_EVERY_S = 5.0

log = structlog.get_logger()


class Keeper:
    """The keeper of a node. `lease_s` is infinite where the kernel ends the keeper with the launcher."""

    def __init__(
        self,
        run_dir: Path,
        node: str,
        *,
        life: int,
        lease_s: float,
        supervisor: Supervisor,
        forks: Forks | None = None,
        log_max_mb: float = 64.0,
        came_up: Callable[[], None] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._node = node
        self._lease_s = lease_s
        self._supervisor = supervisor
        self._forks = forks
        self._orphans = Orphans()
        self._output_max_bytes = int(log_max_mb * 1e6)
        self._is_unrecorded = False
        self._before = before = read_node_record(run_dir, node)
        install(keeper_name(node), 1 if before is None else 2)
        self._life = life
        self._inode = inode_of(run_dir)
        self._me = ProcessRecord(keeper_name(node), os.getpid(), start_time_s(os.getpid()), tuple(sys.argv))
        self._agent: ProcessRecord | None = None
        self._agent_incarnation = before.agent_incarnation if before else 0
        self._has_agent_spoken = False
        self._came_up = came_up
        self.failure: str | None = None
        """Why the node never came up."""
        self._channel: Channel[ToKeeper] | None = None
        self._newest: dict[str, int] = {}
        """The newest incarnation of each process that was ordered."""
        self._unwanted: set[tuple[str, int]] = set()
        """Ended by order before they were started."""
        self._ended: dict[str, ProcessExit] = {}
        self._starting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._heard_at_s = time.monotonic()
        self._has_heard = False
        self._over = asyncio.Event()
        self._grace_s = GRACE_S
        self._tasks = asyncio.TaskGroup()

    async def keep(self) -> None:
        """Run until the end of the node. On return all of its processes have ended."""
        if self._before is not None:
            await end_leftovers(self._run_dir, self._before)
        await asyncio.to_thread(sweep)
        self._write_record()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._end, GRACE_S)
        async with self._tasks as tasks:
            exits = tasks.create_task(self._report_exits(), name="report exits")
            agent = tasks.create_task(self._keep_agent(), name="keep the agent")
            lease = tasks.create_task(self._watch_lease(), name="watch the lease")
            disk = tasks.create_task(self._watch_disk(), name="watch the disk")
            await self._over.wait()
            if self._forks is not None:
                self._forks.end()  # or a process that waits for its imports would delay the end
            lease.cancel()
            disk.cancel()
            await self._supervisor.stop_all(self._grace_s)
            exits.cancel()
            for ended in self._supervisor.take_exits():
                self._report_exit(ended)
            self._tell(messages.NodeEnded())
            _, late = await asyncio.wait([agent], timeout=AGENT_LEAVES_S)
            if late:
                agent.cancel()

    # --- the agent -------------------------------------------------------------------------------------------

    async def _keep_agent(self) -> None:
        num_short_lives = 0
        for number in itertools.count(1):
            started_s = time.monotonic()
            await self._one_agent()
            if self._over.is_set():
                return
            if number >= AGENT_TRIES and not self._has_agent_spoken:
                self._give_up(number)
                return
            lived_s = time.monotonic() - started_s
            num_short_lives = 1 if lived_s > _LONG_LIFE_S else num_short_lives + 1
            wait_s = backoff_s(num_short_lives, *_BACKOFF_S)
            log.warning("agent_ended", incarnation=self._agent_incarnation, again_in_s=wait_s)
            await asyncio.sleep(wait_s)

    def _give_up(self, num_agents: int) -> None:
        words = last_lines(self._run_dir / LOGS_DIR, agent_name(self._node), _NUM_LAST_WORDS)
        said = "\n".join(words) or "(it printed and logged nothing)"
        self.failure = f"its agent ended {num_agents} times before it gave a sign of life; its last words:\n{said}"
        self._end(0.0)

    async def _one_agent(self) -> None:
        ours, theirs = socket.socketpair()
        channel: Channel[ToKeeper] = await Channel.over(ours, ToKeeper)
        with theirs:
            process = await self._start_agent(theirs.fileno())
        try:
            self._channel = channel
            running, ended = self._supervisor.records, self._ended
            self._tell(messages.NodeStatus(self._me, list(running.values()), list(ended.values())))
            await self._serve(channel)
        finally:
            self._channel = None
            if process.returncode is None:  # not through `process`, whose poll can steal the exit code from its watcher
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            await process.wait()
            await channel.close()

    async def _start_agent(self, descriptor: int) -> asyncio.subprocess.Process:
        self._agent_incarnation += 1
        whose = ("--run-dir", str(self._run_dir), "--node", self._node, "--incarnation", str(self._agent_incarnation))
        argv = module_command("launcher.nodes.agent", *whose, "--channel", str(descriptor))
        name = agent_name(self._node)
        with self._supervisor.open_output(name) as output:
            process = await spawn(argv, stdout=output, stderr=asyncio.subprocess.STDOUT, pass_fds=(descriptor,))
        started_at_s = start_time_s(process.pid)
        self._agent = ProcessRecord(name, process.pid, started_at_s, argv, self._agent_incarnation)
        self._write_record()
        return process

    async def _serve(self, channel: Channel[ToKeeper]) -> None:
        while True:
            try:
                async with asyncio.timeout(AGENT_SILENT_S):
                    message = await channel.receive()
            except TimeoutError:
                log.error("agent_hangs", incarnation=self._agent_incarnation, silent_s=AGENT_SILENT_S)
                return
            except ProtocolError as error:  # the agent is replaced, without effect on the node's processes
                log.error("agent_unreadable", incarnation=self._agent_incarnation, error=str(error))
                return
            if message is None:
                return
            self._obey(message)

    def _tell(self, message: Message) -> None:
        """Send a message. Without an agent it is dropped: the next agent reports the complete state."""
        if self._channel is not None:
            self._channel.send(message)

    # --- orders ----------------------------------------------------------------------------------------------

    def _obey(self, order: ToKeeper) -> None:
        match order:
            case messages.Pulse(launcher_is_heard=is_heard):
                self._take_pulse(launcher_is_heard=is_heard)
            case StartProcess(spec=spec, incarnation=incarnation):
                if incarnation > self._newest.get(spec.name, 0) and not self._over.is_set():
                    self._newest[spec.name] = incarnation
                    self._tasks.create_task(self._start(order), name=f"start {spec.name}")
            case messages.StopProcess(name=name, incarnation=incarnation, grace_s=grace_s):
                if self._is_running(name, incarnation):
                    self._tasks.create_task(self._supervisor.stop(name, grace_s), name=f"stop {name}")
            case messages.KillProcess(name=name, incarnation=incarnation):
                if self._is_running(name, incarnation):
                    self._supervisor.kill(name)
            case messages.EndNode(grace_s=grace_s):
                self._end(grace_s)

    def _take_pulse(self, *, launcher_is_heard: bool) -> None:
        if not self._has_agent_spoken:
            self._has_agent_spoken = True
            if self._came_up is not None:
                self._came_up()
        if launcher_is_heard:
            self._heard_at_s, self._has_heard = time.monotonic(), True

    def _is_running(self, name: str, incarnation: int) -> bool:
        """Whether this incarnation runs. If it has not started yet, it will be ended when it starts."""
        record = self._supervisor.records.get(name)
        if record is not None and record.incarnation == incarnation:
            return True
        ended = self._ended.get(name)
        if self._newest.get(name) == incarnation and (ended is None or ended.incarnation < incarnation):
            self._unwanted.add((name, incarnation))
        return False

    async def _start(self, order: StartProcess) -> None:
        name, incarnation = order.spec.name, order.incarnation
        async with self._starting[name]:
            await self._supervisor.stop(name, 0.0)  # an incarnation that the launcher counts as lost
            if self._over.is_set():
                return
            try:
                record = await self._supervisor.start(order.spec, incarnation)
            except OSError as error:
                self._ended[name] = ProcessExit(name, 0, -signal.SIGKILL, incarnation)
                self._tell(messages.ProcessNotStarted(name, incarnation, str(error)))
                return
        present().reach("keeper.before_started")
        self._write_record()
        self._tell(messages.ProcessStarted(record))
        if (name, incarnation) in self._unwanted or self._over.is_set():
            self._unwanted.discard((name, incarnation))
            self._supervisor.kill(name)

    async def _report_exits(self) -> None:
        async for ended in self._supervisor.exits():
            self._report_exit(ended)

    def _report_exit(self, ended: ProcessExit) -> None:
        present().reach("keeper.before_left")
        self._ended[ended.name] = ended
        self._write_record()
        self._tell(messages.ProcessLeft(ended))

    # --- the end ---------------------------------------------------------------------------------------------

    def _end(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._over.set()

    async def _watch_lease(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            silent_s = time.monotonic() - self._heard_at_s
            lease_s = self._lease_s if self._has_heard else max(self._lease_s, FIRST_HEARD_WITHIN_S)
            if silent_s > lease_s:
                log.error("lease_is_over", silent_s=silent_s, lease_s=lease_s)
                self._end(GRACE_S)

    async def _watch_disk(self) -> None:
        """Bound what is printed; write the record that could not be written."""
        while True:
            await asyncio.sleep(_DISK_EVERY_S)
            names = (self._me.name, agent_name(self._node), *self._newest)
            await asyncio.to_thread(bound_outputs, self._run_dir / LOGS_DIR, names, self._output_max_bytes)
            if self._is_unrecorded:
                self._write_record()
            self._orphans.reap(self._children())

    def _children(self) -> set[int]:
        """The processes that are waited for."""
        server = self._forks.pid if self._forks is not None else None
        ours = {record.pid for record in (*self._supervisor.records.values(), self._agent) if record is not None}
        return ours if server is None else {*ours, server}

    def _write_record(self) -> None:
        """For the next keeper, should this one be killed. One that cannot be written now is written later: the disk is
        full, or somebody has taken the directory away."""
        processes = list(self._supervisor.records.values())
        record = NodeRecord(self._life, self._inode, self._me, self._agent, self._agent_incarnation, processes)
        try:
            write_node_record(self._run_dir, self._node, record)
            self._is_unrecorded = False
        except (OSError, NoSpaceError) as error:
            log.warning("record_not_written", error=str(error))
            self._is_unrecorded = True


def main() -> None:
    """Entry point: `launcher.nodes.keeper --run-dir DIR --node NAME (--life N [--lease-s S --detach S] | --kill)`."""
    raise_open_files()
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--life", type=int, default=1, help="which start of the launcher this is")
    parser.add_argument("--kill", action="store_true", help="end the running keeper and all of its processes")
    parser.add_argument("--lease-s", type=float, default=math.inf)
    parser.add_argument("--log-max-mb", type=float, default=64.0, help="bound of each log and each output file")
    parser.add_argument("--warm", default="", help="modules of processes that a fork server imports, with commas")
    parser.add_argument(
        "--detach",
        type=float,
        metavar="S",
        help="continue in the background, and say so in a line of JSON, once there is an agent or after S seconds",
    )
    arguments = parser.parse_args()
    (arguments.run_dir / NODES_DIR).mkdir(exist_ok=True)
    if arguments.kill:
        end_keeper(arguments.run_dir, arguments.node)
        return
    came_up = None
    if arguments.detach is not None:
        came_up = detach(arguments.run_dir, arguments.node, arguments.life, arguments.detach)
    name = keeper_name(arguments.node)
    logging = logging_to(
        log_path(arguments.run_dir / LOGS_DIR, name), process=name, level="info", max_mb=arguments.log_max_mb
    )
    with locked(arguments.run_dir, arguments.node) as is_the_one, logging:
        if not is_the_one:
            sys.exit(f"{arguments.node} has a keeper already")
        failure = asyncio.run(_keep(arguments, came_up))
        if failure is not None:
            sys.exit(failure)


async def _keep(arguments: argparse.Namespace, came_up: Callable[[], None] | None) -> str | None:
    run_dir, node = arguments.run_dir, arguments.node
    bounds = {name: getattr(arguments, name) for name in ("life", "lease_s", "log_max_mb")}
    output = partial(open_output, run_dir / LOGS_DIR, keeper_name(node))
    forks = Forks(("--run-dir", str(run_dir)), tuple(filter(None, arguments.warm.split(","))), output)
    await forks.start()
    try:
        async with Supervisor(run_dir / LOGS_DIR, owner_of(run_dir, node), forks) as supervisor:
            keeper = Keeper(run_dir, node, supervisor=supervisor, forks=forks, came_up=came_up, **bounds)
            await keeper.keep()
            return keeper.failure
    finally:
        await forks.close()


if __name__ == "__main__":
    main()
