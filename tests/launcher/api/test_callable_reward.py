"""A reward function in the calling process, asked by workers over a local socket."""

import os
import stat
import threading
from collections.abc import Callable
from typing import Any

import pytest

from launcher.api import callable_reward
from launcher.api.callable_reward import SOCKET_VARIABLE, connection_of, score, served

SAMPLE: dict[str, Any] = {
    "prompt": "2 + 2 =", "response": "4", "answer": "4", "metadata": {"level": 3}, "finish_reason": "stop"
}  # fmt: skip


def ask(function: Callable[..., float], monkeypatch: pytest.MonkeyPatch, **sample: Any) -> float:
    connection_of.cache_clear()
    with served(function) as path:
        assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
        monkeypatch.setenv(SOCKET_VARIABLE, str(path))
        try:
            return score(**SAMPLE | sample)
        finally:
            connection_of(os.getpid()).close()
            connection_of.cache_clear()


def test_a_closure_sees_every_keyword_of_a_sample_and_its_number_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[dict[str, Any]]()

    def closure(**sample: Any) -> float:
        seen.append(sample)
        return 0.25

    assert ask(closure, monkeypatch) == 0.25
    assert seen == [SAMPLE]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "many", None])
def test_what_is_not_a_finite_number_is_a_failure_and_not_a_reward(
    reward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=r"ValueError|TypeError"):
        ask(lambda **_: reward, monkeypatch)


def test_an_exception_comes_back_as_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(**_: Any) -> float:
        raise ZeroDivisionError("by the level")

    with pytest.raises(
        RuntimeError, match=r"ZeroDivisionError: by the level \(test_callable_reward\.py, line \d+, in raises\)"
    ):
        ask(raises, monkeypatch)


def test_workers_are_answered_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=10)

    def waits(**_: Any) -> float:
        both.wait()
        return 1.0

    connection_of.cache_clear()
    with served(waits) as path:
        monkeypatch.setenv(SOCKET_VARIABLE, str(path))
        connections = [connection_of.__wrapped__(number) for number in range(2)]
        for connection in connections:
            callable_reward.write_message(connection, callable_reward.Sample(**SAMPLE))
        rewards = [callable_reward.read_message(each, callable_reward._SCORED) for each in connections]
        assert [each.reward for each in rewards if each is not None] == [1.0, 1.0]
        for connection in connections:
            connection.close()


def test_without_a_caller_the_worker_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    connection_of.cache_clear()
    monkeypatch.delenv(SOCKET_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="was not started by"):
        score(**SAMPLE)
    monkeypatch.setenv(SOCKET_VARIABLE, "/nowhere/reward.sock")
    with pytest.raises(RuntimeError, match="cannot be reached"):
        score(**SAMPLE)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), LookupError("\ud83d")])
def test_a_worker_goes_on_after_any_exception(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([error, None])

    def raises_once(**_: Any) -> float:
        if (raised := next(calls)) is not None:
            raise raised
        return 1.0

    connection_of.cache_clear()
    with served(raises_once) as path:
        monkeypatch.setenv(SOCKET_VARIABLE, str(path))
        with pytest.raises(RuntimeError, match=type(error).__name__):
            score(**SAMPLE)
        assert score(**SAMPLE) == 1.0
        connection_of(os.getpid()).close()
        connection_of.cache_clear()


def test_a_worker_connects_again_when_its_connection_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    connection_of.cache_clear()
    with served(lambda **_: 1.0) as path:
        monkeypatch.setenv(SOCKET_VARIABLE, str(path))
        assert score(**SAMPLE) == 1.0
        connection_of(os.getpid()).close()
        with pytest.raises(RuntimeError, match="cannot be reached"):
            score(**SAMPLE)
        assert score(**SAMPLE) == 1.0
        connection_of(os.getpid()).close()
        connection_of.cache_clear()
