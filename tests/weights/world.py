"""A learner and generators in one process, real groups between them, messages passed by the event loop."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from darts_async.config import WeightsConfig
from darts_async.protocol import GeneratorToLearner, LearnerToGenerator, Message
from darts_async.transport.codec import MessageCodec
from darts_async.weights.receiving.receive import Receiver
from darts_async.weights.receiving.transfer import LocalTransfer
from darts_async.weights.sending.publish import Publisher
from darts_async.weights.sending.source import LiveTensors

HOST = "127.0.0.1"
PATIENCE_S = 30.0


def model(seed: int, *, num_floats: int = 20_000) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and awkward sizes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "big": torch.randn(num_floats, generator=generator),
        "half": torch.randn(33, 7, generator=generator).to(torch.bfloat16),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(5, 9, generator=generator).t(),
        "flags": torch.randint(0, 2, (3,), generator=generator).bool(),
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclass
class Generator:
    """A receiver whose engine copies what it is given."""

    name: str
    world: "World"
    incarnation: int = 1
    applied: list[int] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    sent: list[GeneratorToLearner] = field(default_factory=list)
    heard: list[LearnerToGenerator] = field(default_factory=list)
    pass_on: Callable[[GeneratorToLearner], bool] = lambda _: True

    def __post_init__(self) -> None:
        self.transfer = LocalTransfer(HOST, self.apply)
        self.receiver = Receiver(self.send, self.transfer)
        self.task = asyncio.create_task(self.run(), name=f"{self.name} applies")

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            await self.receiver.open(tasks)

    async def apply(self, tensors: dict[str, torch.Tensor], policy_version: int) -> float:
        self.weights = {name: tensor.clone() for name, tensor in tensors.items()}
        self.applied.append(policy_version)
        return 0.25

    def send(self, message: GeneratorToLearner) -> None:
        if self.name in self.world.generators and self.pass_on(message):
            self.sent.append(message)
            self.world.deliver(self.world.publisher.handle, self.name, self.incarnation, message)

    def hear(self, message: LearnerToGenerator) -> None:
        self.heard.append(message)
        self.receiver.handle(message)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        await self.receiver.close(PATIENCE_S)


class World:
    """The learner, and generators by name. A generator that is not in `generators` is cut off."""

    def __init__(self, config: WeightsConfig) -> None:
        self.config = config
        self.publisher = Publisher(config, HOST, self.send)
        self.generators: dict[str, Generator] = {}
        self.everyone: list[Generator] = []

    def deliver(self, handler: Callable[..., None], *arguments: object) -> None:
        asyncio.get_running_loop().call_soon(handler, *arguments)

    def send(self, name: str, message: LearnerToGenerator) -> None:
        if name in self.generators:
            self.deliver(self.generators[name].hear, message)

    def join(self, *names: str, incarnation: int = 1) -> list[Generator]:
        joined = [Generator(name, self, incarnation) for name in names]
        for generator in joined:
            self.generators[generator.name] = generator
            self.everyone.append(generator)
            generator.receiver.join()
        return joined

    async def kill(self, name: str) -> None:
        """The process is gone: its sockets close, and the link notices."""
        generator = self.generators.pop(name)
        await generator.stop()
        self.publisher.peer_lost(name)

    async def publish(self, version: int, tensors: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]  # noqa: ANN201
        async with asyncio.timeout(PATIENCE_S):
            return await self.publisher.publish(version, LiveTensors(tensors.items()))


@asynccontextmanager
async def make_world(*names: str, deadline_s: float = 10.0, bucket_bytes: int = 1 << 14) -> AsyncIterator[World]:
    """A world that leaves no thread and no socket behind."""
    process = psutil.Process()
    before = set(process.net_connections("inet"))
    world = World(WeightsConfig(deadline_s=deadline_s, bucket_bytes=bucket_bytes))
    world.join(*names)
    await asyncio.sleep(0)  # so that the first version finds all of them
    try:
        yield world
    finally:
        await world.publisher.close()
        for generator in world.everyone:
            await generator.stop()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("weights-")]
    assert left == []
    assert set(process.net_connections("inet")) <= before


def write_message(stream: Any, codec: MessageCodec, message: Message) -> None:
    """Write a message to a pipe: the sizes of its frames, then the frames."""
    frames = codec.encode(message)
    stream.write(struct.pack(f"=B{len(frames)}I", len(frames), *map(len, frames)) + b"".join(frames))


async def read_message(stream: asyncio.StreamReader, codec: MessageCodec) -> Any:
    """Read a message from a pipe; None at its end."""
    head = await stream.read(1)
    if not head:
        return None
    sizes = struct.unpack(f"={head[0]}I", await stream.readexactly(4 * head[0]))
    return codec.decode([await stream.readexactly(size) for size in sizes])
