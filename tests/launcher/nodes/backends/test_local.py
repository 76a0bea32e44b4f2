"""The keeper of this machine as a child of the launcher: killing it leaves nothing."""

import asyncio
import os
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from darts_async.machine.spawn import module_command, outlives_parent
from launcher.nodes.backends import AgentCommand
from launcher.nodes.backends.local import LocalBackend
from tests.support.byte_tokenizer import write_tokenizer

TOKEN = "DARTS_TEST_TOKEN"

# It starts processes each of which lives for a moment and leaves a successor in a session of its own.
REWARD = """
import os, time
from pathlib import Path

def relay(ends_at_s):
    if os.fork():
        return
    os.setsid()
    while time.monotonic() < ends_at_s:
        time.sleep(0.002)
        if os.fork():
            os._exit(0)
        os.setsid()
    os._exit(0)

def reward(*, prompt, response, answer, metadata, finish_reason):
    for _ in range(8):
        relay(time.monotonic() + 60)
    Path("relaying").touch()
    time.sleep(600)
"""

KEEPER = """
import asyncio
import numpy as np
from pathlib import Path
from darts_async.protocol import Score
from darts_async.reward.descendants import become_subreaper
from darts_async.reward.worker_messages import FunctionSpec
from darts_async.reward.worker_pool import RewardPool
async def main():
    become_subreaper()
    pool = RewardPool((FunctionSpec("relaying_reward:reward"),), Path("."), num_workers=1, deadline_s=600)
    await pool.start()
    await pool.score(Score(1, "", "", "{}", np.zeros(0, np.int32), "stop"))
asyncio.run(main())
"""


def marked(token: str) -> list[psutil.Process]:
    """Living processes with the token in their environment."""
    entry, found = f"{TOKEN}={token}".encode(), []
    for pid in psutil.pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if entry in environment and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(psutil.Process(pid))
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def test_only_what_cleans_up_after_its_parent_is_known_as_such() -> None:
    assert outlives_parent(module_command("darts_async.reward.warden", "--x", outlives_parent=True))
    assert not outlives_parent(module_command("darts_async.reward.process", "--x"))
    assert not outlives_parent(("python", "-m", "http.server"))
    assert not outlives_parent(())


@pytest.mark.slow
async def test_what_a_reward_function_starts_at_the_moment_of_a_kill_does_not_get_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "relaying_reward.py").write_text(REWARD)
    token = uuid.uuid4().hex
    backend = LocalBackend("local", tmp_path / "keeper.out")
    ended = asyncio.Event()
    command = AgentCommand((sys.executable, "-c", KEEPER), {TOKEN: token}, os.getcwd())
    await backend.launch(command, lambda _: ended.set())
    async with asyncio.timeout(60):
        while not (tmp_path / "relaying").exists():  # noqa: ASYNC110 - another process sets no event of ours
            await asyncio.sleep(0.01)
    await backend.kill()
    assert marked(token) == []
    await backend.close()
    assert ended.is_set()
