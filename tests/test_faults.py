"""Faults on purpose: where, when and to whom they happen."""

import asyncio
import re
import signal
import subprocess
import sys

import pytest

from darts_async.errors import ConfigError
from darts_async.faults import (
    IN_THREAD,
    PASSED,
    REACHED,
    VARIABLE,
    Faults,
    InjectedError,
    LinkFault,
    install,
    parse_faults,
)
from darts_async.weights.receiving.receive import OF_MESSAGES
from tests import ROOT


def test_every_point_is_passed_somewhere_and_nothing_else_is() -> None:
    paths = [path for part in ("darts_async", "launcher") for path in (ROOT / part).rglob("*.py")]
    sources = "".join(path.read_text() for path in paths if "simulation" not in path.parts)
    for called, points in (("pass_by", PASSED), ("in_thread", IN_THREAD)):
        assert sorted(re.findall(rf'(?:faults|present\(\))\.{called}\("([\w.]+)"\)', sources)) == sorted(points)
    reached = re.findall(r'(?:faults|present\(\))\.reach\("([\w.]+)"\)', sources)
    assert sorted((*reached, *OF_MESSAGES.values())) == sorted(REACHED)


def test_a_fault_is_for_one_process_or_for_each() -> None:
    text = "crash generator.before_flush:3, freeze reward.before_reply@reward/1,stall generator.step:40@generator/0"
    assert parse_faults(text, "generator/0")[0] == {
        "generator.before_flush": {3: "crash"},
        "generator.step": {40: "stall"},
    }
    assert parse_faults(text, "generator/1")[0] == {"generator.before_flush": {3: "crash"}}
    assert parse_faults(text, "reward/1")[0] == {
        "generator.before_flush": {3: "crash"},
        "reward.before_reply": {1: "freeze"},
    }
    assert parse_faults("", "reward/1") == ({}, ())


def test_faults_of_links_are_for_one_link_or_all() -> None:
    text = "drop *:0.05, delay weights:0.1:0.3@generator/0, cut rewards:5:2"
    armed, links = parse_faults(text, "generator/0")
    assert armed == {}
    assert links == (
        LinkFault("drop", "*", 0.05),
        LinkFault("delay", "weights", 0.1, 0.3),
        LinkFault("cut", "rewards", 5.0, 2.0),
    )
    assert [fault.kind for fault in links if fault.concerns("weights")] == ["drop", "delay"]
    assert len(parse_faults(text, "learner/0")[1]) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("crash", "is not `crash"),
        ("crash nowhere", "there is no point 'nowhere'"),
        ("crash generator.step:0", "is not `crash"),
        ("explode generator.step", "is not `crash"),
        ("crash generator.step 3", "is not `crash"),
        ("stall reward.before_score", "cannot have a stall; choose from generator.step"),
        ("fail generator.step", "cannot have a fail; choose from generator.bucket"),
        ("drop mail:0.1", "there is no link 'mail'"),
        ("drop rewards:1.5", "the share 1.5 is not in"),
        ("drop rewards:1.2.3", "not a number"),
        ("drop rewards:0.1:2", "drop takes one number"),
        ("cut rewards:3", "cut takes two numbers"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(VARIABLE)}.*{re.escape(why)}"):
        parse_faults(text, "generator/0")


def test_only_the_first_incarnation_is_faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "crash generator.step:1")
    install("generator/0", incarnation=2).reach("generator.step")


PASSES = """
import signal, sys
from darts_async.faults import Faults
faults = Faults({"generator.step": {3: sys.argv[1]}})
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
    assert ended.stderr == "DARTS_FAULTS: crash at generator.step:3\n"


async def test_a_stall_holds_one_coroutine_and_no_other() -> None:
    faults = Faults({"generator.step": {2: "stall"}})
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


def test_a_thread_fails_when_it_was_asked_for() -> None:
    faults = Faults({"learner.bucket": {2: "fail"}})
    faults.in_thread("learner.bucket")
    with pytest.raises(InjectedError, match=r"learner\.bucket fails on purpose"):
        faults.in_thread("learner.bucket")
    faults.in_thread("learner.bucket")
