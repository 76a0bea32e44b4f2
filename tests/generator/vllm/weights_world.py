"""Real generators on vLLM, and a learner in a process of its own that sends them weights."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import DynamicCache

from darts_async.config import GeneratorConfig, SamplingConfig, WeightsConfig
from darts_async.errors import DartsError, EngineError
from darts_async.faults import Faults
from darts_async.generator import process
from darts_async.generator.process import GeneratorActor
from darts_async.generator.vllm.engine import VllmEngine
from darts_async.protocol import (
    Generate,
    GeneratorToLearner,
    Greet,
    LearnerToGenerator,
    Message,
    SampleFinished,
    TokensDecoded,
    WeightsApplied,
)
from darts_async.telemetry import BusyClock
from darts_async.trace import Trace
from darts_async.transport import PeerDown, Received
from darts_async.transport.codec import MessageCodec
from tests import ROOT
from tests.fakes.weights_learner import MAX_MESSAGE_BYTES, frame, next_frame
from tests.generator.vllm.world import RunningVllm, tiny_model

PATIENCE_S = 60.0
CODEC = MessageCodec(receives=LearnerToGenerator, sends=GeneratorToLearner, max_message_bytes=MAX_MESSAGE_BYTES)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (the condition is made true by another process)
            await asyncio.sleep(0.002)


class LentEngine(VllmEngine):
    """An engine over a vLLM that goes on when the engine is closed."""

    async def close(self) -> None:
        if self._is_closed:
            return
        if self._is_paused:  # an update was cut short
            await self.llm.engine_core.resume_scheduler_async()
            self._is_paused = False
        for sample_id in list(self._samples._live):
            self.cancel(sample_id)
        while self.num_unfinished:
            await self.step()
        await self.call_workers("shutdown_weight_transfer_engine", deadline_s=30.0)
        async with self.paused():
            await self.llm.update_weight_version("default")
        self._is_closed = True


@dataclass
class Sample:
    """What the shaper was told of a sample."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: str | None = None


class Member:
    """A generator: the real actor, with links that are lists."""

    def __init__(self, name: str, engine: VllmEngine, weights: WeightsConfig) -> None:
        config = SimpleNamespace(
            generator=GeneratorConfig(engine="vllm", flush_every_steps=1), weights=weights, sampling=SamplingConfig()
        )
        self.name = name
        self.engine = engine
        self.incarnation = 1
        self.learner: Learner | None = None
        self.samples: dict[int, Sample] = {}
        self.stalls_s: dict[int, float] = {}
        self.said: list[GeneratorToLearner] = []
        self.failure: BaseException | None = None
        runtime: Any = SimpleNamespace(
            config=config,
            host="127.0.0.1",
            send=self.send,
            clock=BusyClock(),
            trace=Trace(),
            name=name,
            faults=Faults(),
        )
        self.actor = GeneratorActor(runtime)
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        with mock.patch.object(process, "make_engine", return_value=self.engine):
            opened = asyncio.Event()
            self._task = asyncio.create_task(self._run(opened), name=self.name)
            await until(lambda: opened.is_set() or self._task is None or self._task.done())
        self.receive("generators", Greet(1))

    async def _run(self, opened: asyncio.Event) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                await self.actor.open(tasks)
                opened.set()
        except* DartsError as group:
            self.failure = group
        finally:
            await self.actor.close()

    async def close(self) -> None:
        assert self._task is not None
        self._task.cancel()
        done, _ = await asyncio.wait({self._task}, timeout=PATIENCE_S)
        assert done, "the actor did not end"
        if not self._task.cancelled():
            self._task.result()

    def send(self, link: str, peer: str, message: Message) -> None:
        match message:
            case TokensDecoded():
                self._decoded(message)
            case SampleFinished(sample_id, reason):
                self.samples[sample_id].reason = reason
            case WeightsApplied(version, stall_s):
                self.stalls_s[version] = stall_s
        if link == "weights" and self.learner is not None:
            self.said.append(message)  # type: ignore[arg-type]
            self.learner.write("heard", self.name, self.incarnation, CODEC.encode(message))

    def _decoded(self, message: TokensDecoded) -> None:
        start = 0
        for sample_id, count in zip(message.sample_ids.tolist(), message.num_tokens.tolist(), strict=True):
            sample = self.samples.setdefault(sample_id, Sample())
            sample.tokens += message.token_ids[start : start + count].tolist()
            sample.logprobs += message.logprobs[start : start + count].tolist()
            sample.versions += [message.policy_version] * count
            start += count

    def receive(self, link: str, message: Message) -> None:
        peer = "learner" if link == "weights" else "shaper"
        try:
            self.actor.handle(Received(link=link, peer=peer, incarnation=1, message=message))
        except EngineError as error:
            self.failure = error

    def start(self, *requests: Generate) -> None:
        for request in requests:
            self.receive("generators", request)

    def joins(self, learner: "Learner") -> None:
        """The link to a learner comes up."""
        self.learner = learner
        learner.members[self.name] = self
        self.receive("weights", Greet(1))

    def loses_learner(self) -> None:
        self.learner = None
        self.actor.handle(PeerDown(link="weights", peer="learner", incarnation=1, reason="silent"))

    def num_tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples.values())


class Learner:
    """The learner's process, and this end of its pipes."""

    def __init__(self, weights: WeightsConfig, **settings: object) -> None:
        self._settings = json.dumps({"weights": weights.model_dump(), **settings})
        self.members: dict[str, Member] = {}
        self.process: asyncio.subprocess.Process | None = None
        self.published: dict[int, dict[str, Any]] = {}
        self.failed: dict[int, str] = {}
        self.stalled: set[int] = set()
        self.vllm_modules: list[str] = []
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.fakes.weights_learner", self._settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DARTS_PARENT_PID": str(os.getpid())},
        )
        self._reading = asyncio.create_task(self._read(), name="learner")

    def write(self, *content: object) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        if self.process.returncode is None and not self.process.stdin.is_closing():
            self.process.stdin.write(frame(*content))

    async def publish(self, version: int) -> dict[str, Any]:
        self.write("publish", version)
        await until(lambda: version in self.published or version in self.failed)
        assert version not in self.failed, self.failed[version]
        return self.published[version]

    def kill(self, sign: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(sign)

    async def close(self) -> None:
        assert self.process is not None
        assert self._reading is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await asyncio.wait({self._reading}, timeout=PATIENCE_S)

    async def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        while (message := await next_frame(self.process.stdout)) is not None:
            match message:
                case ["tell", peer, frames]:
                    if self.members[peer].learner is self:
                        self.members[peer].receive("weights", CODEC.decode(frames))
                case ["published", version, members, dropped, stalls_s, transfer_s, num_bytes]:
                    self.published[version] = {
                        "members": members, "dropped": dropped, "stalls_s": stalls_s, "transfer_s": transfer_s,
                        "num_bytes": num_bytes,
                    }  # fmt: skip
                case ["failed", version, error]:
                    self.failed[version] = error
                case ["stalled", version]:
                    self.stalled.add(version)
                case ["modules", names]:
                    self.vllm_modules = names


@asynccontextmanager
async def vllm_member(running: RunningVllm, name: str, weights: WeightsConfig) -> AsyncIterator[Member]:
    """A generator whose samples never end by themselves."""
    started = replace(running.started, eos_token_ids=())
    member = Member(name, LentEngine(started, running.thread, step_deadline_s=PATIENCE_S), weights)
    await member.open()
    try:
        yield member
    finally:
        await member.close()
        if member.failure is not None:
            raise member.failure


@asynccontextmanager
async def learner(weights: WeightsConfig, **settings: object) -> AsyncIterator[Learner]:
    """A learner that is gone afterwards; its settings are those of `fakes.weights_learner`."""
    process = Learner(weights, **settings)
    await process.start()
    try:
        yield process
    finally:
        await process.close()


@torch.inference_mode()
def mixed_replay(prompt: list[int], response: list[int], versions: list[int]) -> np.ndarray:
    """Log-probabilities of a response whose token i was decoded under `tiny_model(versions[i])`, keys and values of
    what came before being those of the versions that made them. [len(response)]"""
    inputs = prompt + response[:-1]
    of_input = [versions[0]] * (len(prompt) - 1) + versions  # the last input before a token is read by its version
    cache = DynamicCache()
    logits = []
    start = 0
    for stop in range(1, len(inputs) + 1):
        if stop == len(inputs) or of_input[stop] != of_input[start]:
            model = tiny_model(of_input[start])
            ids, positions = torch.tensor([inputs[start:stop]]), torch.arange(start, stop).unsqueeze(0)
            logits.append(model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0])
            start = stop
    logprobs = torch.cat(logits)[len(prompt) - 1 :].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1).numpy()
