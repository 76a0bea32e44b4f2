"""Programs of real workers: what they earn, and that they end with their worker, however it ends."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from darts_async.errors import RewardError
from darts_async.protocol import SampleScored, Score, ScoreFailed
from darts_async.reward.sandbox.isolation import Isolation
from darts_async.reward.worker_messages import CodeSpec, FunctionSpec
from darts_async.reward.worker_pool import RewardPool
from tests.reward.sandbox.test_program import in_closed, marked, wait_until_gone
from tests.support.byte_tokenizer import make_byte_tokenizer, write_tokenizer

pytestmark = pytest.mark.slow

MARK = f"of-a-worker-{os.getpid()}"
DOUBLE = "print(2 * int(input()))"
ENDLESS = f"""
import os, sys
os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)", "{MARK}"])
"""


@asynccontextmanager
async def running(directory: Path, walls: Isolation, *, deadline_s: float = 60.0) -> AsyncIterator[RewardPool]:
    code = CodeSpec(isolation=walls.kind, python=walls.python, wall_s=30.0, total_s=30.0)
    pool = RewardPool(
        (FunctionSpec("code", "code", code=code),),
        write_tokenizer(directory),
        num_workers=1,
        deadline_s=deadline_s,
        start_deadline_s=60.0,
    )
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def item(program: str) -> Score:
    tokens = make_byte_tokenizer().encode(f"```python\n{program}\n```").ids
    metadata = json.dumps({"tests": [{"input": "21", "output": "42"}]})
    return Score(1, "", "", metadata, np.array(tokens, np.int32), "stop")


async def until_it_runs() -> None:
    async with asyncio.timeout(30):
        while not marked(MARK):  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(0.02)


@in_closed
async def test_a_worker_runs_programs(walls: Isolation, tmp_path: Path) -> None:
    async with running(tmp_path, walls) as pool:
        assert await pool.score(item(DOUBLE)) == SampleScored(1, 1.0, (1.0,))
        assert await pool.score(item("1 / 0")) == SampleScored(1, 0.0, (0.0,))


@in_closed
async def test_a_program_ends_with_its_pool(walls: Isolation, tmp_path: Path) -> None:
    async with running(tmp_path, walls) as pool:
        task = asyncio.create_task(pool.score(item(ENDLESS)), name="item")
        await until_it_runs()
        task.cancel()
    wait_until_gone(MARK)


@in_closed
async def test_a_program_ends_with_a_warden_that_is_killed(walls: Isolation, tmp_path: Path) -> None:
    async with running(tmp_path, walls) as pool:
        task = asyncio.create_task(pool.score(item(ENDLESS)), name="item")
        await until_it_runs()
        os.kill(*pool.worker_pids, signal.SIGKILL)
        assert isinstance(await task, ScoreFailed)
        await asyncio.to_thread(wait_until_gone, MARK)
        assert await pool.score(item(DOUBLE)) == SampleScored(1, 1.0, (1.0,))


async def test_a_machine_that_cannot_confine_programs_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RewardError, match="bubblewrap is not installed"):
        async with running(tmp_path, Isolation("bubblewrap", sys.executable)):
            pass
