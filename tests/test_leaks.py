"""What looks for leaks finds each kind, and does not blame who leaves nothing."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.support import leaks
from tests.support.leaks import belongings

DETACHED = (
    "import os, time; os.setsid(); print(os.getpid(), flush=True) if os.fork() == 0 else os._exit(0); time.sleep(60)"
)


def test_a_process_that_has_left_its_group_and_lost_its_parent_is_found() -> None:
    before = belongings()
    with subprocess.Popen([sys.executable, "-c", DETACHED], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    try:
        [left] = belongings().beyond(before)
        assert left.startswith(f"process {pid} {sys.executable} -c import os")
    finally:
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], 10.0)


def test_a_port_a_file_a_segment_and_a_temporary_file_are_found(tmp_path: Path) -> None:
    before = belongings()
    listener = socket.create_server(("127.0.0.1", 0))
    file = (tmp_path / "open").open("w")
    segment = Path(f"/dev/shm/leak_{os.getpid()}_test")
    segment.touch()
    temporary = Path(tempfile.mkdtemp())
    try:
        left = belongings().beyond(before)
    finally:
        listener.close()
        file.close()
        segment.unlink()
        temporary.rmdir()
    for words in (
        "1 x descriptor of socket",
        f"1 x descriptor of {tmp_path / 'open'}",
        f"shared memory leak_{os.getpid()}_test",
        f"temporary file {temporary}",
    ):
        assert words in left


def test_what_is_just_going_is_waited_for_and_what_stays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = belongings()
    going = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    assert belongings().beyond(before)
    assert leaks.left_since(before) == []
    going.wait(10.0)
    monkeypatch.setattr(leaks, "GONE_WITHIN_S", 0.1)
    with socket.socket():
        assert leaks.left_since(before) == ["1 x descriptor of socket"]
