"""A judge: what it is asked, when it is asked again, and what its answer is worth."""

import asyncio
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from darts_async.config.reward_judge import JudgeConfig
from darts_async.errors import ConfigError, DataError, JudgeError
from darts_async.reward import judge
from darts_async.reward.judge import JudgeReward, Pace, Reply, answer_in, key_of, request_body, score_in, send_http
from darts_async.reward.process import judge_of
from darts_async.reward.worker_messages import JudgeSpec
from tests.support.judge_server import judge_server, saying

ITEM = {"prompt": "2 + 2?", "response": "4", "answer": "4", "metadata": {"rubric": "be kind"}, "finish_reason": "stop"}


def spec(**settings: Any) -> JudgeSpec:
    config = JudgeConfig.model_validate({"url": "http://127.0.0.1:1/v1", "model": "m"} | settings)
    return judge_of(config, concurrency=4, num_workers=1)


class Script:
    """A server that answers with these, one after the other; an exception is raised."""

    def __init__(self, *replies: Reply | Exception) -> None:
        self._replies = list(replies)
        self.requests: list[Any] = []

    def __call__(self, url: str, body: bytes | None, key: str, timeout_s: float) -> Reply:
        self.requests.append((url, json.loads(body or b"null"), key))
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "FIRST_BACKOFF_S", 0.0)


def reward_of(script: Callable[..., Reply], item: dict[str, Any] = ITEM, **settings: Any) -> float:
    return asyncio.run(JudgeReward(spec(**settings), script)(**item))


# --- the question ------------------------------------------------------------------------------------------------


def test_the_request_is_a_chat_completion_with_the_fields_filled_in() -> None:
    script = Script(saying("Score: 7"))
    template = "{metadata.rubric}: {prompt} -> {response} ({answer}) {other}"
    assert reward_of(script, template=template, system="You judge.", temperature=0.5, max_verdict_tokens=9) == 0.7
    [(url, request, key)] = script.requests
    assert (url, key) == ("http://127.0.0.1:1/v1/chat/completions", "")
    assert request == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "You judge."},
            {"role": "user", "content": "be kind: 2 + 2? -> 4 (4) {other}"},
        ],
        "temperature": 0.5,
        "max_tokens": 9,
    }


def test_what_a_response_says_is_not_filled_in_again() -> None:
    fields = {"prompt": "p", "response": "{answer}", "answer": "secret"}
    assert b"secret" not in request_body(spec(template="{response}"), fields, {})


def test_a_field_that_is_no_text_is_given_as_json() -> None:
    fields = {"prompt": "", "response": "", "answer": ""}
    body = request_body(spec(template="{response}{metadata.n}"), fields, {"n": [1, "é"]})
    assert json.loads(body)["messages"][0]["content"] == '[1, "é"]'


def test_a_field_that_the_record_lacks_is_named() -> None:
    with pytest.raises(DataError, match=r"has \{metadata.rubrik\}, and the fields of the record are 'rubric'"):
        reward_of(Script(), template="{response} {metadata.rubrik}")


def test_the_key_comes_from_the_environment() -> None:
    script, settings = Script(saying("Score: 1")), spec(api_key_env="JUDGE_KEY")
    asyncio.run(JudgeReward(settings, script, {"JUDGE_KEY": "k"})(**ITEM))
    assert script.requests[0][2] == "k"
    with pytest.raises(ConfigError, match="'JUDGE_KEY', and the environment has no such variable"):
        JudgeReward(settings, script, {})


def test_a_key_has_no_white_space_at_its_ends_and_one_that_no_header_can_have_is_refused_unseen() -> None:
    settings = spec(api_key_env="JUDGE_KEY")
    assert key_of(settings, {"JUDGE_KEY": " secret\r\n"}) == "secret"
    for key in ("secret\nX-Other: 1", "secret\x7f", "secr\u20act"):
        with pytest.raises(ConfigError, match=r"'JUDGE_KEY' .* has a character that a key cannot have") as error:
            key_of(settings, {"JUDGE_KEY": key})
        assert "secr" not in str(error.value)
    with pytest.raises(ConfigError, match="no such variable"):
        key_of(settings, {"JUDGE_KEY": "\n"})


# --- the answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ("Score: 7", 0.7),
        ("**Score:** 7.5", 0.75),
        ("**Score:** 7/10", 0.7),
        ("**Score**: **7**", 0.7),
        ("score 3 at first\nScore: 10", 1.0),
        ("Score: 0/10", 0.0),
        ("Score (0-10): 8", 0.8),
        ("**Score (out of 10):** 8", 0.8),
        ("Score: (8)", 0.8),
        ("Score - 8", 0.8),
        ("Score:\n.5", 0.05),
    ],
)
def test_the_last_score_counts(said: str, reward: float) -> None:
    assert reward_of(Script(saying(said))) == reward


@pytest.mark.parametrize(
    ("said", "error"),
    [("I cannot say.", "gave no score"), ("Score: 11", "the score 11, and scores are from 0 to 10"), ("", "no score")]
    + [(f"Score: {sign}3", "the score -3, and scores are from 0 to 10") for sign in "-\u2212"],
)
def test_an_answer_without_a_score_is_a_failure_and_no_zero(said: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        reward_of(Script(saying(said)))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [3]}'])
def test_a_reply_that_is_no_chat_completion_is_a_failure(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a chat completion"):
        answer_in(body)
    assert answer_in(b'{"choices": [{"message": {"content": null}}]}') == ""


def test_a_pattern_of_ones_own_finds_the_score() -> None:
    assert score_in("<grade>3</grade>", re.compile(r"<grade>(\d)</grade>"), best=4.0) == 0.75


# --- again -------------------------------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again() -> None:
    script = Script(Reply(503, b"busy"), ConnectionResetError("reset"), TimeoutError(), saying("Score: 5"))
    assert reward_of(script) == 0.5
    assert len(script.requests) == 4


def test_after_the_last_attempt_the_judge_is_unavailable() -> None:
    script = Script(*[Reply(503, b"busy")] * 9)
    with pytest.raises(JudgeError, match="has failed 3 times, at last with status 503: busy"):
        reward_of(script, max_attempts=3)
    assert len(script.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_tried_again_and_is_no_outage(status: int) -> None:
    script = Script(Reply(status, b"no such model"))
    with pytest.raises(ValueError, match=f"refuses: status {status}: no such model"):
        reward_of(script)
    assert len(script.requests) == 1


def test_a_judge_that_does_not_end_is_left_after_its_time() -> None:
    held = threading.Event()

    def hang(*_: object) -> Reply:
        held.wait(10)
        return saying("Score: 1")

    async def ask() -> None:
        try:
            with pytest.raises(JudgeError, match=r"has not answered within total_s \(0.01 s\)"):
                await JudgeReward(spec(total_s=0.01), hang)(**ITEM)
        finally:
            held.set()

    asyncio.run(ask())


def test_the_pause_that_a_server_asks_for_is_kept_by_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    real = Pace.pause
    monkeypatch.setattr(judge, "MAX_PAUSE_S", 0.0)
    monkeypatch.setattr(Pace, "pause", lambda self, until_s: (pauses.append(until_s), real(self, until_s)))
    assert reward_of(Script(Reply(429, b"", 30.0), saying("Score: 5"))) == 0.5
    assert len(pauses) == 1


def test_requests_are_spaced_and_wait_for_a_pause() -> None:
    pace = Pace(60.0)
    assert pace.wait_s(10.0) == 0.0
    pace.take(10.0)
    assert [pace.wait_s(10.0), pace.wait_s(10.0), pace.wait_s(10.75)] == [1.0, 1.0, 0.25]
    pace.pause(20.0)
    assert pace.wait_s(15.0) == 5.0
    pace.take(20.0)
    assert [pace.wait_s(20.0), pace.wait_s(40.0)] == [1.0, 0.0]
    free = Pace(None)
    free.take(10.0)
    assert free.wait_s(10.0) == 0.0


def test_a_request_whose_time_ends_before_its_turn_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    real = Pace.take
    monkeypatch.setattr(Pace, "take", lambda self, now_s: (taken.append(now_s), real(self, now_s)))
    script = Script(*[saying("Score: 5")] * 9)

    async def ask() -> list[float | BaseException]:
        asked = JudgeReward(spec(requests_per_minute=1.0, total_s=0.05), script)
        items = (ITEM | {"response": str(number)} for number in range(5))
        return await asyncio.gather(*(asked(**item) for item in items), return_exceptions=True)

    replies = asyncio.run(ask())
    assert len(script.requests) == len(taken) == 1
    assert sum(isinstance(reply, JudgeError) for reply in replies) >= 4


def test_workers_share_the_rate() -> None:
    config = JudgeConfig(url="http://h/v1", model="m", requests_per_minute=60.0)
    assert judge_of(config, concurrency=8, num_workers=4).requests_per_minute == 15.0


def test_the_same_question_is_asked_once_while_its_answer_is_remembered() -> None:
    script = Script(*(saying(f"Score: {n}") for n in range(5)))
    asked = JudgeReward(spec(cache_size=1), script)

    async def ask(*responses: str) -> list[float]:
        return [await asked(**ITEM | {"response": each}) for each in responses]

    assert asyncio.run(ask("a", "a", "b", "a")) == [0.0, 0.0, 0.1, 0.2]


def test_a_failure_is_not_remembered() -> None:
    asked = JudgeReward(spec(), Script(saying("?"), saying("Score: 1")))

    async def ask() -> float:
        with pytest.raises(ValueError, match="no score"):
            await asked(**ITEM)
        return await asked(**ITEM)

    assert asyncio.run(ask()) == 0.1


# --- over a connection -------------------------------------------------------------------------------------------


def test_a_server_is_asked_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # it is not for this machine
    with judge_server(iter([(503, "busy"), (429, "slow"), (200, "Score: 9")]), (("Retry-After", "0"),)) as url:
        config = JudgeConfig(url=url, model="m")
        assert asyncio.run(JudgeReward(judge_of(config, 1, 1))(**ITEM)) == 0.9


@pytest.mark.parametrize(("header", "pause_s"), [("7", 7.0), ("0.5", 0.5), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_a_reply_of_a_server_has_its_status_its_text_and_its_pause(header: str, pause_s: float | None) -> None:
    with judge_server(iter([(429, "slow down")]), (("Retry-After", header),)) as url:
        assert send_http(f"{url}/chat/completions", b"{}", "k", 5.0) == Reply(429, b"slow down", pause_s)


def test_a_redirect_is_a_refusal_and_the_other_host_gets_nothing() -> None:
    with judge_server(iter([])) as other, judge_server(iter([(302, "")] * 2), (("Location", other),)) as url:
        assert send_http(f"{url}/chat/completions", b"{}", "secret", 5.0).status == 302
        with pytest.raises(ValueError, match="refuses: status 302"):
            asyncio.run(JudgeReward(judge_of(JudgeConfig(url=url, model="m"), 1, 1))(**ITEM))


def test_a_server_that_is_not_there_is_an_error_of_the_system() -> None:
    with judge_server(iter([])) as url:
        pass
    with pytest.raises(OSError, match="refused"):
        send_http(url, b"{}", "", 5.0)


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"template": "{prompt}"}, r"template has no \{response\}"),
        ({"pattern": "("}, "is not a regular expression"),
        ({"pattern": "score"}, "has 0 groups; write one"),
        ({"url": "localhost:8000"}, "match pattern"),
        ({"api_key_env": "sk-123"}, "match pattern"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        spec(**settings)
