"""Whether this machine can confine the programs in responses, and how; whether judges answer."""

import http.client
import json
import os
from collections.abc import Iterator

from darts_async.config import RewardConfig, RunConfig
from darts_async.config.reward_code import CodeConfig
from darts_async.config.reward_judge import JudgeConfig
from darts_async.errors import ConfigError
from darts_async.reward.code import isolation_of
from darts_async.reward.judge import key_of, may_pass, send_http
from darts_async.reward.process import judge_of
from darts_async.reward.worker_messages import CodeSpec
from launcher.problems import Problem, shown

_ANSWER_WITHIN_S = 10.0


def check_rewards(config: RunConfig) -> Iterator[Problem]:
    """Programs can be confined, and judges answer."""
    for number, part in enumerate(config.reward.functions):
        place = f"reward.functions.{number}"
        if part.code is not None:
            yield from _check_code(f"{place}.code.isolation", part.code)
        if part.judge is not None:
            yield from _check_judge(f"{place}.judge", part.judge)


def _check_code(place: str, config: CodeConfig) -> Iterator[Problem]:
    """Gaps that the settings allow are a hint."""
    try:
        found = isolation_of(CodeSpec(**config.model_dump()))
    except ConfigError as error:
        yield Problem(place, str(error), shown(config.isolation), here=True)
        return
    if found.gaps:
        fix = "install the package `bubblewrap` on the nodes of the reward processes"
        yield Problem(
            place, f"programs in responses run in {found.describe()}", shown(config.isolation), fix, is_hint=True
        )


def _check_judge(place: str, config: JudgeConfig) -> Iterator[Problem]:
    """A judge that does not answer is a hint, because it may start later; one that refuses is a problem."""
    url = f"{config.url.rstrip('/')}/models"
    try:
        key = key_of(judge_of(config, 1, 1), os.environ)
        reply = send_http(url, None, key, _ANSWER_WITHIN_S)
    except ConfigError as error:
        yield Problem(f"{place}.api_key_env", str(error), shown(config.api_key_env), here=True)
        return
    except (OSError, http.client.HTTPException) as error:
        message = f"{url} does not answer: {error}; responses have no reward until it does"
        yield Problem(f"{place}.url", message, shown(config.url), "start the judge", is_hint=True)
        return
    if reply.status in (401, 403):
        fix = "set `api_key_env` to the name of the variable that has the key"
        yield Problem(f"{place}.api_key_env", f"{url} refuses the key: status {reply.status}", fix=fix, here=True)
    elif reply.status == 200 and config.model not in (models := _models_in(reply.body)):
        message = f"{url} does not name this model; it names {', '.join(models[:5]) or 'none'}"
        yield Problem(f"{place}.model", message, shown(config.model), is_hint=True)
    elif reply.status != 200 and not may_pass(reply.status):
        message = f"{url} answers with status {reply.status}; the address ends in /v1 for most servers"
        yield Problem(f"{place}.url", message, shown(config.url), is_hint=True)


def _models_in(body: bytes) -> list[str]:
    try:
        return [str(each["id"]) for each in json.loads(body)["data"]]
    except (ValueError, LookupError, TypeError):
        return []


def isolations(reward: RewardConfig) -> Iterator[str]:
    """How this machine confines programs, for people."""
    for part in reward.functions:
        if part.code is not None:
            try:
                yield isolation_of(CodeSpec(**part.code.model_dump())).describe()
            except ConfigError:
                yield "no sandbox of this machine"
