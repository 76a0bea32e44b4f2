"""A child that answers a question: it ends with the block, with all of its session, and nothing else is waited for."""

import os
import signal
from pathlib import Path

import msgspec
import psutil
import pytest

from darts_async.machine.trial_process import TrialError, trial_process
from tests import ROOT

CHILD = """
import json, os, subprocess, sys
question = json.load(sys.stdin)
if question["says"]:
    print(question["says"])
elif not question["tells"]:
    sys.exit("it cannot")
else:
    grandchild = subprocess.Popen(["sleep", "600"], start_new_session=question["leaves"])
    with open(question["tells"], "w") as file:
        file.write(str(grandchild.pid))
    grandchild.wait()
"""


class Question(msgspec.Struct):
    says: str = ""
    tells: str = ""
    leaves: bool = False


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    return tmp_path


@pytest.mark.slow
def test_it_answers_or_its_last_words_are_told(directory: Path) -> None:
    with trial_process("a_child", Question(says="yes")) as child:
        assert child.answer(60.0) == b"yes\n"
    with trial_process("a_child", Question()) as child, pytest.raises(TrialError, match=r"\(exit code 1\): it cannot"):
        child.answer(60.0)


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [False, True])
def test_a_process_that_holds_its_pipes_does_not_delay_the_end(directory: Path, leaves: bool) -> None:
    tells = directory / "pid"
    os.mkfifo(tells)
    with trial_process("a_child", Question(tells=str(tells), leaves=leaves)) as child:
        grandchild = psutil.Process(int(tells.read_text()))
        with pytest.raises(TimeoutError):
            child.answer(0.01)
    if leaves:
        assert grandchild.is_running()
        grandchild.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs([grandchild], timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
