"""Limits of reward workers, and what is found below a process."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from darts_async.config import RewardConfig
from darts_async.reward import descendants
from darts_async.reward.descendants import kill_marked, memory_bytes
from darts_async.reward.limits import Limits, breach_of, exit_code_of, passed_on, shown_exit_code
from darts_async.reward.process import limits_of

MIB = 1 << 20
NAMES = ("memory_bytes", "processes", "file_bytes", "output_bytes")


def test_limits_travel_as_an_argument() -> None:
    limits = Limits(1, 2, 3, 4)
    assert Limits.of_argument(limits.as_argument()) == limits


def test_every_limit_has_an_exit_code_of_its_own_that_nothing_else_has() -> None:
    codes = [exit_code_of(name) for name in NAMES]
    assert [breach_of(code) for code in codes] == list(NAMES)
    assert all(breach_of(code) is None for code in range(256) if code not in codes)


def test_no_exit_code_of_a_worker_is_that_of_a_limit() -> None:
    assert all(breach_of(passed_on(code)) is None for code in range(256))
    changed = [code for code in range(256) if shown_exit_code(passed_on(code)) != str(code)]
    assert changed == [231, 232, 233, 234, 235]
    assert {shown_exit_code(passed_on(code)) for code in changed} == {"231 to 235"}


def test_a_limit_is_what_may_be_used_and_zero_is_none() -> None:
    limits = Limits(memory_bytes=10, processes=3)
    assert limits.breached_by(memory_bytes=10, processes=3, output_bytes=1 << 60) is None
    assert limits.breached_by(memory_bytes=11) == "memory_bytes"
    assert limits.breached_by(processes=4) == "processes"


def test_each_limit_is_described_by_its_setting() -> None:
    limits = limits_of(RewardConfig().limits)
    described = [limits.describe(name) for name in NAMES]
    for text, setting in zip(
        described, ("memory_gib (32)", "processes (256)", "file_gib (16)", "output_mib (16)"), strict=True
    ):
        assert f"reward.limits.{setting}" in text


def test_a_limit_of_null_is_no_limit() -> None:
    none = dict.fromkeys(("memory_gib", "processes", "file_gib", "output_mib"))
    assert limits_of(RewardConfig.model_validate({"limits": none}).limits) == Limits()


HOLDER = "import sys, os; kept = b'x' * (64 << 20); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process below one below us, that holds 64 MiB."""
    command = ["sh", "-c", f'"{sys.executable}" -c "{HOLDER}"; true']
    environment = {**os.environ, "DARTS_TEST_MARK": "here"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "held\n"
        yield started
        started.kill()


@pytest.mark.slow
@pytest.mark.parametrize("lists_children", [True, False])
def test_what_is_below_a_process_is_found_however_the_kernel_tells(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, lists_children: bool
) -> None:
    monkeypatch.setattr(descendants, "_LISTS_CHILDREN", lists_children and descendants._LISTS_CHILDREN)
    (below,) = descendants.descendants(holder.pid)
    assert holder.pid in descendants.descendants(os.getpid())
    assert below in descendants.descendants(os.getpid())
    assert descendants.descendants(below) == []


@pytest.mark.slow
def test_memory_is_exact_above_what_is_enough(holder: subprocess.Popen[str]) -> None:
    pids = [holder.pid, *descendants.descendants(holder.pid)]
    exact, quick = memory_bytes(pids, 0), memory_bytes(pids, 1 << 40)
    assert 64 * MIB < exact < 96 * MIB
    assert exact < quick
    assert memory_bytes([2**22 + 1], 0) == 0, "a process that is gone uses nothing"


@pytest.mark.slow
def test_only_what_bears_the_mark_is_killed(holder: subprocess.Popen[str]) -> None:
    kill_marked("DARTS_TEST_MARK", "elsewhere")
    assert holder.poll() is None
    kill_marked("DARTS_TEST_MARK", "here")
    assert holder.wait(10) == -9
