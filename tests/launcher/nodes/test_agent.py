"""A real keeper with a real agent, led over the real link: orders come twice, agents die, the launcher is silent."""

import asyncio
import contextlib
import math
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

import launcher.nodes.keeper
from darts_async.config import RunConfig
from darts_async.topology.links import AGENTS_LINK
from darts_async.topology.plan import ProcessSpec
from darts_async.topology.run_files import KEYS_DIR, NODES_DIR
from darts_async.transport import Received, create_run_keys
from darts_async.wire.channel import Channel
from darts_async.wire.framing import HEAD_BYTES, frame
from launcher.nodes.keeper import Keeper
from launcher.nodes.node_messages import (
    EndNode,
    KillProcess,
    NodeStatus,
    Order,
    ProcessLeft,
    ProcessNotStarted,
    ProcessStarted,
    RestartAgent,
    StartProcess,
    StopProcess,
    ToKeeper,
)
from launcher.nodes.node_record import NodeRecord, read_node_record
from launcher.nodes.supervisor import ProcessRecord, Supervisor
from launcher.plan.plan import hub_addresses, plan_run
from launcher.preflight.preflight import link_ports
from launcher.run.links import Control, open_control
from launcher.run_dir.run_dir import create_run_dir, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

DEADLINE_S = 30.0
SLEEPS = "import time; print(1, flush=True); time.sleep(600)"
IGNORES_SIGTERM = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
FAST = {"heartbeat_s": 0.2, "dead_after_s": 1.0, "resend_after_s": 0.3}
R = TypeVar("R")


def spec(name: str, code: str = SLEEPS) -> ProcessSpec:
    return ProcessSpec(name, name.partition("/")[0], (sys.executable, "-c", code), {}, 10.0)


class Lead:
    """The launcher's side of the link: orders, and what was reported."""

    def __init__(
        self, control: Control, leave: Callable[[], Awaitable[None]], run_dir: Path, keeper: asyncio.Task[None]
    ) -> None:
        self._control = control
        self.leave = leave
        self.run_dir = run_dir
        self.keeper = keeper
        self.reports: list[Any] = []

    def order(self, order: Order) -> None:
        self._control.order("local", order)

    async def report(self, kind: type[R], which: Callable[[R], bool] = lambda _: True) -> R:
        """The first report of a kind that has not been asked for yet."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for report in self.reports:
                    if isinstance(report, kind) and which(report):
                        self.reports.remove(report)
                        return report
                for event in await self._control.receive(0.1):
                    if event.link == AGENTS_LINK.name and isinstance(event, Received):
                        self.reports.append(event.message)

    async def start(self, name: str, incarnation: int = 1, code: str = SLEEPS) -> ProcessRecord:
        """A process that has printed something."""
        self.order(StartProcess(spec(name, code), incarnation))
        record = (await self.report(ProcessStarted)).record
        output = self.run_dir / "logs" / f"{name.replace('/', '-')}.out"
        async with asyncio.timeout(DEADLINE_S):
            while len(output.read_text().split()) < incarnation:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return record

    @property
    def on_disk(self) -> NodeRecord:
        record = read_node_record(self.run_dir, "local")
        assert record is not None
        return record


@contextlib.asynccontextmanager
async def led(tmp_path: Path, lease_s: float = math.inf) -> AsyncIterator[Lead]:
    config = RunConfig.model_validate({"runs_dir": str(tmp_path), "name": "node", "transport": FAST})
    run_dir = create_run_dir(config)
    (run_dir / NODES_DIR).mkdir(exist_ok=True)
    plan = plan_run(config, run_dir, hub_addresses(config, link_ports(config)))
    write_inputs(run_dir, config, plan)
    create_run_keys(run_dir / KEYS_DIR, plan.endpoints())
    async with (
        contextlib.AsyncExitStack() as at_the_end,
        Supervisor(run_dir / "logs", "test") as supervisor,
        asyncio.TaskGroup() as tasks,
    ):
        control = await at_the_end.enter_async_context(open_control(plan, run_dir, config.transport))
        keeper = Keeper(run_dir, "local", life=1, lease_s=lease_s, supervisor=supervisor)
        lead = Lead(control, at_the_end.aclose, run_dir, tasks.create_task(keeper.keep(), name="keeper"))
        yield lead
        if not lead.keeper.done():
            lead.order(EndNode(0.2))
        while not lead.keeper.done():
            await control.receive(0.05)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_orders_are_carried_out_once_however_often_they_come(tmp_path: Path) -> None:
    async with led(tmp_path) as lead:
        assert (await lead.report(NodeStatus)).running == []
        first = await lead.start("reward/0")
        lead.order(StartProcess(spec("reward/0"), 1))
        lead.order(StopProcess("reward/0", 7, 5.0))
        await lead.start("reward/1")
        assert [report for report in lead.reports if isinstance(report, ProcessStarted)] == []
        assert is_alive(first.pid), "an order for another incarnation is none for this one"
        lead.order(StopProcess("reward/0", 1, 20.0))
        left = (await lead.report(ProcessLeft)).exit
        assert (left.name, left.pid, left.code, left.incarnation) == ("reward/0", first.pid, -signal.SIGTERM, 1)
        lead.order(StartProcess(spec("reward/0"), 1))
        second = await lead.start("reward/0", 2)
        assert second.incarnation == 2, "what has ended is not started again under its number"


async def test_stop_asks_and_then_kills_and_kill_does_not_ask(tmp_path: Path) -> None:
    async with led(tmp_path) as lead:
        for name in ("reward/0", "reward/1"):
            await lead.start(name, code=IGNORES_SIGTERM)
        lead.order(StopProcess("reward/0", 1, 0.05))
        lead.order(KillProcess("reward/1", 1))
        exits = [(await lead.report(ProcessLeft)).exit for _ in range(2)]
        assert {(left.name, left.code) for left in exits} == {("reward/0", -9), ("reward/1", -9)}


async def test_a_command_that_is_not_there_is_reported(tmp_path: Path) -> None:
    async with led(tmp_path) as lead:
        lead.order(StartProcess(ProcessSpec("reward/0", "reward", ("/no/such/program",), {}, 1.0), 1))
        failed = await lead.report(ProcessNotStarted)
        assert (failed.name, failed.incarnation, "No such file" in failed.error) == ("reward/0", 1, True)


async def test_a_keeper_whose_records_and_logs_somebody_removes_makes_them_again(tmp_path: Path) -> None:
    async with led(tmp_path) as lead:
        first, agent = await lead.start("reward/0"), lead.on_disk.agent
        assert agent is not None
        for directory in (NODES_DIR, "logs"):
            shutil.rmtree(lead.run_dir / directory)
        second = await lead.start("reward/1")
        assert lead.on_disk.processes == [first, second]
        os.kill(agent.pid, signal.SIGKILL)
        assert (
            await lead.report(NodeStatus, lambda stands: stands.running == [first, second])
        ).keeper.pid == os.getpid()


async def test_a_keeper_writes_nothing_into_a_directory_that_has_taken_the_place_of_its_own(tmp_path: Path) -> None:
    async with led(tmp_path) as lead:
        await lead.start("reward/0")
        before = lead.on_disk
        lead.run_dir.rename(tmp_path / "moved")
        (lead.run_dir / "logs").mkdir(parents=True)
        await lead.start("reward/1")
        assert not (lead.run_dir / NODES_DIR).exists()
        shutil.rmtree(lead.run_dir)
        (tmp_path / "moved").rename(lead.run_dir)
        assert lead.on_disk == before


async def test_a_later_incarnation_takes_the_place_of_one_that_still_runs(tmp_path: Path) -> None:
    async with led(tmp_path) as lead:
        first = await lead.start("reward/0", code=IGNORES_SIGTERM)
        second = await lead.start("reward/0", 2)
        assert (await lead.report(ProcessLeft)).exit.incarnation == 1
        assert not is_alive(first.pid)
        assert is_alive(second.pid)


async def test_processes_do_not_notice_the_death_of_an_agent_and_what_it_had_not_told_is_told_by_the_next(
    tmp_path: Path,
) -> None:
    async with led(tmp_path) as lead:
        await lead.report(NodeStatus)
        stays, goes = await lead.start("reward/0"), await lead.start("reward/1")
        agent = lead.on_disk.agent
        assert agent is not None
        os.kill(agent.pid, signal.SIGSTOP)  # whatever it is told now, it does not tell
        os.kill(goes.pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            while is_alive(goes.pid):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.kill(agent.pid, signal.SIGKILL)
        stands = await lead.report(NodeStatus)
        assert stands.running == [stays]
        assert [(left.name, left.pid, left.code) for left in stands.ended] == [("reward/1", goes.pid, -9)]
        assert lead.on_disk.agent_incarnation == 2
        lead.order(KillProcess("reward/0", 1))
        assert (await lead.report(ProcessLeft)).exit.pid == stays.pid


async def test_an_agent_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.nodes.keeper, "AGENT_SILENT_S", 5.0)  # longer than it takes to start the next one
    async with led(tmp_path) as lead:
        first = await lead.report(NodeStatus)
        await lead.start("reward/0")
        agent = lead.on_disk.agent
        assert agent is not None
        os.kill(agent.pid, signal.SIGSTOP)
        stands = await lead.report(NodeStatus)
        assert [record.name for record in stands.running] == ["reward/0"]
        assert stands.keeper == first.keeper
        assert not is_alive(agent.pid)


@pytest.mark.parametrize(
    "nonsense", [frame(b"\xc1\xc1\xc1"), frame(b"\x80"), frame(b"damaged")[:-1] + b"?", b"\xff" * HEAD_BYTES]
)
async def test_an_agent_that_cannot_be_understood_is_given_up_and_the_keeper_goes_on(
    tmp_path: Path, nonsense: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.nodes.keeper, "AGENT_SILENT_S", math.inf)  # it is not for its silence
    (tmp_path / NODES_DIR).mkdir()
    (tmp_path / "logs").mkdir()
    ours, theirs = socket.socketpair()
    async with Supervisor(tmp_path / "logs", "test") as supervisor, asyncio.timeout(DEADLINE_S):
        keeper = Keeper(tmp_path, "local", life=1, lease_s=math.inf, supervisor=supervisor)
        channel: Channel[ToKeeper] = await Channel.over(ours, ToKeeper)
        with theirs:
            theirs.sendall(nonsense)
            await keeper._serve(channel)
        await channel.close()


async def test_an_agent_can_be_replaced_by_order(tmp_path: Path) -> None:
    async with led(tmp_path) as lead:
        await lead.report(NodeStatus)
        record = await lead.start("reward/0")
        lead.order(RestartAgent(1))
        assert (await lead.report(NodeStatus)).running == [record]
        assert lead.on_disk.agent_incarnation == 2
        lead.order(RestartAgent(1))  # as if the first had not been acknowledged: it was meant for the one before
        await lead.start("reward/1")
        assert lead.on_disk.agent_incarnation == 2


async def test_a_node_ends_in_order_and_tells_how(tmp_path: Path) -> None:
    async with led(tmp_path) as lead:
        records = [await lead.start("reward/0"), await lead.start("reward/1", code=IGNORES_SIGTERM)]
        lead.order(EndNode(0.2))
        exits = [(await lead.report(ProcessLeft)).exit for _ in range(2)]
        assert {(left.name, left.code) for left in exits} == {("reward/0", -15), ("reward/1", -9)}
        assert not any(is_alive(record.pid) for record in records)
        assert lead.on_disk.processes == []


async def test_a_node_that_does_not_hear_the_launcher_for_its_lease_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        launcher.nodes.keeper, "FIRST_HEARD_WITHIN_S", 4.0
    )  # as the lease, so either may be what ends it
    async with led(tmp_path, lease_s=4.0) as lead:
        record = await lead.start("reward/0")
        await lead.leave()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.wait([lead.keeper])
        assert not is_alive(record.pid)
