"""The pool with real workers: whatever a reward function does, every item ends in a reward or in a reason."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest
import uvloop

from darts_async.errors import RewardError
from darts_async.protocol import FinishReason, SampleScored, Score, ScoreFailed
from darts_async.reward.limits import Limits
from darts_async.reward.worker_messages import FunctionSpec
from darts_async.reward.worker_pool import NO_LIMITS, RewardPool
from tests.support.byte_tokenizer import make_byte_tokenizer, write_tokenizer

pytestmark = pytest.mark.slow

# What a function of this module does is the prompt of the item.
MISCHIEF = """
import os, signal, subprocess, sys, time
from pathlib import Path
from typing import Literal

if Path("crash_at_import").exists():
    os._exit(7)
if Path("slow_start").exists():
    time.sleep(1.5)

def escape(number):
    # A process in a session of its own, whose parent is gone at once, and which knows nothing of its environment.
    started = 'echo $$ > pid.{0}; mv pid.{0} escaped.{0}; exec sleep 600'.format(number)
    subprocess.run(["env", "-i", "PATH=" + os.environ["PATH"], "setsid", "-f", "sh", "-c", started], check=True)
    while not Path("escaped.{0}".format(number)).exists(): time.sleep(0.01)

loaded = []

def lazily():
    if not loaded:
        time.sleep(1.5)
        loaded.append(True)
    return 1.0

def end_with_many_words():
    # The warden sees the words and the end at the same time: it is stopped until the worker has ended.
    warden, (reading, writing) = os.getppid(), os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)
        os.kill(warden, signal.SIGCONT)
        os._exit(0)
    os.kill(warden, signal.SIGSTOP)
    os.write(2, b"many words " * 2000 + b"and the last one")
    os._exit(3)

def mischief(*, prompt, response, answer, metadata, finish_reason):
    match prompt:
        case "one": return 1.0
        case "many words": end_with_many_words()
        case "long message": raise ValueError("y" * 5000)
        case "no item": return type("Lazy", (), {"shape": (), "item": lambda self: 1 / 0})()
        case "no repr": return type("Shy", (), {"__repr__": lambda self: 1 / 0})()
        case "signal 40": os.kill(os.getpid(), 40)
        case "echo": return float(response == answer and metadata == {"k": ["v", 1]} and finish_reason == "length")
        case "print":
            print("noise" * 10_000)
            os.write(1, b"more noise")
            subprocess.run(["echo", "and more"], check=True)
            return 0.25
        case "read": return float(sys.stdin.read() == "")
        case "raise": raise KeyError("the place \\ud800")
        case "nan": return float("nan")
        case "import": return lazily()
        case "escape":
            for number in range(3):
                escape(number)
            return 1.0
        case "escape and hang":
            escape(0)
            while True: time.sleep(60)
        case "escape and die":
            escape(0)
            os._exit(5)
        case "memory":
            kept = b"x" * (192 << 20)
            while True: time.sleep(60)
        case "memory of a child":
            subprocess.run([sys.executable, "-c", "kept = b'x' * (192 << 20); import time; time.sleep(600)"])
        case "processes":
            for number in range(12):
                escape(number)
            while True: time.sleep(60)
        case "file":
            with open("large", "wb") as file:
                file.truncate(2 << 20)
        case "file of a child":
            subprocess.run(["dd", "if=/dev/zero", "of=large", "bs=1M", "count=2"], check=True)
        case "much output":
            while True: print("y" * 1000)
        case "some output":
            print("z" * 300_000)
            return 1.0
        case "text": return "1.0"
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path("hanging").touch()
            while True: time.sleep(60)
        case "hang with child":
            child = subprocess.Popen(["sleep", "600"])
            Path("child_pid").write_text(str(child.pid))
            child.wait()
        case "leave": sys.exit(3)
        case "interrupt": raise KeyboardInterrupt
        case "own": raise type("Odd", (BaseException,), {})("words")
        case "garbage":
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                try: os.write(descriptor, b"what is not a reply" * 100)
                except OSError: pass
            return 1.0
        case "exit": os._exit(3)
        case "exit as for a limit": os._exit(232)
        case "segfault": os.kill(os.getpid(), signal.SIGSEGV)
"""


def score(prompt: str, sample_id: int = 1, response: str = "", finish_reason: FinishReason = "stop") -> Score:
    tokenizer = make_byte_tokenizer()
    tokens = np.array(tokenizer.encode(response).ids, np.int32)
    return Score(sample_id, prompt, "déjà vu", '{"k": ["v", 1]}', tokens, finish_reason)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of pool and workers, with the user's module and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user_reward.py").write_text(MISCHIEF)
    return write_tokenizer(tmp_path)


@asynccontextmanager
async def running(
    directory: Path,
    *,
    function: str = "user_reward:mischief",
    num_workers: int = 1,
    deadline_s: float = 20.0,
    start_deadline_s: float = 20.0,
    limits: Limits = NO_LIMITS,
) -> AsyncIterator[RewardPool]:
    """A started pool; afterwards no process of it may be left."""
    pool = RewardPool(
        (FunctionSpec(function),),
        directory,
        num_workers=num_workers,
        deadline_s=deadline_s,
        start_deadline_s=start_deadline_s,
        limits=limits,
    )
    await pool.start()
    pids = pool.worker_pids
    assert len(pids) == num_workers
    try:
        yield pool
    finally:
        pids += pool.worker_pids
        await pool.close()
        assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running_children() -> list[int]:
    return [child.pid for child in psutil.Process().children() if is_running(child.pid)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(0.01)


# --- rewards -------------------------------------------------------------------------------------------------


async def test_a_function_gets_the_decoded_response_and_all_fields(directory: Path) -> None:
    async with running(directory) as pool:
        response = "<|im_start|>déjà vu<|im_end|>"
        assert await pool.score(score("echo", 5, response, "length")) == SampleScored(5, 1.0)
        assert await pool.score(score("echo", 6, "other", "length")) == SampleScored(6, 0.0)


async def test_what_a_function_prints_or_reads_does_not_touch_the_stream(directory: Path) -> None:
    async with running(directory) as pool:
        assert await pool.score(score("print", 1)) == SampleScored(1, 0.25)
        assert await pool.score(score("read", 2)) == SampleScored(2, 1.0)
        assert await pool.score(score("print", 3)) == SampleScored(3, 0.25)


async def test_many_items_over_several_workers_each_get_their_own_answer(directory: Path) -> None:
    async with running(directory, function="exact_match", num_workers=3) as pool:
        items = [score("", n, "déjà vu" if n % 3 else "wrong") for n in range(200)]
        replies = await asyncio.gather(*(pool.score(item) for item in items))
    assert replies == [SampleScored(n, float(n % 3 > 0)) for n in range(200)]


def test_the_pool_runs_on_uvloop(directory: Path) -> None:
    async def scenario() -> None:
        async with running(directory) as pool:
            (pid,) = pool.worker_pids
            assert await pool.score(score("one")) == SampleScored(1, 1.0)
            failed = await pool.score(score("segfault"))
            assert isinstance(failed, ScoreFailed)
            assert failed.error == f"reward worker {pid} was ended by SIGSEGV"
            assert await pool.score(score("one")) == SampleScored(1, 1.0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


# --- failures ------------------------------------------------------------------------------------------------


async def test_a_function_that_raises_is_reported_with_its_traceback_and_keeps_its_worker(directory: Path) -> None:
    async with running(directory) as pool:
        before = pool.worker_pids
        failed = await pool.score(score("raise", 4))
        assert isinstance(failed, ScoreFailed)
        assert (failed.sample_id, failed.kind) == (4, "raised")
        assert "user_reward.py" in failed.error
        assert "KeyError" in failed.error
        assert pool.worker_pids == before


@pytest.mark.parametrize(
    ("prompt", "kind", "error"),
    [("nan", "not_finite", "must be finite"), ("text", "wrong_type", "must be a number, and str '1.0'")],
)
async def test_what_is_not_a_finite_number_is_not_a_reward(directory: Path, prompt: str, kind: str, error: str) -> None:
    async with running(directory) as pool:
        failed = await pool.score(score(prompt, 4))
        assert isinstance(failed, ScoreFailed)
        assert failed.kind == kind
        assert error in failed.error


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("long message", "ValueError: yyy"),
        ("no item", "ZeroDivisionError"),
        ("no repr", "ZeroDivisionError"),
        ("own", "Odd: words"),
        ("leave", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt"),
    ],
)
async def test_whatever_raises_keeps_its_worker_and_is_told_by_its_name(
    directory: Path, prompt: str, error: str
) -> None:
    async with running(directory) as pool:
        before = pool.worker_pids
        failed = await pool.score(score(prompt, 4))
        assert isinstance(failed, ScoreFailed)
        assert failed.kind == "raised"
        assert error in failed.error
        assert len(failed.error) < 2500
        assert pool.worker_pids == before


async def test_a_function_that_hangs_is_killed_and_its_worker_replaced(directory: Path) -> None:
    async with running(directory, deadline_s=1.0) as pool:
        (hung,) = pool.worker_pids
        await pool.score(score("one"))
        failed = await pool.score(score("hang", 4))
        assert failed == ScoreFailed(4, "timeout", "the reward function took longer than reward.deadline_s (1 s)")
        assert await pool.score(score("one", 5)) == SampleScored(5, 1.0)
        assert pool.worker_pids != (hung,)
        assert not is_running(hung)


async def test_what_a_hanging_function_has_started_is_killed_with_it(directory: Path) -> None:
    async with running(directory, deadline_s=1.0) as pool:
        await pool.score(score("one"))
        failed = await pool.score(score("hang with child"))
        assert isinstance(failed, ScoreFailed)
        assert failed.kind == "timeout"
    child_pid = int((directory / "child_pid").read_text())
    await until(lambda: not is_running(child_pid))


@pytest.mark.parametrize(
    ("prompt", "end"),
    [
        ("exit", "ended with exit code 3"),
        ("exit as for a limit", "ended with exit code 231 to 235"),
        ("segfault", "was ended by SIGSEGV"),
    ],
)
async def test_a_worker_that_dies_is_replaced(directory: Path, prompt: str, end: str) -> None:
    async with running(directory) as pool:
        (pid,) = pool.worker_pids
        assert await pool.score(score(prompt, 4)) == ScoreFailed(4, "worker_died", f"reward worker {pid} {end}")
        assert await pool.score(score("one", 5)) == SampleScored(5, 1.0)


async def test_a_worker_that_writes_to_every_descriptor_costs_its_item_alone(directory: Path) -> None:
    async with running(directory) as pool:
        failed = await pool.score(score("garbage", 4))
        assert isinstance(failed, ScoreFailed)
        assert (failed.kind, "wrote what is not a reply" in failed.error) == ("worker_died", True)
        assert await pool.score(score("one", 5)) == SampleScored(5, 1.0)


async def test_a_worker_ended_by_a_signal_without_a_name_is_reported_too(directory: Path) -> None:
    async with running(directory) as pool:
        (pid,) = pool.worker_pids
        error = f"reward worker {pid} was ended by signal 40"
        assert await pool.score(score("signal 40", 4)) == ScoreFailed(4, "worker_died", error)


async def test_the_last_words_of_a_worker_are_printed_whole(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with running(directory) as pool:
        failed = await pool.score(score("many words", 4))
    assert isinstance(failed, ScoreFailed)
    assert "exit code 3" in failed.error
    assert capfd.readouterr().err.endswith("and the last one")


async def test_a_worker_that_died_between_items_costs_no_item(directory: Path) -> None:
    async with running(directory) as pool:
        (pid,) = pool.worker_pids
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not pool.worker_pids)
        assert await pool.score(score("one", 5)) == SampleScored(5, 1.0)


async def test_a_crash_loop_is_reported_item_by_item_and_ends_when_its_cause_does(directory: Path) -> None:
    async with running(directory) as pool:
        marker = directory / "crash_at_import"
        marker.touch()
        await pool.score(score("exit"))
        for _ in range(2):
            failed = await pool.score(score("one"))
            assert isinstance(failed, ScoreFailed)
            assert failed.kind == "worker_died"
            assert "could not start" in failed.error
            assert "ended with exit code 7" in failed.error
        marker.unlink()
        assert await pool.score(score("one")) == SampleScored(1, 1.0)


async def test_a_slow_start_does_not_count_against_the_deadline(directory: Path) -> None:
    async with running(directory, deadline_s=1.0) as pool:
        (directory / "slow_start").touch()
        await pool.score(score("exit"))
        assert await pool.score(score("one")) == SampleScored(1, 1.0)


async def test_what_a_function_imports_at_its_first_item_counts_as_start(directory: Path) -> None:
    async with running(directory, deadline_s=1.0) as pool:
        for number in range(2):
            assert await pool.score(score("import")) == SampleScored(1, 1.0), f"worker {number} pays for it, and may"
            await pool.score(score("exit"))


async def test_the_first_item_has_a_deadline_too(directory: Path) -> None:
    async with running(directory, deadline_s=0.5, start_deadline_s=4.0) as pool:
        failed = await pool.score(score("hang", 4))
        setting = "reward.start_deadline_s, the time for a worker's first item, (4 s)"
        assert failed == ScoreFailed(4, "timeout", f"the reward function took longer than {setting}")


async def test_a_function_that_hangs_at_every_first_item_has_the_time_of_a_start_three_times(directory: Path) -> None:
    async with running(directory, deadline_s=0.2) as pool:
        pool._start_deadline_s = 0.3
        failures = [await pool.score(score("hang", n)) for n in range(5)]
        deadlines = [re.findall(r"reward\.\w+", failed.error) for failed in failures if isinstance(failed, ScoreFailed)]
        assert deadlines == [["reward.start_deadline_s"]] * 3 + [["reward.deadline_s"]] * 2
        pool._deadline_s = 20.0
        assert await pool.score(score("one")) == SampleScored(1, 1.0)
        await pool.score(score("exit"))
        pool._deadline_s = 0.2
        late = await pool.score(score("hang"))
        assert isinstance(late, ScoreFailed)
        assert "start_deadline_s" in late.error, "one that has answered may load again"


# --- nothing outlives its worker ------------------------------------------------------------------------------


def escaped(directory: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(directory.glob("escaped.*"))]


async def test_what_has_left_its_session_and_lost_its_parent_ends_with_its_worker(directory: Path) -> None:
    async with running(directory, deadline_s=5.0) as pool:
        assert await pool.score(score("escape")) == SampleScored(1, 1.0)
        pids = escaped(directory)
        assert len(pids) == 3
        assert all(map(is_running, pids)), "while the worker lives, what it has started may live"
    assert not any(map(is_running, pids)), "when the pool is closed nothing is left"


@pytest.mark.parametrize(("prompt", "kind"), [("escape and hang", "timeout"), ("escape and die", "worker_died")])
async def test_what_has_escaped_is_gone_when_the_worker_is_replaced(directory: Path, prompt: str, kind: str) -> None:
    async with running(directory, deadline_s=2.0) as pool:
        await pool.score(score("one"))
        failed = await pool.score(score(prompt))
        assert isinstance(failed, ScoreFailed)
        assert failed.kind == kind
        (pid,) = escaped(directory)
        assert await pool.score(score("one")) == SampleScored(1, 1.0)
        assert not is_running(pid)


async def test_what_a_killed_warden_leaves_is_found_by_its_mark(directory: Path) -> None:
    async with running(directory) as pool:
        task = asyncio.create_task(pool.score(score("hang with child")), name="hanging item")
        await until((directory / "child_pid").exists)
        (warden,) = pool.worker_pids
        os.kill(warden, signal.SIGKILL)
        failed = await task
        assert isinstance(failed, ScoreFailed)
        assert failed.error == f"reward worker {warden} was ended by SIGKILL"
        assert await pool.score(score("one")) == SampleScored(1, 1.0)
        assert not is_running(int((directory / "child_pid").read_text()))


def test_what_a_killed_warden_leaves_comes_to_the_reward_process_and_is_ended_there(directory: Path) -> None:
    script = """
import asyncio, os, signal
import numpy as np
from pathlib import Path
from typing import Literal
from darts_async.protocol import Score
from darts_async.reward.descendants import become_subreaper, descendants
from darts_async.reward.worker_messages import FunctionSpec
from darts_async.reward.worker_pool import RewardPool
async def main():
    become_subreaper()
    pool = RewardPool((FunctionSpec("user_reward:mischief"),), Path("."), num_workers=2, deadline_s=60)
    await pool.start()
    assert not pool.kill_strays()
    await pool.score(Score(1, "escape", "", "{}", np.zeros(0, np.int32), "stop"))
    assert not pool.kill_strays()
    for pid in pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
    while len(descendants(os.getpid())) > 2 or pool.kill_strays():
        pool.kill_strays()
        await asyncio.sleep(0.01)
    await pool.close()
    assert not descendants(os.getpid())
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(escaped(directory)) == 3
    assert not any(map(is_running, escaped(directory)))


LIMITS = Limits(memory_bytes=160 << 20, processes=10, file_bytes=1 << 20, output_bytes=1 << 20)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("memory", r"used more memory than reward\.limits\.memory_gib \(0\.15625\), and was ended"),
        ("memory of a child", r"used more memory than reward\.limits\.memory_gib"),
        ("processes", r"had more processes than reward\.limits\.processes \(10\), and was ended"),
        ("file", r"wrote a file larger than reward\.limits\.file_gib \(0\.00\d+\):\n(.*\n)*OSError: .*File too large"),
        ("file of a child", r"wrote a file larger than reward\.limits\.file_gib"),
        ("much output", r"printed more for one item than reward\.limits\.output_mib \(1\), and was ended"),
    ],
)
async def test_a_limit_that_is_exceeded_is_named_with_its_setting(directory: Path, prompt: str, message: str) -> None:
    async with running(directory, limits=LIMITS) as pool:
        failed = await pool.score(score(prompt, 4))
        assert isinstance(failed, ScoreFailed)
        assert (failed.sample_id, failed.kind) == (4, "limit")
        assert re.match(f"the reward function {message}", failed.error)
        assert await pool.score(score("one", 5)) == SampleScored(5, 1.0)
    assert not any(map(is_running, escaped(directory)))


async def test_output_is_counted_by_item(directory: Path) -> None:
    async with running(directory, limits=LIMITS) as pool:
        before = pool.worker_pids
        for number in range(6):
            assert await pool.score(score("some output", number)) == SampleScored(number, 1.0)
        assert pool.worker_pids == before


# --- cancelling and closing ----------------------------------------------------------------------------------


async def test_cancelling_an_item_under_way_frees_its_worker(directory: Path) -> None:
    async with running(directory) as pool:
        (busy,) = pool.worker_pids
        task = asyncio.create_task(pool.score(score("hang")), name="hanging item")
        await until((directory / "hanging").exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await pool.score(score("one", 5)) == SampleScored(5, 1.0)
        assert not is_running(busy)


async def test_cancelling_a_waiting_item_touches_no_worker(directory: Path) -> None:
    async with running(directory, deadline_s=1.0) as pool:
        await pool.score(score("one"))
        hanging = asyncio.create_task(pool.score(score("hang", 1)), name="hanging item")
        waiting = asyncio.create_task(pool.score(score("one", 2)), name="waiting item")
        await until((directory / "hanging").exists)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        failed = await hanging
        assert isinstance(failed, ScoreFailed)
        assert failed.kind == "timeout"


async def test_closing_refuses_items_under_way_waiting_and_new(directory: Path) -> None:
    async with running(directory) as pool:
        tasks = [asyncio.create_task(pool.score(score("hang", n)), name=f"item {n}") for n in range(4)]
        await until((directory / "hanging").exists)
        await pool.close()
        async with asyncio.timeout(10):
            results = await asyncio.gather(*tasks, pool.score(score("one")), return_exceptions=True)
        assert [(type(result), str(result)) for result in results] == [(RewardError, "the reward pool is closed")] * 5
        await pool.close()


async def test_closing_does_not_wait_for_a_back_off(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darts_async.reward.worker_pool.FIRST_BACKOFF_S", 1e6)
    monkeypatch.setattr("darts_async.reward.worker_pool.MAX_BACKOFF_S", 1e6)
    async with running(directory) as pool:
        await pool.score(score("exit"))
        waiting = asyncio.create_task(pool.score(score("one")), name="backing off")
        await asyncio.sleep(0)
    with pytest.raises(RewardError, match="closed"):
        await waiting


async def test_a_warden_that_a_reward_function_has_stopped_ends_as_any_other(directory: Path) -> None:
    async with running(directory) as pool:
        (warden,) = pool.worker_pids
        os.kill(warden, signal.SIGSTOP)
        assert await pool.score(score("one")) == SampleScored(1, 1.0)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_workers_and_what_has_escaped_them_die_with_the_process_that_started_them(
    directory: Path, is_stopped: bool
) -> None:
    script = """
import asyncio, sys
import numpy as np
from pathlib import Path
from typing import Literal
from darts_async.protocol import Score
from darts_async.reward.worker_messages import FunctionSpec
from darts_async.reward.worker_pool import RewardPool
async def main():
    pool = RewardPool((FunctionSpec("user_reward:mischief"),), Path("."), num_workers=2, deadline_s=60)
    await pool.start()
    score = Score(1, "escape", "", "{}", np.zeros(0, np.int32), "stop")
    await pool.score(score)
    print(*pool.worker_pids, flush=True)
    await asyncio.get_running_loop().create_future()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        wardens = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        workers = [*wardens, *(child for warden in wardens for child in warden.children(recursive=True))]
        if is_stopped:
            for warden in wardens:
                warden.suspend()
        parent.kill()
    assert len(workers) >= 2 + 2 + 3, "wardens, workers and what one of these has let go"
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE] == []


# --- what cannot start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("def other(): pass", "has no 'mischief'"),
        ("def mischief(prompt): pass", "it is called as mischief"),
        ("import os; os._exit(9)", r"could not start: reward worker \d+ ended with exit code 9"),
    ],
)
async def test_a_function_that_cannot_be_loaded_stops_the_start(directory: Path, source: str, message: str) -> None:
    (directory / "user_reward.py").write_text(source)
    pool = RewardPool((FunctionSpec("user_reward:mischief"),), directory, num_workers=2, deadline_s=1.0)
    with pytest.raises(RewardError, match=message):
        await pool.start()
    assert running_children() == []


async def test_a_start_that_hangs_has_a_deadline(directory: Path) -> None:
    (directory / "user_reward.py").write_text("import time; time.sleep(600)")
    pool = RewardPool(
        (FunctionSpec("user_reward:mischief"),), directory, num_workers=2, deadline_s=1.0, start_deadline_s=0.5
    )
    with pytest.raises(RewardError, match=r"reward worker \d+ could not start: it was not ready within 0.5 s"):
        await pool.start()
    assert running_children() == []


async def test_a_missing_tokenizer_stops_the_start(directory: Path) -> None:
    pool = RewardPool((FunctionSpec("exact_match"),), directory / "elsewhere", num_workers=1, deadline_s=1.0)
    with pytest.raises(RewardError, match=r"elsewhere has no tokenizer\.json"):
        await pool.start()


# --- several jobs at a time, and batches ------------------------------------------------------------------------

COROUTINES = """
import asyncio, os, time

running = []
both_run = asyncio.Event()

async def meet(*, prompt, **_):
    running.append(prompt)
    if len(running) == 2:
        both_run.set()
    await both_run.wait()
    return float(len(running))

async def mischief(*, prompt, **_):
    match prompt:
        case "one": return 1.0
        case "wait":
            await asyncio.Event().wait()
        case "wait at first":
            if os.path.exists("waits"): return 1.0
            open("waits", "w").close()
            await asyncio.Event().wait()
        case "refuse to end":
            while True:
                try: await asyncio.Event().wait()
                except asyncio.CancelledError: pass
        case "block": time.sleep(600)
        case "exit": os._exit(3)

def in_a_batch(*, prompts, responses, answers, metadata, finish_reasons):
    if "wait" in prompts:
        while not os.path.exists("go"): time.sleep(0.01)
    return [float(len(prompts))] * len(prompts)
"""


@asynccontextmanager
async def coroutines(
    directory: Path, name: str, *, takes: Literal["sample", "batch"] = "sample"
) -> AsyncIterator[RewardPool]:
    """A pool of one worker that has four responses at a time, or batches of four, and had one already."""
    (directory / "coroutines.py").write_text(COROUTINES)
    pool = RewardPool(
        (FunctionSpec(f"coroutines:{name}", "it", takes),),
        directory,
        num_workers=1,
        deadline_s=0.5,
        start_deadline_s=20.0,
        concurrency=4,
        max_batch=4,
    )
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
        assert running_children() == []


def kind_of(reply: SampleScored | ScoreFailed) -> str:
    return reply.kind if isinstance(reply, ScoreFailed) else "scored"


async def test_a_coroutine_function_has_several_responses_in_one_worker(directory: Path) -> None:
    async with coroutines(directory, "meet") as pool:
        replies = await asyncio.gather(*(pool.score(score(prompt, n)) for n, prompt in enumerate("ab")))
        assert replies == [SampleScored(0, 2.0, (2.0,)), SampleScored(1, 2.0, (2.0,))]


async def test_a_coroutine_that_is_late_costs_neither_its_worker_nor_others(directory: Path) -> None:
    async with coroutines(directory, "mischief") as pool:
        await pool.score(score("one"))
        before = pool.worker_pids
        replies = await asyncio.gather(*(pool.score(score(prompt)) for prompt in ("wait", "one", "wait", "one")))
        assert list(map(kind_of, replies)) == ["timeout", "scored", "timeout", "scored"]
        assert pool.worker_pids == before


@pytest.mark.parametrize("prompt", ["refuse to end", "block"])
async def test_a_coroutine_that_cannot_be_cancelled_costs_its_worker(directory: Path, prompt: str) -> None:
    async with coroutines(directory, "mischief") as pool:
        await pool.score(score("one"))
        before = pool.worker_pids
        assert kind_of(await pool.score(score(prompt))) == "timeout"
        assert kind_of(await pool.score(score("one"))) == "scored"
        assert pool.worker_pids != before


async def test_what_a_worker_had_beside_an_item_for_which_it_was_ended_is_scored_again(directory: Path) -> None:
    async with coroutines(directory, "mischief") as pool:
        cancelled = asyncio.create_task(pool.score(score("wait")), name="cancelled item")
        other = asyncio.create_task(pool.score(score("wait at first")), name="other item")
        await until((directory / "waits").exists)
        cancelled.cancel()
        assert kind_of(await other) == "scored"


async def test_a_worker_that_dies_fails_what_it_had_and_counts_as_one_death(directory: Path) -> None:
    async with coroutines(directory, "mischief") as pool:
        await pool.score(score("one"))
        replies = await asyncio.gather(*(pool.score(score(prompt)) for prompt in ("wait", "wait", "exit")))
        assert list(map(kind_of, replies)) == ["worker_died"] * 3
        [place] = pool._places
        assert place.num_deaths_in_a_row == 1
        assert kind_of(await pool.score(score("one"))) == "scored"


async def test_a_plain_function_has_one_response_at_a_time_whatever_the_concurrency(directory: Path) -> None:
    async with running(directory) as pool:
        assert len(pool._seats) == 1
    async with coroutines(directory, "mischief") as pool:
        assert len(pool._seats) == 4


async def test_responses_that_wait_become_a_batch(directory: Path) -> None:
    async with coroutines(directory, "in_a_batch", takes="batch") as pool:
        tasks = [asyncio.create_task(pool.score(score("wait", n)), name=f"item {n}") for n in range(7)]
        await until(lambda: len(pool._waiting) == 6)
        (directory / "go").touch()
        replies = await asyncio.gather(*tasks)
        sizes = [reply.reward for reply in replies if isinstance(reply, SampleScored)]
        assert sizes == [1.0, 4.0, 4.0, 4.0, 4.0, 2.0, 2.0]


async def test_a_batch_is_bounded_in_bytes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darts_async.reward.worker_pool.MAX_BATCH_BYTES", 2 * len("wait") + 60)
    async with coroutines(directory, "in_a_batch", takes="batch") as pool:
        (directory / "go").touch()
        replies = await asyncio.gather(*(pool.score(score("wait", n)) for n in range(5)))
        assert max(reply.reward for reply in replies if isinstance(reply, SampleScored)) == 2.0


async def test_cancelling_an_item_of_a_batch_leaves_the_others(directory: Path) -> None:
    async with coroutines(directory, "in_a_batch", takes="batch") as pool:
        tasks = [asyncio.create_task(pool.score(score("wait", n)), name=f"item {n}") for n in range(3)]
        await until(lambda: len(pool._waiting) == 2)
        tasks[2].cancel()
        (directory / "go").touch()
        replies = await asyncio.gather(*tasks[:2])
        assert [reply.reward for reply in replies if isinstance(reply, SampleScored)] == [1.0, 1.0]
