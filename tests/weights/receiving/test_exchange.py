"""Learner and generators over real gloo groups in one process."""

import asyncio
from collections.abc import Callable

import psutil
import pytest
import torch

from darts_async.errors import WeightUpdateError
from darts_async.protocol import (
    EpochFormed,
    GeneratorToLearner,
    MemberJoined,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightManifest,
)
from darts_async.weights.bucket_layout import layout_of, specs_of
from darts_async.weights.checksum import checksum
from darts_async.weights.receiving import receiving_rank as rank
from darts_async.weights.receiving.receive import Receiver
from darts_async.weights.receiving.transfer import Command, LocalTransfer
from darts_async.weights.sending.source import LiveTensors
from tests.weights.world import HOST, PATIENCE_S, Generator, equal, make_world, model

pytestmark = pytest.mark.slow


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (the condition is made true by a thread or a peer)
            await asyncio.sleep(0.001)


async def test_two_generators_use_what_the_learner_published() -> None:
    async with make_world("a", "b") as world:
        tensors = model(0)
        report = await world.publish(0, tensors)
        assert report.members == ("a", "b")
        assert report.dropped == {}
        assert report.stalls_s == {"a": 0.25, "b": 0.25}
        assert report.num_bytes == layout_of(WeightManifest(specs_of(tensors), world.config.bucket_bytes)).total_bytes
        for generator in world.generators.values():
            assert generator.applied == [0]
            assert equal(generator.weights, tensors)
            assert generator.receiver.policy_version == 0


async def test_the_same_group_and_staging_memory_serve_the_next_versions() -> None:
    async with make_world("a") as world:
        (generator,) = world.everyone
        places: list[int] = []

        async def apply(tensors: dict[str, torch.Tensor], version: int) -> float:
            places.append(tensors["big"].data_ptr())
            return await Generator.apply(generator, tensors, version)

        generator.transfer._apply = apply
        for version in range(3):
            await world.publish(version, model(version))
            assert equal(generator.weights, model(version))
        assert len(set(places)) == 1
        assert sum(isinstance(message, EpochFormed) for message in generator.heard) == 1


async def test_sockets_listen_on_the_given_interface_only() -> None:
    async with make_world("a", "b") as world:
        before = {c for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}
        await world.publish(0, model(0))
        listening = {c for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"} - before
        assert len(listening) == 3
        assert {c.laddr.ip for c in listening} == {HOST}


async def test_a_generator_killed_while_it_receives_does_not_keep_the_others_from_it() -> None:
    async with make_world("a", "b", deadline_s=20.0) as world:
        victim = world.generators["b"]
        victim.pass_on = lambda message: not isinstance(message, UpdateStaged)
        publishing = asyncio.create_task(world.publish(0, model(0)), name="publish")
        await until(lambda: any(isinstance(message, UpdateReady) for message in victim.sent))
        await world.kill("b")
        report = await publishing
        assert report.members == ("a",)
        assert "b" in report.dropped
        assert equal(world.generators["a"].weights, model(0))
        epochs = [message.epoch for message in world.generators["a"].heard if isinstance(message, EpochFormed)]
        assert len(epochs) >= 2


class Dumb(Generator):
    """Joins groups and says that it is ready, but never receives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        handle = self.transfer.handle

        def pretend(command: Command) -> None:
            if isinstance(command, UpdateOffered):
                self.send(UpdateReady(command.epoch, command.policy_version))
            else:
                handle(command)

        self.transfer.handle = pretend  # type: ignore[method-assign]


async def test_a_member_that_hangs_in_the_transfer_is_dropped_at_the_deadline() -> None:
    async with make_world("a", deadline_s=2.0, bucket_bytes=1 << 20) as world:
        hung = Dumb("b", world)
        world.generators["b"] = hung
        world.everyone.append(hung)
        hung.receiver.join()
        await asyncio.sleep(0)
        hung.pass_on = lambda message: not isinstance(message, MemberJoined)  # it says nothing else any more
        tensors = model(0, num_floats=4_000_000)  # more than the kernel buffers for a peer that does not read
        report = await world.publish(0, tensors)
        assert report.members == ("a",)
        assert "2 s to stage" in report.dropped["b"]
        assert equal(world.generators["a"].weights, tensors)


async def test_a_member_that_hangs_before_it_is_ready_is_dropped_at_the_deadline() -> None:
    async with make_world("a", deadline_s=1.0) as world:
        (silent,) = world.join("b")
        silent.pass_on = lambda _: False
        world.publisher.handle("b", 1, MemberJoined(-1))
        report = await world.publish(0, model(0))
        assert report.members == ("a",)
        assert "1 s to join the group" in report.dropped["b"]


async def test_a_bit_flipped_in_staging_is_never_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = rank.receive_buckets
    flips = iter([True])

    def flipping(collective, staging, deadline, posted):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        checksums = sound(collective, staging, deadline, posted)
        if next(flips, False):
            staging.flat[5] ^= 16
            checksums = [checksum(tensor) for tensor in staging.tensors.values()]
        return checksums

    monkeypatch.setattr(rank, "receive_buckets", flipping)
    async with make_world("a") as world:
        (generator,) = world.everyone
        report = await world.publish(0, model(0))
        assert "differ" in report.dropped["a"]
        assert report.members == ("a",), "it has joined again"
        assert sum(isinstance(message, UpdateCommitted) for message in generator.heard) == 1
        assert generator.applied == [0]
        assert equal(generator.weights, model(0))


async def test_a_member_that_is_always_wrong_is_given_up_and_the_failure_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = rank.receive_buckets
    monkeypatch.setattr(rank, "receive_buckets", lambda *arguments: [x + 1 for x in sound(*arguments)])
    async with make_world("a", deadline_s=1.0) as world:
        with pytest.raises(
            WeightUpdateError, match=r"only a is available, and failed too often.*checksums of version 0 differ"
        ):
            await world.publish(0, model(0))
        assert world.everyone[0].applied == []


async def test_a_late_joiner_catches_up_while_the_parameters_are_locked() -> None:
    async with make_world("a") as world:
        await world.publish(0, model(0))
        lock = asyncio.Lock()
        asked: list[bool] = []

        def source() -> LiveTensors:
            asked.append(lock.locked())
            return LiveTensors(model(0).items())

        keeping = asyncio.create_task(world.publisher.run(source, lock), name="catch up")
        (late,) = world.join("b")
        await until(lambda: late.applied == [0])
        await until(lambda: not lock.locked())
        assert asked == [True]
        assert equal(late.weights, model(0))
        assert world.generators["a"].applied == [0], "who has the version is left alone"
        assert (await world.publish(1, model(1))).members == ("a", "b")
        keeping.cancel()
        await asyncio.wait({keeping})


async def test_a_restarted_generator_is_given_the_next_version() -> None:
    async with make_world("a") as world:
        await world.publish(0, model(0))
        await world.kill("a")
        (again,) = world.join("a", incarnation=2)
        report = await world.publish(1, model(1))
        assert report.members == ("a",)
        assert again.applied == [1]


async def test_a_generator_whose_link_flapped_gets_a_new_group() -> None:
    async with make_world("a") as world:
        (generator,) = world.everyone
        await world.publish(0, model(0))
        generator.receiver.learner_lost()
        world.publisher.peer_lost("a")
        generator.receiver.join()
        await world.publish(1, model(1))
        assert generator.applied == [0, 1]
        assert sum(isinstance(message, EpochFormed) for message in generator.heard) == 2


async def test_a_loss_that_only_the_generator_saw_is_survived() -> None:
    async with make_world("a") as world:
        (generator,) = world.everyone
        await world.publish(0, model(0))
        generator.receiver.learner_lost()  # and never joins by itself
        await world.publish(1, model(1))
        assert generator.applied == [0, 1]


async def test_a_generator_that_cannot_apply_stays_at_its_version_and_is_dropped() -> None:
    async with make_world("a", "b") as world:
        await world.publish(0, model(0))

        async def refuse(tensors: dict[str, torch.Tensor], version: int) -> float:
            raise WeightUpdateError("no room")

        world.generators["b"].transfer._apply = refuse
        report = await world.publish(1, model(1))
        assert report.members == ("a",)
        assert "no room" in report.dropped["b"]
        assert world.generators["b"].receiver.policy_version == 0


async def test_an_offer_that_arrives_while_weights_are_applied_waits_for_the_end() -> None:
    async with make_world("a", deadline_s=1.0) as world:
        (generator,) = world.everyone
        may_go_on = asyncio.Event()
        seen: list[torch.Tensor] = []

        async def apply(tensors: dict[str, torch.Tensor], version: int) -> float:
            before = tensors["big"].clone()
            await may_go_on.wait()
            assert torch.equal(tensors["big"], before), "nobody writes to weights that are being applied"
            seen.append(before)
            return await Generator.apply(generator, tensors, version)

        generator.transfer._apply = apply
        publishing = asyncio.create_task(world.publish(0, model(0)), name="publish")
        await until(lambda: sum(isinstance(message, UpdateOffered) for message in generator.heard) == 2)
        may_go_on.set()
        report = await publishing
        assert "to apply" in report.dropped["a"]
        assert report.members == ("a",)
        assert [torch.equal(big, model(0)["big"]) for big in seen] == [True, True]


async def test_a_cancelled_publication_leaves_a_usable_publisher() -> None:
    async with make_world("a") as world:
        (generator,) = world.everyone
        generator.pass_on = lambda message: not isinstance(message, UpdateStaged)
        publishing = asyncio.create_task(world.publish(0, model(0)), name="publish")
        await until(lambda: any(isinstance(message, UpdateReady) for message in generator.sent))
        publishing.cancel()
        await asyncio.wait({publishing})
        generator.pass_on = lambda _: True
        await until(lambda: any(isinstance(message, UpdateAborted) for message in generator.heard))
        await world.publish(1, model(1))
        assert generator.applied == [1]


async def test_without_a_generator_publishing_fails_and_says_so() -> None:
    async with make_world(deadline_s=0.05) as world:
        with pytest.raises(WeightUpdateError, match=r"version 3 was not published: no generator .* 0\.05 s"):
            await world.publish(3, model(0))


async def test_answers_to_another_epoch_are_ignored_by_the_generator() -> None:
    async with make_world("a") as world:
        (generator,) = world.everyone
        await world.publish(0, model(0))
        formed = next(message for message in generator.heard if isinstance(message, EpochFormed))
        num_sent = len(generator.sent)
        for message in (
            formed,
            replace_epoch(formed, formed.epoch - 1),
            UpdateAborted(formed.epoch - 1, 0, "long ago"),
            UpdateCommitted(formed.epoch, 0),
            UpdateCommitted(formed.epoch, 9),
        ):
            generator.receiver.handle(message)
        assert len(generator.sent) == num_sent
        await world.publish(1, model(1))
        assert generator.applied == [0, 1]


async def test_an_offer_for_a_group_it_has_left_is_refused() -> None:
    sent: list[GeneratorToLearner] = []
    receiver = Receiver(sent.append, LocalTransfer(HOST, lambda tensors, version: asyncio.sleep(0, 0.0)))
    receiver.handle(UpdateOffered(4, 2, WeightManifest(specs_of(model(0)), 4096), 1.0))
    assert sent == [UpdateFailed(4, 2, "it is not in the group of epoch 4")]
    await receiver.close()


async def test_a_broken_manifest_is_reported_and_the_generator_joins_anew() -> None:
    async with make_world("a") as world:
        (generator,) = world.everyone
        await world.publish(0, model(0))
        epoch = next(message.epoch for message in generator.heard if isinstance(message, EpochFormed))
        manifest = WeightManifest(specs_of(model(0)), 4096)
        generator.receiver.handle(UpdateOffered(epoch, 1, type(manifest)((), 4096), 1.0))
        await until(lambda: isinstance(generator.sent[-1], MemberJoined))
        failed = generator.sent[-2]
        assert isinstance(failed, UpdateFailed)
        assert "names no tensor" in failed.error
        await world.publish(1, model(1))
        assert generator.applied == [0, 1]


async def test_every_generator_is_acknowledged_after_it_applied() -> None:
    async with make_world("a") as world:
        await world.publish(0, model(0))
        (generator,) = world.everyone
        order = [type(message) for message in generator.sent]
        assert order.index(UpdateReady) < order.index(UpdateStaged) < order.index(UpdateApplied)


def replace_epoch(message: EpochFormed, epoch: int) -> EpochFormed:
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return EpochFormed(**{**fields, "epoch": epoch})
