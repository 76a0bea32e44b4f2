"""The fork server: what it forks is a child of the keeper like any other, and without it nothing is lost but time."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from darts_async.machine.fork_server import adopt_orphans
from darts_async.machine.spawn import is_module_command, module_command
from darts_async.topology.plan import ProcessSpec
from launcher.nodes.supervisor import ProcessExit, Supervisor, open_output
from launcher.nodes.warm_start import Forks, Orphans
from tests import ROOT
from tests.launcher.nodes.test_supervisor import until_ready, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="processes are forked on Linux only"),
]

CHILD = """
import json, os, random, sys, tempfile, time
print(json.dumps({
    "argv": sys.argv[1:], "name": __name__, "shade": os.environ.get("SHADE"), "parent": os.getppid(),
    "session": os.getsid(0), "pid": os.getpid(), "temporary": tempfile.gettempdir(), "drawn": random.random(),
    "was_imported": "wave" in sys.modules, "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
    "descriptors": len(os.listdir("/proc/self/fd")),
}), flush=True)
if "--sleep" in sys.argv:
    time.sleep(600)
if "--orphan" in sys.argv and os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.2)
    os._exit(0)
sys.exit(7)
"""


class Node:
    """A supervisor with a fork server, and the module that its processes run."""

    def __init__(self, home: Path, *modules: str) -> None:
        self.home = home
        self.forks = Forks(("--run-dir", str(home)), modules, lambda: open_output(home, "keeper/local"))
        self.supervisor = Supervisor(home, "test", self.forks)

    async def start(self, name: str, *words: str, module: str = "darts_child") -> int:
        argv = module_command(module, "--run-dir", str(self.home), *words)
        spec = ProcessSpec(name, name.partition("/")[0], argv, {"SHADE": "blue", "OMP_NUM_THREADS": "1"}, 10.0)
        return (await self.supervisor.start(spec)).pid

    async def one_exit(self) -> ProcessExit:
        async with asyncio.timeout(20):
            async for ended in self.supervisor.exits():
                return ended
        raise AssertionError

    def said(self, name: str) -> dict[str, object]:
        text: dict[str, object] = json.loads((self.home / f"{name.replace('/', '-')}.out").read_text().splitlines()[-1])
        return text


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    (tmp_path / "darts_child.py").write_text("if __name__ == '__main__':\n" + indented(CHILD))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    node = Node(tmp_path, "wave", "darts_child")
    try:
        async with node.supervisor:
            yield node
    finally:
        await node.forks.close()


@pytest.fixture(autouse=True)
def _orphans_go_to_init_again() -> Iterator[None]:
    yield
    assert adopt_orphans(wanted=False)


def indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


async def test_a_forked_process_is_a_child_with_its_own_session_environment_and_command_line(node: Node) -> None:
    pid = await node.start("reward/0", "--incarnation", "1")
    ended = await node.one_exit()
    assert (ended.name, ended.pid, ended.code) == ("reward/0", pid, 7)
    said = node.said("reward/0")
    assert said["was_imported"], "by the server, as the module itself imports nothing of it"
    assert (said["name"], said["shade"], said["parent"]) == ("__main__", "blue", os.getpid())
    assert said["pid"] == said["session"] == pid
    assert said["argv"] == ["--run-dir", str(node.home), "--incarnation", "1"]
    assert "darts-" in str(said["temporary"]), "a directory of its own"
    assert said["threads"] == "3", "as here, and not as in the server"
    assert said["descriptors"] == 4, "three of any process, and the one that lists them"


async def test_two_of_them_draw_different_numbers_and_one_can_be_killed_and_found_by_its_command_line(
    node: Node,
) -> None:
    pids = [await node.start(f"reward/{number}", "--sleep") for number in range(2)]
    for number in range(2):
        await until_ready(node.home / f"reward-{number}.out")
    assert node.said("reward/0")["drawn"] != node.said("reward/1")["drawn"]
    words = psutil.Process(pids[0]).cmdline()
    assert tuple(filter(None, words)) == module_command("darts_child", "--run-dir", str(node.home), "--sleep")
    os.kill(pids[0], signal.SIGKILL)
    ended = await node.one_exit()
    assert (ended.pid, ended.code) == (pids[0], -signal.SIGKILL)
    await node.supervisor.stop("reward/1", 5.0)
    ended = await node.one_exit()
    assert (ended.pid, ended.code) == (pids[1], -signal.SIGTERM)


async def test_what_was_forked_outlives_the_server_and_the_next_start_has_another(node: Node) -> None:
    await node.start("reward/0", "--sleep")
    server = node.forks.pid
    assert server is not None
    os.kill(server, signal.SIGKILL)
    for number in (1, 2):  # the first may still meet the dying one
        await node.start(f"reward/{number}")
        assert (await node.one_exit()).name == f"reward/{number}"
    assert node.forks.pid != server
    assert node.said("reward/2")["was_imported"]
    assert "reward/0" in node.supervisor.running


async def test_a_server_that_hangs_is_given_up_and_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.nodes.warm_start.FORKED_WITHIN_S", 0.3)
    await node.forks.start()
    assert node.forks.pid is not None
    os.kill(node.forks.pid, signal.SIGSTOP)
    pid = await node.start("reward/0")
    ended = await node.one_exit()
    assert (ended.pid, ended.code) == (pid, 7)
    assert not node.said("reward/0")["was_imported"], "it was started in the ordinary way"
    left = {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}
    assert not left - {node.forks.pid}


async def test_what_waits_for_the_imports_is_not_started_when_the_node_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    node = Node(tmp_path, "slow_import")
    async with node.supervisor, asyncio.timeout(20):
        starting = asyncio.create_task(node.start("reward/0", module="slow_import"))
        await asyncio.to_thread(wait_until, lambda: bool(node.forks._asked))
        node.forks.end()
        with pytest.raises(OSError, match="the node ends"):
            await starting
        assert node.supervisor.running == ()
        await node.forks.close()


async def test_two_starts_after_the_death_of_the_server_share_the_next_one(node: Node) -> None:
    await node.start("reward/0")
    assert (await node.one_exit()).code == 7
    assert node.forks.pid is not None
    os.kill(node.forks.pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: node.forks._channel is None)
    started = await asyncio.gather(*(node.start(f"reward/{number}") for number in (1, 2)))
    ended = {(await node.one_exit()).pid for _ in started}
    assert ended == set(started)
    assert node.forks._num_servers == 2
    assert all(node.said(f"reward/{number}")["was_imported"] for number in (1, 2))


async def test_code_that_has_changed_is_not_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "launcher"  # stands for the package that a developer edits
    package.mkdir()
    (package / "__init__.py").write_text("__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n")
    edited = package / "edited.py"
    edited.write_text("if __name__ == '__main__':\n    print('{\"text\": \"old\"}', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    node = Node(tmp_path, "launcher.edited")
    try:
        async with node.supervisor:
            await node.start("reward/0", module="launcher.edited")
            assert (await node.one_exit()).code == 0
            assert node.said("reward/0")["text"] == "old"
            edited.write_text("if __name__ == '__main__':\n    print('{\"text\": \"new\"}', flush=True)\n")
            later_ns = time.time_ns() + 10**9
            os.utime(edited, ns=(later_ns, later_ns))
            await node.start("reward/0", module="launcher.edited")
            assert (await node.one_exit()).code == 0
            assert node.said("reward/0")["text"] == "new"
    finally:
        await node.forks.close()


async def test_a_module_that_leaves_a_thread_is_not_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "busy.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "if __name__ == '__main__':\n    print('{\"text\": \"runs\"}', flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    node = Node(tmp_path, "busy")
    try:
        async with node.supervisor:
            await node.start("reward/0", module="busy")
            assert (await node.one_exit()).code == 0
            assert node.said("reward/0")["text"] == "runs"
    finally:
        await node.forks.close()


async def test_a_module_that_is_missing_fails_in_its_own_process(node: Node) -> None:
    node.forks = Forks((), ("no_such_module",), lambda: open_output(node.home, "keeper/local"))
    node.supervisor._forks = node.forks
    await node.start("reward/0", module="no_such_module")
    assert (await node.one_exit()).code == 1
    assert "No module named no_such_module" in (node.home / "reward-0.out").read_text()


async def test_an_orphan_that_has_ended_is_let_go(node: Node) -> None:
    orphans = Orphans()
    await node.start("reward/0", "--orphan")
    assert (await node.one_exit()).code == 7
    ours = {pid for pid in [node.forks.pid] if pid is not None}
    async with asyncio.timeout(20):
        while strangers(ours):
            orphans.reap(ours)
            await asyncio.sleep(0.02)


def strangers(ours: set[int]) -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.pid not in ours} - {os.getpid()}


def test_a_command_that_is_not_of_this_package_is_not_forked() -> None:
    assert is_module_command(module_command("x"), python=sys.executable)
    assert not is_module_command(module_command("x", outlives_parent=True), python=sys.executable)
    assert not is_module_command(module_command("x"), python="/another/python")
    assert not is_module_command((sys.executable, "-c", "pass"), python=sys.executable)
