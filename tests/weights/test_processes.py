"""Updates across real processes: one is killed while it receives, one is stopped."""

import asyncio
import os
import signal
import sys

import pytest

from darts_async.config import WeightsConfig
from darts_async.protocol import GeneratorToLearner, LearnerToGenerator, MemberJoined, UpdateReady
from darts_async.transport.codec import MessageCodec
from darts_async.weights.sending.publish import Publisher, PublishReport
from darts_async.weights.sending.source import LiveTensors
from tests import ROOT
from tests.weights.world import HOST, model, read_message, write_message

NUM_FLOATS = 4_000_000  # more than the kernel buffers for a process that does not read
START_S = 120.0
CODEC = MessageCodec(receives=GeneratorToLearner, sends=LearnerToGenerator, max_message_bytes=1 << 20)


class Children:
    """Member processes and the learner's end of their pipes."""

    def __init__(self, deadline_s: float) -> None:
        config = WeightsConfig(deadline_s=deadline_s, bucket_bytes=1 << 20)
        self.publisher = Publisher(config, HOST, self.send)
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.pumps: list[asyncio.Task[None]] = []
        self.signal_when_ready: dict[str, signal.Signals] = {}
        self.joined = {name: asyncio.Event() for name in "abc"}

    async def start(self, name: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.fakes.weights_member", str(NUM_FLOATS)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.processes[name] = process
        self.pumps.append(asyncio.create_task(self.pump(name, process), name=f"read {name}"))

    async def pump(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while (message := await read_message(process.stdout, CODEC)) is not None:
            if isinstance(message, UpdateReady) and name in self.signal_when_ready:
                process.send_signal(self.signal_when_ready.pop(name))
            if isinstance(message, MemberJoined):
                self.joined[name].set()
            self.publisher.handle(name, 1, message)
        self.publisher.peer_lost(name)

    def send(self, name: str, message: LearnerToGenerator) -> None:
        process = self.processes[name]
        if process.returncode is None and process.stdin is not None and not process.stdin.is_closing():
            write_message(process.stdin, CODEC, message)

    async def publish(self, version: int) -> PublishReport:
        tensors = await asyncio.to_thread(model, version, num_floats=NUM_FLOATS)
        return await self.publisher.publish(version, LiveTensors(tensors.items()))

    async def stop(self) -> None:
        await self.publisher.close()
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()
        await asyncio.wait(self.pumps, timeout=START_S)


@pytest.mark.slow
async def test_a_killed_and_a_stopped_process_do_not_keep_the_others_from_the_weights() -> None:
    children = Children(deadline_s=4.0)
    try:
        for name in "abc":
            await children.start(name)
        async with asyncio.timeout(START_S):
            for joined in children.joined.values():
                await joined.wait()
            assert (await children.publish(0)).members == ("a", "b", "c")

            children.signal_when_ready["c"] = signal.SIGKILL
            report = await children.publish(1)
            assert report.members == ("a", "b")
            assert "c" in report.dropped

            children.signal_when_ready["b"] = signal.SIGSTOP
            report = await children.publish(2)
            assert report.members == ("a",)
            assert "4 s to" in report.dropped["b"]
    finally:
        await children.stop()
