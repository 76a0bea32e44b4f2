"""The supervisor: every process gives one exit, and none is left behind."""

import asyncio
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from darts_async.topology.plan import ProcessSpec
from launcher.nodes.scratch import Scratch, all_of, owner_of, sweep
from launcher.nodes.supervisor import ProcessExit, Supervisor
from launcher.run_dir.logs import last_lines
from tests import ROOT

READY = "import sys, time; print('ready', flush=True); "
IGNORES_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + "time.sleep(600)"
SLEEPS = READY + "time.sleep(600)"


def spec(name: str, code: str) -> ProcessSpec:
    return ProcessSpec(name, name.partition("/")[0], (sys.executable, "-c", code), {"SHADE": "blue"}, 10.0)


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with Supervisor(tmp_path, "test") as supervisor:
        yield supervisor


async def one_exit(supervisor: Supervisor) -> ProcessExit:
    async with asyncio.timeout(20):
        async for ended in supervisor.exits():
            return ended
    raise AssertionError


async def until_ready(path: Path, num_lines: int = 1) -> list[str]:
    """The words that a process has printed, once there are that many."""

    def words() -> list[str]:
        return path.read_text().split()

    await asyncio.to_thread(wait_until, lambda: len(words()) >= num_lines)
    return await asyncio.to_thread(words)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.slow
async def test_an_exit_carries_the_code_and_the_output_is_kept(supervisor: Supervisor, tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['SHADE']); sys.exit(7)"
    record = await supervisor.start(spec("reward/0", code))
    ended = await one_exit(supervisor)
    assert (ended.name, ended.pid, ended.code) == ("reward/0", record.pid, 7)
    assert str(ended) == "reward/0 ended with exit code 7"
    assert (tmp_path / "reward-0.out").read_text() == "blue\n"
    assert supervisor.running == ()


@pytest.mark.slow
async def test_a_signal_is_named(supervisor: Supervisor, tmp_path: Path) -> None:
    record = await supervisor.start(spec("reward/0", SLEEPS))
    await until_ready(tmp_path / "reward-0.out")
    os.kill(record.pid, signal.SIGKILL)
    assert str(await one_exit(supervisor)) == "reward/0 was ended by SIGKILL"


@pytest.mark.slow
async def test_a_process_is_known_by_pid_and_start_time(supervisor: Supervisor, tmp_path: Path) -> None:
    record = await supervisor.start(spec("reward/0", SLEEPS))
    assert supervisor.records == {"reward/0": record}
    assert record.started_at_s == pytest.approx(psutil.Process(record.pid).create_time())


@pytest.mark.slow
async def test_stop_asks_first(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.start(spec("reward/0", SLEEPS))
    await until_ready(tmp_path / "reward-0.out")
    await supervisor.stop("reward/0", grace_s=20.0)
    assert (await one_exit(supervisor)).code == -signal.SIGTERM


@pytest.mark.slow
async def test_stop_kills_who_does_not_listen(supervisor: Supervisor, tmp_path: Path) -> None:
    record = await supervisor.start(spec("reward/0", IGNORES_SIGTERM))
    await until_ready(tmp_path / "reward-0.out")
    await supervisor.stop("reward/0", grace_s=0.05)
    assert (await one_exit(supervisor)).code == -signal.SIGKILL
    assert not psutil.pid_exists(record.pid)


@pytest.mark.slow
async def test_stopping_what_does_not_run_is_nothing(supervisor: Supervisor) -> None:
    await supervisor.stop("reward/0", grace_s=1.0)


# Each word in one write: what is printed in parts may be torn apart by what another process prints.
WITH_CHILDREN = textwrap.dedent("""
    import os, signal, subprocess, sys, time
    code = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.write(1, b'ready '); time.sleep(600)"
    plain = subprocess.Popen([sys.executable, "-c", code])
    other_group = subprocess.Popen([sys.executable, "-c", code], process_group=0)
    os.write(1, f"pid={plain.pid} pid={other_group.pid} ".encode())
    time.sleep(600 * LIVES)
""")


@pytest.mark.slow
@pytest.mark.parametrize("lives", [True, False])
async def test_when_a_process_is_gone_so_are_its_children(supervisor: Supervisor, tmp_path: Path, lives: bool) -> None:
    await supervisor.start(spec("reward/0", WITH_CHILDREN.replace("LIVES", str(int(lives)))))
    lines = await until_ready(tmp_path / "reward-0.out", num_lines=4 if lives else 2)
    pids = [int(line.removeprefix("pid=")) for line in lines if line.startswith("pid=")]
    await supervisor.stop("reward/0", grace_s=5.0)
    await one_exit(supervisor)
    assert len(pids) == 2
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
async def test_leaving_the_block_by_an_error_leaves_nobody(tmp_path: Path) -> None:
    pids: list[int] = []

    async def fail() -> None:
        async with Supervisor(tmp_path, "test") as supervisor:
            for number in range(3):
                pids.append((await supervisor.start(spec(f"reward/{number}", IGNORES_SIGTERM))).pid)
            raise ValueError("a mistake of ours")

    with pytest.raises(ExceptionGroup, match="TaskGroup"):
        await fail()
    assert len(pids) == 3
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.slow
async def test_a_command_that_is_not_there_is_an_error(supervisor: Supervisor) -> None:
    missing = ProcessSpec("reward/0", "reward", ("/no/such/program",), {}, 1.0)
    with pytest.raises(FileNotFoundError):
        await supervisor.start(missing)
    assert supervisor.running == ()


LAUNCHER = textwrap.dedent("""
    import asyncio, sys
    from pathlib import Path
    from darts_async.topology.plan import ProcessSpec
    from launcher.nodes.supervisor import Supervisor

    CHILD = "from darts_async.machine.lifetime import die_with_parent; die_with_parent(); print(1, flush=True); input()"
    CHILD = CHILD.replace("input()", "import time; time.sleep(600)")

    async def main():
        logs = Path(sys.argv[1])
        async with Supervisor(logs, "launcher") as supervisor:
            record = await supervisor.start(ProcessSpec("reward/0", "reward", (sys.executable, "-c", CHILD), {}, 1.0))
            while not (logs / "reward-0.out").read_text():
                await asyncio.sleep(0.01)
            print(record.pid, flush=True)
            await asyncio.sleep(600)

    asyncio.run(main())
""")


@pytest.mark.slow
def test_a_killed_launcher_takes_its_processes_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        launcher.kill()
    wait_until(lambda: not alive(pid))
    sweep()  # as the next keeper of the node does


@pytest.mark.slow
def test_a_process_whose_parent_has_gone_before_it_asked_dies_too() -> None:
    code = "from darts_async.machine.lifetime import die_with_parent; die_with_parent(1 << 22); print('alive')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "")


def test_last_lines_come_from_log_and_output(tmp_path: Path) -> None:
    records = [
        {"event": "begun", "level": "info", "timestamp": "t", "process": "learner/0", "step": 3},
        {"event": "lost", "level": "error"},
    ]
    (tmp_path / "learner-0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    (tmp_path / "learner-0.out").write_text("Traceback\n\n  ValueError: no\n")
    expected = ["info begun step=3", "error lost", '{"torn', "Traceback", "  ValueError: no"]
    assert last_lines(tmp_path, "learner/0", 10) == expected
    assert last_lines(tmp_path, "learner/0", 2) == expected[-2:]
    assert last_lines(tmp_path, "shaper/0", 2) == []


WRITES = "import os, tempfile; print(tempfile.mkstemp()[1], flush=True); os.kill(os.getpid(), 9)"


@pytest.mark.slow
async def test_temporary_files_go_with_the_process_that_was_killed(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.start(spec("reward/0", WRITES))
    assert (await one_exit(supervisor)).code == -signal.SIGKILL
    [path] = await until_ready(tmp_path / "reward-0.out")
    assert Path(path).parent.name.startswith("darts-")
    assert not Path(path).parent.exists()


LEAVES_ONE = """
import os, sys
from pathlib import Path
from launcher.nodes.scratch import Scratch
(Scratch.make(sys.argv[1]).path / "file").touch()
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_what_a_dead_holder_has_left_is_swept_away_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(tempfile.mkdtemp())
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    ours, others = owner_of(tmp_path, "a"), owner_of(tmp_path, "b")
    subprocess.run([sys.executable, "-c", LEAVES_ONE, ours], env={**os.environ, "TMPDIR": str(base)}, check=False)
    held = Scratch.make(others)
    (base / "darts-results").mkdir()
    [left] = all_of(ours)
    assert (left / "file").exists()
    sweep()
    assert (all_of(ours), all_of(others)) == ([], [held.path])
    assert (base / "darts-results").exists(), "it has a name of somebody's own"
    held.remove()
    shutil.rmtree(base)


def test_a_sweep_between_the_making_of_a_directory_and_its_lock_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    make, names = tempfile.mkdtemp, list[str]()

    def swept_at_first(**where: Any) -> str:
        names.append(make(**where))
        if len(names) == 1:
            sweep()
        return names[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept_at_first)
    scratch = Scratch.make("somebody")
    assert [Path(name).exists() for name in names] == [False, True]
    scratch.remove()
    assert not scratch.path.exists()


def test_where_directories_have_no_locks_there_is_scratch_and_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, _operation: int) -> None:
        raise OSError(errno.EBADF, "as NFS says")

    monkeypatch.setattr(fcntl, "flock", refuse)
    scratch = Scratch.make("somebody")
    sweep()
    assert scratch.path.exists()
    scratch.remove()
    assert not scratch.path.exists()


def test_a_socket_fits_into_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 60)))
    scratch = Scratch.make("somebody")
    scratch.remove()
    assert len(str(scratch.path)) + 37 < 107
