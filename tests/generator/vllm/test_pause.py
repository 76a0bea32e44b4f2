"""vLLM is resumed behind an update that got through, and behind no other. Over a fake of vLLM's engine core."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from darts_async.errors import EngineError
from darts_async.generator.vllm.engine import VllmEngine
from darts_async.generator.vllm.startup import StartedVllm


class Core:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.resources: Any = SimpleNamespace(
            engine_dead=False, input_socket=Closable(), output_socket=Closable(), ctx=SimpleNamespace(term=lambda: None)
        )
        self.outputs_queue: asyncio.Queue[object] = asyncio.Queue(1)
        self.told: list[str] = []

    async def pause_scheduler_async(self, *, mode: str, clear_cache: bool) -> None:
        self.told.append("pause")

    async def resume_scheduler_async(self) -> None:
        self.told.append("resume")


class Closable:
    def close(self, linger: int) -> None:
        """Nothing to do."""


def engine_over(core: Core) -> VllmEngine:
    llm = SimpleNamespace(engine_core=core, shutdown=lambda: None)
    return VllmEngine(StartedVllm(llm, 4, 64, 48, ()), ThreadPoolExecutor(1), step_deadline_s=5.0)


async def test_vllm_goes_on_behind_an_update() -> None:
    core = Core()
    engine = engine_over(core)
    async with engine.paused():
        assert core.told == ["pause"]
    assert core.told == ["pause", "resume"]
    await engine.close()


async def test_vllm_does_not_go_on_with_weights_that_may_be_torn() -> None:
    core = Core()
    engine = engine_over(core)
    with pytest.raises(EngineError, match="half in use"):
        async with engine.paused():
            raise EngineError("version 3 is half in use")
    assert core.told == ["pause"]
    await engine.close()


async def test_an_update_that_is_cut_short_by_the_end_of_the_engine_ends_quietly() -> None:
    core = Core()
    engine = engine_over(core)
    is_paused = asyncio.Event()

    async def update() -> None:
        async with engine.paused():
            is_paused.set()
            await asyncio.Event().wait()

    updating = asyncio.create_task(update(), name="update")
    async with asyncio.timeout(10):
        await is_paused.wait()
        await engine.close()
        updating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await updating
    assert core.told == ["pause"]
