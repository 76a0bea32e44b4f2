"""Ends that somebody or something else brings about: signals, a terminal that goes, a reader that goes."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launcher.run.interrupts import caught_signals, outliving_readers, reason_of
from launcher.run_dir.run_dir import read_record
from tests.support.launched import DEADLINE_S, ROOT, LaunchedRun

SETTINGS: dict[str, Any] = {"learner": {"steps": 100_000}, "telemetry": {"status_every_s": 0.1}}
TAKES_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


async def test_signals_are_caught_in_order_and_sighup_where_it_is_not_ignored() -> None:
    heard: list[signal.Signals] = []
    with caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGHUP)  # before it is listened to
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            caught.tell(heard.append)
            while number not in heard:  # noqa: ASYNC110
                await asyncio.sleep(0)
    assert sorted(heard) == [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        heard.clear()
        with caught_signals() as caught:
            caught.tell(heard.append)
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            while not heard:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_says_what_brought_it_about() -> None:
    assert [reason_of(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == [
        "stopped by Ctrl-C",
        "stopped by SIGTERM",
        "stopped by SIGHUP (the terminal was closed)",
    ]


def test_what_is_written_after_the_reader_has_gone_is_lost_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with outliving_readers():
            sys.stdout.write("heard")
            sys.stdout.flush()
            assert os.read(reading, 100) == b"heard"
            os.close(reading)
            for _ in range(3):
                assert sys.stdout.write("lost") == 4
                sys.stdout.flush()
        assert sys.stdout is stream
        stream.write("nor does what is left make a later flush fail")


def test_a_full_disk_at_the_other_end_is_no_error_either(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    with outliving_readers():
        sys.stdout.write("lost")
        sys.stdout.flush()
    with pytest.raises(OSError, match="No space left"):
        stream.close()


# --- whole runs ----------------------------------------------------------------------------------------------


class OnTerminal(LaunchedRun):
    """The launcher leads the session of a terminal."""

    def _launched(self, *words: str) -> "subprocess.Popen[bytes]":
        self.master, terminal = os.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self._temporary), "TERM": "xterm"}
        command = [sys.executable, "-c", TAKES_TERMINAL, sys.executable, "-m", "launcher", *words]
        (self._home / "output.txt").touch()
        ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        process = subprocess.Popen(command, cwd=self._home, env=environment, **ends)
        os.close(terminal)
        self._is_open = True
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        return process

    def _read(self) -> None:
        while self._is_open:
            os.read(self.master, 1 << 16)
        os.close(self.master)

    def hang_up(self) -> None:
        self._is_open = False
        self.reader.join(DEADLINE_S)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_ends_in_order_when_its_terminal_goes(tmp_path: Path) -> None:
    with OnTerminal(tmp_path, "scripted.yaml", SETTINGS) as run:
        run.wait_for_steps(3)
        run.hang_up()
        assert run.end() == 130
        record = read_record(run.run_dir)
        assert (record.status, record.reason) == ("stopped", "stopped by SIGHUP (the terminal was closed)")
        run.assert_clean()


class IntoPipe(LaunchedRun):
    """Somebody reads what the launcher prints, for a while."""

    def _launched(self, *words: str) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self._temporary)}
        command = [sys.executable, "-m", "launcher", *words]
        (self._home / "output.txt").touch()
        return subprocess.Popen(
            command, cwd=self._home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_goes_on_when_the_one_that_read_its_output_goes(tmp_path: Path) -> None:
    with IntoPipe(tmp_path, "scripted.yaml", {"learner": {"steps": 8}}) as run:
        assert run.process.stdout is not None
        assert run.process.stdout.readline()
        run.process.stdout.close()
        assert run.end() == 0
        run.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["-m", "the script"])
def test_ctrl_c_while_everything_is_imported_prints_nothing(tmp_path: Path, how: str) -> None:
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = ["-m", "launcher"] if how == "-m" else ["-c", "from launcher.__main__ import main; main()"]
    with subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == -signal.SIGINT  # a shell makes 130 of it


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_a_stream_that_is_closed_is_not_written_to_and_no_file_of_ours_takes_its_place(closed: str) -> None:
    tell = "import os; from pathlib import Path; told = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]"
    hear = "import sys; print('out', flush=True); print('err', file=sys.stderr, flush=True); sys.exit(repr(told))"
    script = f"import launcher.__main__ as m; m._open_what_is_closed(); {tell}; {hear}"
    command = f'"$0" -c "$1" {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ("" if ">&- " in closed or closed == ">&-" else "out\n")
    if closed == ">&-":
        assert done.stderr.startswith("err\n")
        assert "'/dev/null'" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_without_any_open_stream_goes_on_to_its_end(tmp_path: Path) -> None:
    closing = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    with LaunchedRun(tmp_path, "scripted.yaml", {"learner": {"steps": 2}}, prefix=closing) as run:
        assert run.end() == 0
        run.assert_clean()
