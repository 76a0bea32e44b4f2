"""Does the weight transfer work on a GPU? One command; without a GPU it says so and ends.

    python -m bench.gpu [--megabytes 64] [--backend nccl]

Two processes, learner and receiver, in one group of NCCL, on one GPU if there is only one: NCCL takes two ranks for
two machines if each has a host id of its own. What is checked is that every version arrives whole, that another stream
computes meanwhile, and that a receiver whose learner is gone is free by the deadline. Rates on one GPU mean little:
what would be a link is shared memory. With `--backend gloo` the same code runs on CPUs, which is how it is tested.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from darts_async.config import WeightsConfig
from darts_async.protocol import GeneratorToLearner, LearnerToGenerator, MemberJoined
from darts_async.transport.codec import MessageCodec
from darts_async.weights.receiving.receive import Receiver
from darts_async.weights.receiving.transfer import LocalTransfer
from darts_async.weights.sending.publish import Publisher, PublishReport
from darts_async.weights.sending.source import LiveTensors

HOST = "127.0.0.1"
ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0
NUM_VERSIONS = 3
ONE_GPU = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MAX_CTAS": "1",  # two ranks on one GPU: neither may take all of it
}
MAX_MESSAGE_BYTES = 1 << 20


def make_model(version: int, num_megabytes: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Both sides know every version. float32 and bfloat16, of sizes that fit no bucket."""
    generator = torch.Generator().manual_seed(version)
    count = (num_megabytes << 20) // 4 // 8
    tensors = {f"layer{i}": torch.randn(count + 3 * i, generator=generator) for i in range(8)}
    tensors["half"] = torch.randn(1001, 7, generator=generator).to(torch.bfloat16)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def device_for(backend: str, rank: int) -> torch.device:
    """A GPU for each rank if there are two."""
    return torch.device("cuda", rank % torch.cuda.device_count()) if backend == "nccl" else torch.device("cpu")


# --- the receiver ------------------------------------------------------------------------------------------------


async def receive(backend: str, num_megabytes: int) -> None:
    """Take every version, check it, and compute on the default stream all the while."""
    from bench.weights import pump, write

    codec = MessageCodec(receives=LearnerToGenerator, sends=GeneratorToLearner, max_message_bytes=MAX_MESSAGE_BYTES)
    device = device_for(backend, 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    num_products = 0

    async def apply(tensors: dict[str, torch.Tensor], policy_version: int) -> float:
        began = time.perf_counter()
        expected = make_model(policy_version, num_megabytes, device)
        wrong = [name for name, tensor in expected.items() if not torch.equal(tensor, tensors[name])]
        if wrong:
            sys.exit(f"version {policy_version} arrived wrong: {wrong}")
        sys.stderr.write(f"version {policy_version} is whole; {num_products} products were computed so far\n")
        return time.perf_counter() - began

    async def compute() -> None:
        nonlocal num_products
        matrix = torch.ones(256, 256, device=device)
        while True:
            matrix = matrix @ matrix / 256
            num_products += 1
            await asyncio.sleep(0.001)

    def send(message: GeneratorToLearner) -> None:
        write(sys.stdout.buffer, codec, message)
        sys.stdout.buffer.flush()

    receiver = Receiver(send, LocalTransfer(HOST, apply))
    async with asyncio.TaskGroup() as tasks:
        await receiver.open(tasks)
        computing = tasks.create_task(compute(), name="compute")
        receiver.join()
        await pump(reader, codec, receiver.handle)
        began = time.perf_counter()
        receiver.learner_lost()
        await receiver.close(DEADLINE_S)
        sys.stderr.write(f"free {time.perf_counter() - began:.2f} s after the learner left\n")
        computing.cancel()
        sys.exit()


# --- the learner -------------------------------------------------------------------------------------------------


async def publish(backend: str, num_megabytes: int) -> list[PublishReport]:
    """Send every version to a receiver of its own process."""
    from bench.weights import pump, write

    codec = MessageCodec(receives=GeneratorToLearner, sends=LearnerToGenerator, max_message_bytes=MAX_MESSAGE_BYTES)
    device = device_for(backend, 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.gpu", "--receiver", "--backend", backend, "--megabytes", str(num_megabytes)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **ONE_GPU, "NCCL_HOSTID": "receiver"},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    config = WeightsConfig.model_validate({"backend": backend, "deadline_s": DEADLINE_S})
    publisher = Publisher(config, HOST, lambda _, message: write(child.stdin, codec, message))
    joined = asyncio.Event()

    def handle(message: Any) -> None:
        publisher.handle("receiver", 1, message)
        if isinstance(message, MemberJoined):
            joined.set()

    pumping = asyncio.create_task(pump(child.stdout, codec, handle), name="read")
    reports = []
    async with asyncio.timeout(DEADLINE_S * (NUM_VERSIONS + 2)):
        await joined.wait()
        for version in range(NUM_VERSIONS):
            source = LiveTensors(make_model(version, num_megabytes, device).items())
            reports.append(await publisher.publish(version, source))
        child.stdin.close()
        await child.wait()
        await pumping
        await publisher.close()
    if child.returncode:
        sys.exit(f"the receiver ended with {child.returncode}")
    return reports


def show_tokens() -> None:
    """Per-token cost of vLLM here, if it is installed for this GPU."""
    command = (sys.executable, "-m", "bench.engines", "--repeats", "1")
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    print(ended.stdout if ended.returncode == 0 else f"vLLM was not measured: {ended.stderr.strip()[-300:]}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=["nccl", "gloo"], default="nccl")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--receiver", action="store_true", help="internal")
    arguments = parser.parse_args()
    if arguments.backend == "nccl" and not torch.cuda.is_available():
        print("no GPU here (torch.cuda.is_available() is false): nothing was checked")
        return
    if arguments.receiver:
        asyncio.run(receive(arguments.backend, arguments.megabytes))
        return
    os.environ |= ONE_GPU | {"NCCL_HOSTID": "learner"}
    for report in asyncio.run(publish(arguments.backend, arguments.megabytes)):
        rate = report.num_bytes / report.transfer_s / 1e9
        print(
            f"version {report.policy_version}: {report.num_bytes} bytes in {report.transfer_s:.3f} s ({rate:.2f} GB/s)"
        )
    if arguments.backend == "nccl":
        show_tokens()


if __name__ == "__main__":
    main()
