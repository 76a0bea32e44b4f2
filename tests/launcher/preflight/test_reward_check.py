"""Whether programs in responses can be confined and judges answer, as `validate` says it."""

import pytest

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from darts_async.reward.sandbox.choice import Choice
from darts_async.reward.sandbox.isolation import Isolation
from launcher.commands.dry_run import key_settings
from launcher.preflight import reward_check
from launcher.preflight.reward_check import check_rewards
from launcher.problems import Problem
from tests.support.judge_server import judge_server

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


# --- judges ------------------------------------------------------------------------------------------------------


def problems_of_judge(url: str, **settings: str) -> list[Problem]:
    reward = {"deadline_s": 200.0, "functions": [{"judge": {"url": url, "model": "small", **settings}}]}
    return [*check_rewards(RunConfig.model_validate({"reward": reward}))]


def test_a_judge_that_names_the_model_is_no_problem() -> None:
    with judge_server(iter([]), models=(200, b'{"data": [{"id": "small"}]}')) as url:
        assert problems_of_judge(url) == []


@pytest.mark.parametrize(
    ("models", "place", "message"),
    [
        ((200, b'{"data": [{"id": "large"}]}'), "model", "does not name this model; it names large"),
        ((200, b"<html>"), "model", "it names none"),
        ((404, b""), "url", "answers with status 404; the address ends in /v1"),
    ],
)
def test_a_judge_that_answers_otherwise_is_a_hint(models: tuple[int, bytes], place: str, message: str) -> None:
    with judge_server(iter([]), models=models) as url:
        [hint] = problems_of_judge(url)
    assert (hint.place, hint.is_hint) == (f"reward.functions.0.judge.{place}", True)
    assert message in hint.message


def test_a_judge_that_is_not_there_is_a_hint() -> None:
    with judge_server(iter([])) as url:
        pass
    [hint] = problems_of_judge(url)
    assert hint.is_hint
    assert "does not answer" in hint.message
    assert "responses have no reward until it does" in hint.message


def test_a_judge_that_refuses_the_key_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with judge_server(iter([]), models=(401, b"")) as url:
        [problem] = problems_of_judge(url)
        assert (problem.place, problem.is_hint, problem.here) == ("reward.functions.0.judge.api_key_env", False, True)
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        [problem] = problems_of_judge(url, api_key_env="JUDGE_KEY")
    assert "'JUDGE_KEY', and the environment has no such variable" in problem.message
