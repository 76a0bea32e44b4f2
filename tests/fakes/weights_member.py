"""A process that takes part in weight updates and talks to its parent through pipes.

python -m tests.fakes.weights_member

Applying version v fails unless the weights are those of `model(v, num_floats)`; `num_floats` is the first argument.
"""

import asyncio
import sys

import torch

from darts_async.errors import WeightUpdateError
from darts_async.machine.lifetime import die_with_parent
from darts_async.protocol import GeneratorToLearner, LearnerToGenerator
from darts_async.transport.codec import MessageCodec
from darts_async.weights.receiving.receive import Receiver
from darts_async.weights.receiving.transfer import LocalTransfer
from tests.weights.world import HOST, equal, model
from tests.weights.world import read_message as read
from tests.weights.world import write_message as write


async def main(num_floats: int) -> None:
    codec = MessageCodec(receives=LearnerToGenerator, sends=GeneratorToLearner, max_message_bytes=1 << 20)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def apply(tensors: dict[str, torch.Tensor], policy_version: int) -> float:
        if not equal(tensors, model(policy_version, num_floats=num_floats)):
            raise WeightUpdateError(f"the weights are not those of version {policy_version}")
        return 0.25

    def send(message: GeneratorToLearner) -> None:
        write(sys.stdout.buffer, codec, message)
        sys.stdout.buffer.flush()

    receiver = Receiver(send, LocalTransfer(HOST, apply))
    async with asyncio.TaskGroup() as tasks:
        await receiver.open(tasks)
        receiver.join()
        while (message := await read(reader, codec)) is not None:
            receiver.handle(message)
        await receiver.close()
        sys.exit()  # and with it the task that applies


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(int(sys.argv[1])))
