"""Faults on purpose: where, when and to whom they happen."""

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from darts_async.errors import ConfigError
from darts_async.faults import POINTS, VARIABLE, Faults, parse_faults

ROOT = Path(__file__).parent.parent


def test_every_point_is_passed_somewhere_and_nothing_else_is() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "darts_async").glob("*/process.py"))
    assert sorted(re.findall(r'faults\.(?:reach|pass_by)\("([\w.]+)"\)', sources)) == sorted(POINTS)


def test_a_fault_is_for_one_process_or_for_each() -> None:
    text = "crash generator.before_flush:3, freeze reward.before_verdict@reward/1,stall generator.step:40@generator/0"
    assert parse_faults(text, "generator/0") == {
        "generator.before_flush": ("crash", 3),
        "generator.step": ("stall", 40),
    }
    assert parse_faults(text, "generator/1") == {"generator.before_flush": ("crash", 3)}
    assert parse_faults(text, "reward/1") == {
        "generator.before_flush": ("crash", 3),
        "reward.before_verdict": ("freeze", 1),
    }
    assert parse_faults("", "reward/1") == {}


@pytest.mark.parametrize(
    "text", ["crash", "crash nowhere", "crash generator.step:0", "explode generator.step", "crash generator.step 3"]
)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(VARIABLE)):
        parse_faults(text, "generator/0")


def test_only_the_first_incarnation_is_faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "crash generator.step:1")
    Faults.from_environment("generator/0", incarnation=2).reach("generator.step")


PASSES = """
import signal, sys
from darts_async.faults import Faults
faults = Faults({"generator.step": (sys.argv[1], 3)})
for passing in range(1, 5):
    print(passing, flush=True)
    faults.reach("generator.before_flush")
    faults.reach("generator.step")
"""


@pytest.mark.slow
def test_a_crash_comes_at_the_passing_that_was_asked_for() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PASSES, "crash"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (ended.returncode, ended.stdout.split()) == (-signal.SIGKILL, ["1", "2", "3"])


async def test_a_stall_holds_one_coroutine_and_no_other() -> None:
    faults = Faults({"generator.step": ("stall", 2)})
    passed = []

    async def passes() -> None:
        for passing in range(3):
            await faults.pass_by("generator.step")
            passed.append(passing)

    stalled = asyncio.create_task(passes())
    for _ in range(20):
        await asyncio.sleep(0)
    assert (passed, stalled.done()) == ([0], False)
    stalled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stalled
