"""Members of several ranks: places in the group, one answer of all workers, and real groups through real sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from darts_async.config import WeightsConfig
from darts_async.errors import DeadlineError, WeightUpdateError
from darts_async.generator.engine import Pause, StepEvents
from darts_async.generator.vllm.weights import worker_transfer
from darts_async.generator.vllm.worker_hub import Answers, WorkerLinks
from darts_async.generator.vllm.worker_link import WorkerLink
from darts_async.protocol import (
    EpochFormed,
    LearnerToGenerator,
    MemberJoined,
    TensorSpec,
    UpdateAborted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightManifest,
)
from darts_async.weights.receiving.receive import Receiver
from darts_async.weights.sending.coordinator import Coordinator
from darts_async.weights.sending.events import FormGroup, MemberMessage, SendToMember
from darts_async.weights.sending.publish import Publisher
from darts_async.weights.sending.source import LiveTensors
from darts_async.wire.framing import HEAD_BYTES
from tests.weights.world import HOST, equal, model

MANIFEST = WeightManifest((TensorSpec("w", "float32", (4,)),), 4096)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_every_rank_of_a_group_is_given_to_one_worker(num_ranks: list[int]) -> None:
    coordinator = Coordinator(backend="gloo", interface=HOST, deadline_s=10.0)
    names = [f"generator{number}" for number in range(len(num_ranks))]
    for name, count in zip(names, num_ranks, strict=True):
        coordinator.handle(MemberMessage(name, 1, MemberJoined(-1, count)), 0.0)
    actions = coordinator.offer(0, MANIFEST, 0.0)
    formed = {a.name: a.message for a in actions if isinstance(a, SendToMember) and isinstance(a.message, EpochFormed)}
    taken = [formed[n].first_rank + i for n, count in zip(names, num_ranks, strict=True) for i in range(count)]
    (group,) = [action for action in actions if isinstance(action, FormGroup)]
    assert group.world_size == 1 + sum(num_ranks)
    assert sorted(taken) == list(range(1, group.world_size))
    assert {message.world_size for message in formed.values()} == {group.world_size}


def test_a_member_of_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="0 ranks"):
        MemberJoined(-1, 0)


def staged(*sums: int) -> UpdateStaged:
    return UpdateStaged(1, 7, np.array(sums, np.int64))


def test_a_generator_is_ready_and_has_staged_when_all_its_workers_have() -> None:
    answers = Answers(2)
    answers.begin()
    assert answers.add(1, UpdateReady(1, 7)) is None
    assert answers.add(0, UpdateReady(1, 7)) == UpdateReady(1, 7)
    assert answers.add(0, staged(5, 6)) is None
    together = answers.add(1, staged(5, 6))
    assert isinstance(together, UpdateStaged)
    assert together.checksums.tolist() == [5, 6]


def test_workers_that_received_different_bytes_are_a_failure_that_names_them() -> None:
    answers = Answers(3)
    answers.begin()
    answers.add(0, staged(5, 6))
    answers.add(1, staged(5, 6))
    failed = answers.add(2, staged(5, 7))
    assert isinstance(failed, UpdateFailed)
    assert "[2]" in failed.error


def test_a_failure_of_one_worker_is_one_of_the_generator() -> None:
    failed = Answers(2).add(1, UpdateFailed(1, 7, "no memory"))
    assert failed == UpdateFailed(1, 7, "worker 1: no memory")


class Workers:
    """An engine of two workers that are threads of this process; what they use is kept here."""

    num_workers = 2

    def __init__(self) -> None:
        self.links: list[WorkerLink] = []
        self.in_use: list[dict[str, torch.Tensor]] = [{}, {}]
        self.is_paused = False
        self.version: int | None = None

    async def call_workers(self, method: str, *args: object, deadline_s: float) -> list[object]:
        async with asyncio.timeout(deadline_s):
            return list(await asyncio.gather(*(asyncio.to_thread(self.call, n, method, *args) for n in (0, 1))))

    def call(self, number: int, method: str, argument: object) -> object:
        match method, argument:
            case "darts_connect", {"socket_path": path, "interface": interface, "is_direct": is_direct}:
                link = WorkerLink(path, number, interface, torch.device("cpu"), is_direct=is_direct, lost=lambda: None)
                self.links.append(link)
                link.open()
                self.links.sort(key=lambda link: link._number)
            case "darts_use", int(version):
                assert self.is_paused
                staging = self.links[number].staged(version)
                self.in_use[number] = {name: tensor.clone() for name, tensor in staging.tensors.items()}
                self.links[number].give_back(staging)
            case "darts_receive", int(version):
                assert self.is_paused
                try:
                    self.in_use[number] = dict(self.links[number].stream(version).tensors())
                except WeightUpdateError as error:
                    return str(error)
        return None

    @asynccontextmanager
    async def paused(self, *, clear_cache: bool) -> AsyncIterator[None]:
        self.is_paused = True
        yield
        self.is_paused = False

    def take(self) -> StepEvents:
        return StepEvents()

    async def set_policy_version(self, policy_version: int) -> None:
        assert self.is_paused
        self.version = policy_version


@pytest.mark.slow
@pytest.mark.parametrize("receive", ["staged", "direct"])
async def test_both_workers_of_a_generator_get_every_version(receive: str) -> None:
    config = WeightsConfig.model_validate({"receive": receive, "bucket_bytes": 1 << 14, "deadline_s": 10.0})
    loop = asyncio.get_running_loop()
    workers = Workers()

    @asynccontextmanager
    async def hold() -> AsyncIterator[Pause]:
        yield Pause(lambda _: None)

    def tell(name: str, message: LearnerToGenerator) -> None:
        loop.call_soon(receiver.handle, message)

    publisher = Publisher(config, HOST, tell)
    receiver = Receiver(
        lambda message: loop.call_soon(publisher.handle, "a", 1, message),
        worker_transfer(workers, hold, HOST, config),
    )

    async def take_part(opened: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            await receiver.open(tasks)
            opened.set()

    opened = asyncio.Event()
    taking_part = asyncio.create_task(take_part(opened), name="receiver")
    async with asyncio.timeout(60):
        await opened.wait()
        receiver.join()
        await asyncio.sleep(0)
        for version in range(3):
            report = await publisher.publish(version, LiveTensors(model(version).items()))
            assert report.members == ("a",)
            assert workers.version == version
            assert all(equal(tensors, model(version)) for tensors in workers.in_use)
    taking_part.cancel()
    await asyncio.wait({taking_part})
    await asyncio.gather(*(asyncio.to_thread(link.close) for link in workers.links))
    await receiver.close()
    await publisher.close()


async def test_a_direct_update_that_is_given_up_before_the_engine_stands_still_holds_nobody() -> None:
    config = WeightsConfig(receive="direct")
    workers, stills = Workers(), list[Pause]()
    wanted, boundary, left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def hold() -> AsyncIterator[Pause]:
        wanted.set()
        await boundary.wait()
        stills.append(Pause(lambda _: None))
        yield stills[0]
        left.set()

    transfer = worker_transfer(workers, hold, HOST, config)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        await transfer.open(lambda _: None, tasks)
        transfer.handle(UpdateOffered(1, 7, MANIFEST, 10.0))
        await wanted.wait()
        transfer.handle(UpdateAborted(1, 7, "the learner is gone"))
        boundary.set()
        await left.wait()
        for task in asyncio.all_tasks():
            if task.get_name() == "direct updates":
                task.cancel()
    assert (workers.is_paused, stills[0].policy_version) == (False, None)
    await asyncio.gather(*(asyncio.to_thread(link.close) for link in workers.links))
    await transfer.close(5.0)


async def test_a_worker_that_does_not_connect_is_named_at_the_deadline() -> None:
    links = WorkerLinks(2, lambda number, message: None)
    path = await links.open()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    link = WorkerLink(path, 0, HOST, torch.device("cpu"), is_direct=False, lost=lambda: None)
    await asyncio.to_thread(link.open)
    with pytest.raises(DeadlineError, match=r"workers \[1\]"):
        await links.all_connected(0.2)
    assert not path.parent.exists(), "nobody can connect any more"
    await asyncio.to_thread(link.close)
    await links.close(5.0)


async def test_a_worker_whose_generator_is_gone_is_told() -> None:
    lost = asyncio.Event()
    loop = asyncio.get_running_loop()
    links = WorkerLinks(1, lambda number, message: None)
    path = await links.open()
    link = WorkerLink(
        path, 0, HOST, torch.device("cpu"), is_direct=False, lost=lambda: loop.call_soon_threadsafe(lost.set)
    )
    await asyncio.to_thread(link.open)
    await links.all_connected(5.0)
    await links.close(5.0)
    async with asyncio.timeout(10):
        await lost.wait()
    await asyncio.to_thread(link.close)


async def test_a_worker_that_cannot_understand_its_generator_is_lost_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(range(HEAD_BYTES)))
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(babble, tmp_path / "workers"):
        device, path = torch.device("cpu"), tmp_path / "workers"
        link = WorkerLink(path, 0, HOST, device, is_direct=False, lost=lambda: loop.call_soon_threadsafe(lost.set))
        await asyncio.to_thread(link.open)
        async with asyncio.timeout(10):
            await lost.wait()
        await asyncio.to_thread(link.close)
    assert "the weight link of worker 0 ended" in capsys.readouterr().err
