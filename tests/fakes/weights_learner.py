"""A learner that knows nothing but weights: a process of its own, with torch and without vLLM.

python -m tests.fakes.weights_learner SETTINGS

The settings are JSON: `weights`; `stall`: version -> tensors sent before it stalls; `mistake`: version -> the version
of which it holds the log-probabilities for right; `hidden_size`. Version v of the model is `tiny_model(v)`. It talks to
its parent through pipes, in MessagePack frames:

    in   ["heard", peer, incarnation, frames]    what a generator said
         ["lost", peer]
         ["publish", version]
    out  ["tell", peer, frames]                  what is to be told to a generator
         ["published", version, members, dropped, stalls_s, transfer_s, num_bytes]
         ["failed", version, error]
         ["stalled", version]                    it sends nothing more and waits to be killed
         ["modules", names]                      of those that it must not have imported
"""

import asyncio
import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import msgspec
import structlog
import torch

from darts_async.config import WeightsConfig
from darts_async.errors import WeightUpdateError
from darts_async.machine.lifetime import die_with_parent
from darts_async.protocol import GeneratorToLearner, LearnerToGenerator, Message
from darts_async.transport.codec import MessageCodec
from darts_async.weights.probe import Examiner, reference_of, tolerance_of
from darts_async.weights.sending.publish import Publisher
from darts_async.weights.sending.source import LiveTensors
from tests.generator.vllm.world import VOCAB_SIZE, tiny_model

HOST = "127.0.0.1"
MAX_MESSAGE_BYTES = 1 << 22


def frame(*content: object) -> bytes:
    """One message of the pipes."""
    body = msgspec.msgpack.encode(content)
    return struct.pack("=I", len(body)) + body


async def next_frame(stream: asyncio.StreamReader) -> list[Any] | None:
    """The next message; None at the end."""
    try:
        (size,) = struct.unpack("=I", await stream.readexactly(4))
        message: list[Any] = msgspec.msgpack.decode(await stream.readexactly(size))
    except asyncio.IncompleteReadError:
        return None
    return message


class Stalling(LiveTensors):
    """Stops for ever before tensor number `stall_at`."""

    def __init__(self, model: torch.nn.Module, version: int, stall_at: int | None) -> None:
        super().__init__(model.named_parameters())
        self._version = version
        self._stall_at = stall_at

    def tensors(self) -> Generator[torch.Tensor]:
        for number, tensor in enumerate(super().tensors()):
            if number == self._stall_at:
                say("stalled", self._version)
                time.sleep(3600)
            yield tensor


_writing = threading.Lock()


def say(*content: object) -> None:
    with _writing:
        sys.stdout.buffer.write(frame(*content))
        sys.stdout.buffer.flush()


def last_logits(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda prompts: model(input_ids=prompts, use_cache=False).logits[:, -1]


class Learner:
    def __init__(self, settings: dict[str, Any]) -> None:
        config = WeightsConfig.model_validate(settings["weights"])
        self.codec = MessageCodec(
            receives=GeneratorToLearner, sends=LearnerToGenerator, max_message_bytes=MAX_MESSAGE_BYTES
        )
        self.publisher = Publisher(config, HOST, self.tell)
        self.examiner = Examiner(self.tell, tolerance_of(config, "float32"))
        self.stalls: dict[str, int] = settings.get("stall", {})
        self.mistakes: dict[str, int] = settings.get("mistake", {})
        self.model = partial(tiny_model, hidden_size=settings.get("hidden_size", 32))

    def tell(self, peer: str, message: Message) -> None:
        say("tell", peer, self.codec.encode(message))

    def hear(self, peer: str, incarnation: int, frames: list[bytes]) -> None:
        message: Any = self.codec.decode(frames)
        self.publisher.handle(peer, incarnation, message)
        self.examiner.handle(peer, message)

    async def publish(self, version: int) -> None:
        right = self.model(self.mistakes.get(str(version), version))
        self.examiner.expect(reference_of(last_logits(right), version, vocab_size=VOCAB_SIZE))
        source = Stalling(self.model(version), version, self.stalls.get(str(version)))
        try:
            report = await self.publisher.publish(version, source)
        except WeightUpdateError as error:
            say("failed", version, str(error))
        else:
            members, dropped, stalls_s = list(report.members), dict(report.dropped), dict(report.stalls_s)
            say("published", version, members, dropped, stalls_s, report.transfer_s, report.num_bytes)


async def main(settings: dict[str, Any]) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    learner = Learner(settings)
    async with asyncio.TaskGroup() as tasks:
        while (message := await next_frame(reader)) is not None:
            match message:
                case ["heard", peer, incarnation, frames]:
                    learner.hear(peer, incarnation, frames)
                case ["lost", peer]:
                    learner.publisher.peer_lost(peer)
                case ["publish", version]:
                    tasks.create_task(learner.publish(version), name="publish")
                    say("modules", sorted(name for name in sys.modules if name.split(".")[0] == "vllm"))
        await learner.publisher.close()


if __name__ == "__main__":
    die_with_parent()
    torch.set_num_threads(1)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # the other stream is the pipe
    asyncio.run(main(json.loads(sys.argv[1])))
