"""How long does an update take, against a bare torch.distributed broadcast of the same buckets?

    python -m bench.weights [--megabytes 1 100] [--receivers 1 2] [--repeats 7] [--out DIR]

Learner and receivers are processes on one machine, linked by gloo over loopback; control messages go through
pipes. Both measurements run in the same processes, one after the other. `bare` is the broadcast alone into
buffers that are there; `transfer` is what replaces it: packing the live parameters, broadcast, a checksum per
tensor on both sides, and the answers. `update` is everything from the offer to the last acknowledgement; `apply`
here is a copy into tensors of the receiver. Medians.
"""

import argparse
import asyncio
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.charts import draw_bars, for_plots
from bench.measured import ROOT
from bench.results import conditions, keep, table
from darts_async.config import WeightsConfig
from darts_async.machine.lifetime import die_with_parent
from darts_async.protocol import GeneratorToLearner, LearnerToGenerator, MemberJoined, Message, WeightManifest
from darts_async.transport.codec import MessageCodec
from darts_async.weights.bucket_layout import layout_of, specs_of
from darts_async.weights.receiving.receive import Receiver
from darts_async.weights.receiving.transfer import LocalTransfer
from darts_async.weights.sending.publish import Publisher, PublishReport
from darts_async.weights.sending.source import LiveTensors

HOST = "127.0.0.1"
MEGABYTE = 1 << 20
PLOT = "weights.png"
TO_MEMBER = MessageCodec(receives=GeneratorToLearner, sends=LearnerToGenerator, max_message_bytes=MEGABYTE)
TO_LEARNER = MessageCodec(receives=LearnerToGenerator, sends=GeneratorToLearner, max_message_bytes=MEGABYTE)


def make_model(num_megabytes: int) -> dict[str, torch.Tensor]:
    """Float32 tensors shaped like a transformer's: a few large ones, many small ones."""
    num_layers = 12
    num_floats = num_megabytes * MEGABYTE // 4 // num_layers
    return {
        f"layer{layer}.{name}": torch.randn(count)
        for layer in range(num_layers)
        for name, count in (("mlp", num_floats * 2 // 3), ("attention", num_floats // 3 - 64), ("norm", 64))
    }


# --- the bare broadcast ------------------------------------------------------------------------------------------


def bare_broadcast(rank: int, world_size: int, port: int, bucket_sizes: list[int], repeats: int) -> list[float]:
    """Seconds of each repetition, the warm-up excluded, as this rank sees them."""
    address = f"tcp://{HOST}:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=timedelta(minutes=2))
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in bucket_sizes]
    times_s = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        for buffer in buffers:
            dist.broadcast(buffer, 0)
        dist.barrier()  # rank 0 is done when all have everything, as in an update
        times_s.append(time.perf_counter() - began)
    dist.destroy_process_group()
    return times_s[1:]


def bucket_sizes_of(model: dict[str, torch.Tensor], config: WeightsConfig) -> list[int]:
    """Bytes of each bucket of an update."""
    layout = layout_of(WeightManifest(specs_of(model), config.bucket_bytes))
    ranges = [layout.bucket_range(bucket) for bucket in range(layout.num_buckets)]
    return [stop - start for start, stop in ranges]


# --- messages through pipes --------------------------------------------------------------------------------------


def write(stream: Any, codec: MessageCodec, message: Message) -> None:
    """The number of frames, their sizes, the frames."""
    frames = codec.encode(message)
    stream.write(struct.pack(f"=B{len(frames)}I", len(frames), *map(len, frames)) + b"".join(frames))


async def pump(stream: asyncio.StreamReader, codec: MessageCodec, handle: Callable[[Any], None]) -> None:
    """Hand over messages until the pipe closes."""
    while head := await stream.read(1):
        sizes = struct.unpack(f"={head[0]}I", await stream.readexactly(4 * head[0]))
        handle(codec.decode([await stream.readexactly(size) for size in sizes]))


# --- a receiver --------------------------------------------------------------------------------------------------


async def receive() -> None:
    """A receiver that copies what it gets into tensors of its own."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    in_use: dict[str, torch.Tensor] = {}

    async def apply(tensors: dict[str, torch.Tensor], policy_version: int) -> float:
        began = time.perf_counter()
        for name, tensor in tensors.items():
            in_use.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
        return time.perf_counter() - began

    def send(message: GeneratorToLearner) -> None:
        write(sys.stdout.buffer, TO_LEARNER, message)
        sys.stdout.buffer.flush()

    receiver = Receiver(send, LocalTransfer(HOST, apply))
    async with asyncio.TaskGroup() as tasks:
        await receiver.open(tasks)
        receiver.join()
        await pump(reader, TO_LEARNER, receiver.handle)
        await receiver.close()
        sys.exit()  # and with it the task that applies


# --- the learner -------------------------------------------------------------------------------------------------


async def publish_repeatedly(
    children: dict[str, asyncio.subprocess.Process],
    model: dict[str, torch.Tensor],
    config: WeightsConfig,
    repeats: int,
) -> list[PublishReport]:
    """Reports of `repeats` updates, after one that forms the group and allocates staging memory."""
    publisher = Publisher(config, HOST, lambda name, message: write(children[name].stdin, TO_MEMBER, message))
    waiting = set(children)
    all_joined = asyncio.Event()

    def handle(name: str, message: GeneratorToLearner) -> None:
        publisher.handle(name, 1, message)
        if isinstance(message, MemberJoined):
            waiting.discard(name)
            if not waiting:
                all_joined.set()

    async with asyncio.TaskGroup() as tasks:
        for name, child in children.items():
            assert child.stdout is not None
            tasks.create_task(pump(child.stdout, TO_MEMBER, partial(handle, name)), name=f"read {name}")
        await asyncio.wait_for(all_joined.wait(), timeout=60)
        reports = [await publisher.publish(version, LiveTensors(model.items())) for version in range(repeats + 1)]
        await publisher.close()
        for child in children.values():
            assert child.stdin is not None
            child.stdin.close()
    assert all(len(report.members) == len(children) for report in reports)
    return reports[1:]


@dataclass(frozen=True)
class Compared:
    """One model and number of receivers: seconds, one for each repeat."""

    num_megabytes: int
    num_receivers: int
    num_bytes: int
    bare_s: list[float]
    transfer_s: list[float]
    update_s: list[float]
    apply_s: list[float]

    @property
    def name(self) -> str:
        """For a picture."""
        return f"{self.num_megabytes} MB, {self.num_receivers} receiver{'s' if self.num_receivers > 1 else ''}"


async def measure(num_megabytes: int, num_receivers: int, repeats: int) -> Compared:
    """Both ways, in the same processes."""
    model, config = make_model(num_megabytes), WeightsConfig()
    sizes = bucket_sizes_of(model, config)
    port = free_port()
    children = {}
    for rank in range(1, num_receivers + 1):
        member = (rank, num_receivers + 1, port, num_megabytes, repeats)
        children[f"receiver{rank}"] = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.weights", "--member", *map(str, member)),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
    bare_s = await asyncio.to_thread(bare_broadcast, 0, num_receivers + 1, port, sizes, repeats)
    reports = await publish_repeatedly(children, model, config, repeats)
    for child in children.values():
        await asyncio.wait_for(child.wait(), timeout=60)
    return Compared(
        num_megabytes,
        num_receivers,
        sum(sizes),
        bare_s,
        transfer_s=[each.transfer_s for each in reports],
        update_s=[each.total_s for each in reports],
        apply_s=[max(each.stalls_s.values()) for each in reports],
    )


def row(found: Compared) -> list[str]:
    """A line of the table."""
    bare, transfer, update, apply = map(
        statistics.median, (found.bare_s, found.transfer_s, found.update_s, found.apply_s)
    )
    rate, bare_rate = (found.num_bytes / seconds / 1e9 for seconds in (transfer, bare))
    return [
        f"{found.num_megabytes} MB",
        str(found.num_receivers),
        *(f"{bare * 1e3:.1f} ms", f"{bare_rate:.2f} GB/s"),
        *(f"{transfer * 1e3:.1f} ms", f"{rate:.2f} GB/s", f"{transfer / bare:.2f}"),
        *(f"{update * 1e3:.1f} ms", f"{apply * 1e3:.1f} ms"),
    ]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def report(repeats: int, found: list[Compared]) -> str:
    """The table."""
    titles = ("model", "receivers", "bare", "", "transfer", "", "transfer / bare", "update", "apply")
    return "\n".join(
        [
            "# Weights: an update against a bare broadcast",
            "",
            f"{conditions('weights')} torch {torch.__version__}, gloo over loopback, 1 thread, buckets of "
            f"{WeightsConfig().bucket_bytes >> 20} MiB, medians of {repeats}.",
            "",
            *table(titles, [row(each) for each in found]),
            "",
            f"![milliseconds]({PLOT})",
        ]
    )


def leave(directory: Path, text: str, found: list[Compared]) -> None:
    """The table, the numbers and the plot."""
    keep(directory, "weights", text, {"updates": [asdict(each) for each in found]})
    bars = {
        each.name: {
            name: [seconds * 1e3 for seconds in getattr(each, f"{name}_s")]
            for name in ("bare", "transfer", "update", "apply")
        }
        for each in found
    }
    draw_bars(directory / PLOT, bars, "ms")


def run_member(rank: int, world_size: int, port: int, num_megabytes: int, repeats: int) -> None:
    """The process of a receiver: first the bare broadcast, then updates."""
    die_with_parent()
    torch.set_num_threads(1)
    sizes = bucket_sizes_of(make_model(num_megabytes), WeightsConfig())
    bare_broadcast(rank, world_size, port, sizes, repeats)
    asyncio.run(receive())


def main() -> None:
    """One command; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=for_plots, help="directory for weights.md, .json and .png")
    arguments = parser.parse_args()
    found = []
    for num_megabytes in arguments.megabytes:
        for num_receivers in arguments.receivers:
            found.append(asyncio.run(measure(num_megabytes, num_receivers, arguments.repeats)))
            print(found[-1].name, file=sys.stderr)
    text = report(arguments.repeats, found)
    print(text)
    if arguments.out:
        leave(arguments.out, text, found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--member"]:
        run_member(*map(int, sys.argv[2:]))
    else:
        main()
