"""Hostile programs, in every isolation of this machine: none does harm, and nothing of it is left.

Each is bounded by itself too: it starts at most 200 processes, uses at most 512 MiB and prints at most 64 MiB.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from darts_async.errors import ConfigError, SandboxError
from darts_async.reward.sandbox.choice import Kind, choose_isolation, look_at
from darts_async.reward.sandbox.isolation import Isolation, own_user_id
from darts_async.reward.sandbox.program import Outcome, ProgramLimits, run_program

pytestmark = pytest.mark.slow

LIMITS = ProgramLimits(
    wall_s=20.0, cpu_s=20, memory_bytes=256 << 20, processes=8, file_bytes=1 << 20, output_bytes=1 << 16
)
PYTHONS = (sys.executable, "/usr/bin/python3")
"""The second is one that every user can execute."""


def closed() -> Iterator[Isolation]:
    kinds: tuple[Kind, ...] = ("bubblewrap", "processes")
    for kind in kinds:
        for python in PYTHONS:
            with contextlib.suppress(ConfigError):
                yield choose_isolation(kind, python, allow_weaker=False).isolation
                break


CLOSED = [*closed()]
if CLOSED and not (contained := look_at(replace(CLOSED[-1], namespaces=False))).fault:
    CLOSED.append(contained.isolation)  # as in most containers
BARE = Isolation("processes", CLOSED[-1].python if CLOSED else sys.executable, user_id=own_user_id())
"""What is left where the kernel permits nothing."""
EVERY = [*CLOSED, BARE]
in_every = pytest.mark.parametrize("walls", EVERY, ids=Isolation.describe)
in_closed = pytest.mark.parametrize("walls", CLOSED, ids=Isolation.describe)


def run(walls: Isolation, source: str, limits: ProgramLimits = LIMITS, stdin: str = "", **files: bytes) -> Outcome:
    program = {"program.py": source.encode(), **files}
    return run_program((walls.python, "-I", "program.py"), program, walls, limits, stdin.encode())


def marked(mark: str) -> list[int]:
    """The processes of this machine that have a word in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if mark in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def wait_until_gone(mark: str) -> None:
    """The kernel takes a moment to end all processes of a namespace."""
    for _ in range(1000):
        if not (left := marked(mark)):
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(left[0]).wait(10)
    raise AssertionError(marked(mark))


def test_both_kinds_are_there_where_everything_has_to_be() -> None:
    if "DARTS_REQUIRE_ALL" in os.environ:
        assert [each.kind for each in CLOSED] == ["bubblewrap", "processes", "processes"]


def test_an_interpreter_in_a_private_directory_below_that_of_temporary_files_will_do(tmp_path: Path) -> None:
    """As `python3 -m venv "$(mktemp -d)"` makes it. The tests above take another if this one does not work."""
    if shutil.which("bwrap") is None:
        assert "DARTS_REQUIRE_ALL" not in os.environ
        pytest.skip("bubblewrap is not installed")
    home = tmp_path / "private"
    venv.create(home, symlinks=True)
    home.chmod(0o700)
    assert str(home).startswith("/tmp/")
    choice = choose_isolation("bubblewrap", str(home / "bin" / "python"), allow_weaker=False)
    assert run(choice.isolation, "import sys, json; print(sys.prefix)").stdout.decode().strip() == str(home)
    assert run(choice.isolation, f"open({str(home / 'new')!r}, 'w')").exit_code == 1


# --- programs that mean well ---------------------------------------------------------------------------------


@in_every
def test_a_program_reads_its_input_and_its_files_and_its_output_is_told(walls: Isolation) -> None:
    source = (
        "import sys; print(open('data').read(), input()); print('err', file=sys.stderr); open('new', 'w').write('x')"
    )
    outcome = run(walls, source, stdin="from stdin", data=b"from a file,")
    assert outcome == Outcome(b"from a file, from stdin\n", b"err\n", 0)
    assert outcome.is_good


@in_every
@pytest.mark.parametrize(
    ("source", "exit_code"),
    [("raise SystemExit(3)", 3), ("1 / 0", 1), ("import ctypes; ctypes.string_at(0)", 139)],
)
def test_how_a_program_ends_is_told(walls: Isolation, source: str, exit_code: int) -> None:
    outcome = run(walls, source)
    assert (outcome.exit_code, outcome.breach, outcome.is_good) == (exit_code, None, False)


@in_every
@pytest.mark.parametrize("source", ["import os; os._exit(120)", "import os; os.write(2, b'bwrap: no'); os._exit(1)"])
def test_a_program_cannot_pretend_that_its_sandbox_has_failed(walls: Isolation, source: str) -> None:
    outcome = run(walls, source)
    assert (outcome.is_good, outcome.exit_code) == (False, 120 if "120" in source else 1)


@in_every
def test_a_program_does_not_get_the_pipe_of_its_sandbox(walls: Isolation) -> None:
    source = "import os\nfor n in range(3, 64):\n    try: os.write(n, b'x'); print(n)\n    except OSError: pass"
    assert run(walls, source).stdout == b""


@in_every
def test_what_a_program_leaves_is_removed(walls: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import os\nfor n in range(1500): os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)"
    made: list[str] = []
    real = Isolation.give
    monkeypatch.setattr(Isolation, "give", lambda self, path: (made.append(str(path)), real(self, path)))
    assert run(walls, source).is_good
    assert len(made) == 1
    assert not Path(made[0]).exists()


# --- limits --------------------------------------------------------------------------------------------------


@in_every
def test_a_program_that_sleeps_is_ended_after_the_wall_time(walls: Isolation) -> None:
    outcome = run(walls, "import time; print('early', flush=True); time.sleep(600)", ProgramLimits(wall_s=1.0))
    assert (outcome.stdout, outcome.breach) == (b"early\n", "wall_s")


@in_every
def test_a_program_that_closes_its_output_is_ended_after_the_wall_time(walls: Isolation) -> None:
    outcome = run(walls, "import os, time; os.close(1); os.close(2); time.sleep(600)", ProgramLimits(wall_s=1.0))
    assert outcome.breach == "wall_s"


@in_every
def test_a_program_that_computes_is_ended_after_its_cpu_time(walls: Isolation) -> None:
    outcome = run(walls, "while True: pass", ProgramLimits(wall_s=20.0, cpu_s=1))
    assert outcome.breach is None
    assert outcome.exit_code > 128


@in_every
def test_endless_output_is_cut(walls: Isolation) -> None:
    outcome = run(walls, "for _ in range(64 << 10): print('y' * 1000)")
    assert (len(outcome.stdout), outcome.breach) == (LIMITS.output_bytes, "output")


@in_every
def test_memory_of_one_process_is_limited(walls: Isolation) -> None:
    outcome = run(walls, "kept = [bytearray(16 << 20) for _ in range(32)]; import time; time.sleep(5)")
    assert not outcome.is_good
    assert outcome.breach == "memory" or b"MemoryError" in outcome.stderr


@in_every
def test_memory_of_all_processes_together_is_limited(walls: Isolation) -> None:
    child = "kept = b'x' * (100 << 20); time.sleep(600)"
    source = f"import os, time\nfor _ in range(5):\n    if not os.fork(): {child}\ntime.sleep(600)"
    assert run(walls, source).breach == "memory"


@in_every
def test_a_file_is_limited(walls: Isolation) -> None:
    outcome = run(walls, "open('large', 'wb').write(bytes(2 << 20))")
    assert b"File too large" in outcome.stderr or outcome.exit_code > 128


@pytest.mark.parametrize("walls", [each for each in CLOSED if each.kind == "bubblewrap"], ids=Isolation.describe)
def test_many_files_are_limited_where_they_are_in_memory(walls: Isolation) -> None:
    for place in (".", "/dev/shm"):
        source = f"for n in range(400): open('{place}/' + str(n), 'wb').write(bytes(1 << 20))"
        outcome = run(walls, source)
        assert b"No space left" in outcome.stderr or b"Read-only" in outcome.stderr


@in_every
def test_the_kernel_limits_the_number_of_processes(walls: Isolation) -> None:
    source = """
import os, time
num_forks = 0
try:
    while num_forks < 200:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        num_forks += 1
finally:
    print(num_forks)
"""
    outcome = run(walls, source)
    assert outcome.breach is None
    assert b"BlockingIOError" in outcome.stderr
    assert 1 <= int(outcome.stdout) < LIMITS.processes + 3


@in_every
def test_processes_that_start_processes_are_ended(walls: Isolation) -> None:
    mark = f"tree-{os.getpid()}-{walls.kind}-{walls.namespaces}"
    source = f"""
import os, sys, time
if len(sys.argv) == 1: os.execv(sys.executable, [sys.executable, "-I", "-S", "program.py", "{mark}"])
for _ in range(7):  # 128 processes, if nothing holds them
    try: os.fork()
    except OSError: pass
time.sleep(20)
"""
    assert run(walls, source, replace(LIMITS, wall_s=2.0)).breach == "wall_s"
    wait_until_gone(mark)


@in_every
def test_the_kernel_limits_the_number_of_threads(walls: Isolation) -> None:
    start = "threading.Thread(target=time.sleep, args=(5,), daemon=True).start()"
    outcome = run(walls, f"import threading, time\nfor _ in range(200): {start}", replace(LIMITS, memory_bytes=1 << 30))
    assert b"can't start new thread" in outcome.stderr


# --- nothing outlives it -------------------------------------------------------------------------------------


@in_every
@pytest.mark.parametrize("then", ["time.sleep(600)", "pass", "os.kill(os.getpid(), 11)"])
def test_nothing_that_a_program_has_started_outlives_it(walls: Isolation, then: str) -> None:
    mark = f"stray-{os.getpid()}-{walls.kind}-{walls.namespaces}"
    source = f"""
import os, sys, time
stay = "import time, signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
reading, writing = os.pipe()
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.dup2(writing, 1)
            os.execve(sys.executable, [sys.executable, "-S", "-c", stay, "{mark}"], {{}})
        os._exit(0)
ups = b""
while ups.count(b"up") < 3: ups += os.read(reading, 100)
{then}
"""
    run(walls, source, ProgramLimits(wall_s=5.0, processes=16))
    wait_until_gone(mark)


def test_what_threads_have_started_is_ended_too() -> None:
    mark = f"thread-{os.getpid()}"
    source = f"""
import subprocess, sys, threading, time
command = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(600)", "{mark}"]
def start(): subprocess.Popen(command, stdout=subprocess.PIPE).stdout.read(2); time.sleep(600)
threading.Thread(target=start, daemon=True).start()
time.sleep(600)
"""
    run(BARE, source, replace(LIMITS, wall_s=3.0))
    wait_until_gone(mark)


def test_a_program_that_stops_its_supervisor_is_ended_all_the_same() -> None:
    walls = Isolation("processes", BARE.python)  # of the same user
    outcome = run(walls, "import os, time; os.kill(os.getppid(), 19); time.sleep(600)", ProgramLimits(wall_s=1.0))
    assert outcome.breach == "wall_s"


# --- what is not its business --------------------------------------------------------------------------------


@in_closed
def test_the_keys_of_a_run_cannot_be_read(walls: Isolation, tmp_path: Path) -> None:
    key = tmp_path / "keys" / "shaper-0.key_secret"
    key.parent.mkdir()
    key.write_text("secret")
    outcome = run(walls, f"print(open({str(key)!r}).read())")
    assert b"secret" not in outcome.stdout
    assert outcome.exit_code == 1
    listed = run(walls, f"import os; print(os.listdir({str(tmp_path)!r}))")
    assert listed.exit_code == 1


@in_every
def test_the_environment_is_not_passed_on(walls: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    outcome = run(walls, "import os; print(dict(os.environ))")
    assert outcome.is_good
    assert b"secret" not in outcome.stdout


@in_closed
@pytest.mark.parametrize("place", ["/usr/written", "/etc/written", "/dev/written", "/written", "../written"])
def test_nothing_is_written_outside(walls: Isolation, place: str) -> None:
    outcome = run(walls, f"open({place!r}, 'w').write('x')")
    assert outcome.exit_code == 1
    assert not Path("/tmp", "written").exists()


@in_closed
def test_the_environment_of_another_process_cannot_be_read(walls: Isolation) -> None:
    assert run(walls, f"open('/proc/{os.getpid()}/environ', 'rb').read()").exit_code == 1


@in_closed
def test_no_network_is_reached(walls: Isolation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setblocking(False)
        port, other = server.getsockname()[1], listener.getsockname()[1]
        assert run(walls, f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)").exit_code == 1
        run(
            walls,
            f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {other}))",
        )
        with pytest.raises(BlockingIOError):
            listener.recv(10)


@in_closed
def test_an_abstract_socket_of_another_is_not_reached(walls: Isolation) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0darts-{os.getpid()}")
        server.listen()
        assert (
            run(walls, f"import socket; socket.socket(socket.AF_UNIX).connect('\\0darts-{os.getpid()}')").exit_code == 1
        )


@in_closed
@pytest.mark.parametrize("call", ["os.kill(PID, 9)", "ptrace(16, PID, None, None) and 1 / 0"])
def test_another_process_is_neither_killed_nor_traced(walls: Isolation, call: str) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        traced = f"import ctypes, os; ptrace = ctypes.CDLL(None).ptrace\n{call.replace('PID', str(other.pid))}"
        assert run(walls, traced).exit_code == 1
        assert psutil.Process(other.pid).status() != psutil.STATUS_TRACING_STOP
        other.send_signal(signal.SIGTERM)
        assert other.wait(10) == -signal.SIGTERM


# --- a sandbox that does not work ----------------------------------------------------------------------------


def fake_bubblewrap(directory: Path) -> Path:
    broken = directory / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: no permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    return broken


def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_no_outcome(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="no permissions to create a new namespace"):
        run(Isolation("bubblewrap", sys.executable, str(fake_bubblewrap(tmp_path))), "pass")
    with pytest.raises(SandboxError, match="cannot be started"):
        run(Isolation("bubblewrap", sys.executable, str(tmp_path / "gone")), "pass")


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    choose_isolation.cache_clear()
    with pytest.raises(ConfigError, match=r"bubblewrap is not installed\. Install the package"):
        choose_isolation("bubblewrap", sys.executable, allow_weaker=True)
    fake_bubblewrap(tmp_path)
    choose_isolation.cache_clear()
    with pytest.raises(ConfigError, match=r"with bubblewrap .*: bwrap: no permissions to create a new namespace"):
        choose_isolation("bubblewrap", sys.executable, allow_weaker=False)
    choose_isolation.cache_clear()


def test_a_python_that_does_not_work_is_an_error() -> None:
    with pytest.raises(ConfigError, match="`python` of `code` is '/nowhere/python', which does not work"):
        choose_isolation("auto", "/nowhere/python", allow_weaker=True)


def test_walls_with_gaps_are_found_to_have_them() -> None:
    found = look_at(BARE)
    assert found.complaint == ""
    assert "reach the network" in found.gaps
    assert "start processes without a bound" not in found.gaps
    assert "a program can" in found.describe()


@pytest.mark.skipif(os.geteuid() != 0, reason="for every other user the kernel has a bound")
def test_root_is_found_to_have_no_bound() -> None:
    assert "start processes without a bound" in look_at(Isolation("processes", BARE.python)).gaps


def test_an_own_user_has_no_name_and_no_process() -> None:
    user_id = own_user_id()
    assert (user_id > 0) == (os.geteuid() == 0)
    assert user_id == 0 or user_id not in {process.uids().real for process in psutil.process_iter()}


@pytest.mark.parametrize("walls", [each for each in EVERY if each.kind == "processes"], ids=Isolation.describe)
def test_many_files_together_are_too_large(walls: Isolation) -> None:
    """Each is as large as one file may be, and there are at most 40."""
    source = (
        "import time\n"
        "for n in range(40):\n"
        "    open(f'f{n}', 'wb').write(bytes(1 << 20))\n"
        "    time.sleep(0.02)\n"
        "print('all written')\n"
    )
    outcome = run(walls, source, replace(LIMITS, files_bytes=8 << 20))
    assert outcome.breach == "files"
    assert b"all written" not in outcome.stdout
    assert run(walls, source, replace(LIMITS, files_bytes=64 << 20)).stdout == b"all written\n"
