"""Whether programs in responses can be held, as `validate` says it."""

import pytest

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.reward.sandbox.isolation import Isolation
from launcher.preflight import reward_check
from launcher.preflight.reward_check import check_rewards

CONFIG = RunConfig.model_validate({"reward": {"functions": [{"function": "math"}, {"code": {}}]}})


def test_a_closed_sandbox_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_check, "find_isolation", lambda wanted: Isolation("bubblewrap", "/usr/bin/bwrap"))
    assert [*check_rewards(CONFIG)] == []


def test_a_weak_sandbox_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_check, "find_isolation", lambda wanted: Isolation("processes"))
    [hint] = check_rewards(CONFIG)
    assert (hint.place, hint.is_hint) == ("reward.functions.1.code.isolation", True)
    assert "they may read your files or reach the network" in hint.message


def test_a_sandbox_that_is_not_there_is_a_problem_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(wanted: str) -> Isolation:
        raise ConfigError("`isolation` is 'bubblewrap', but it is not installed")

    monkeypatch.setattr(reward_check, "find_isolation", refuse)
    [problem] = check_rewards(CONFIG)
    assert (problem.here, problem.is_hint) == (True, False)


def test_without_programs_nothing_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_check, "find_isolation", None)
    assert [*check_rewards(RunConfig())] == []
