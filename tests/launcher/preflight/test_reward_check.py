"""Whether programs in responses can be confined, as `validate` says it."""

import pytest

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.reward.sandbox.choice import Choice
from darts_async.reward.sandbox.isolation import Isolation
from launcher.commands.dry_run import key_settings
from launcher.preflight import reward_check
from launcher.preflight.reward_check import check_rewards

CONFIG = RunConfig.model_validate({"reward": {"functions": [{"function": "math"}, {"code": {}}]}})


def test_a_sandbox_without_gaps_is_no_problem_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    walls = Isolation("bubblewrap", "python", "/usr/bin/bwrap")
    monkeypatch.setattr(reward_check, "isolation_of", lambda _: Choice(walls))
    assert [*check_rewards(CONFIG)] == []
    assert "1 * math + 1 * code; programs run in bubblewrap (/usr/bin/bwrap)" in key_settings(CONFIG)["reward"]


def test_gaps_that_are_allowed_are_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    walls = Choice(Isolation("processes", "python"), ("reach the network",))
    monkeypatch.setattr(reward_check, "isolation_of", lambda _: walls)
    [hint] = check_rewards(CONFIG)
    assert (hint.place, hint.is_hint) == ("reward.functions.1.code.isolation", True)
    assert "a program can reach the network" in hint.message


def test_a_machine_that_cannot_confine_programs_is_a_problem_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec: object) -> Choice:
        raise ConfigError("programs cannot be confined on this machine")

    monkeypatch.setattr(reward_check, "isolation_of", refuse)
    [problem] = check_rewards(CONFIG)
    assert (problem.here, problem.is_hint) == (True, False)
    assert "no sandbox of this machine" in key_settings(CONFIG)["reward"]


def test_without_programs_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_check, "isolation_of", None)
    assert [*check_rewards(RunConfig())] == []
