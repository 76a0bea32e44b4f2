"""A reward that a language model gives, at an OpenAI-compatible address.

    response -> question -> request, perhaps several times -> answer -> score -> reward

Requests are spaced evenly (`Pace`), so that a worker keeps to its share of `requests_per_minute`. What may pass by
itself is tried again; a server that asks for a pause gets one from all requests of this worker. A judge that cannot be
reached raises `JudgeError`, which does not end a run by itself. One that refuses, and an answer without a score, is a
failure like that of any reward function.
"""

import asyncio
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from darts_async.errors import ConfigError, DataError, JudgeError
from darts_async.reward.worker_messages import JudgeSpec
from darts_async.wire.backoff import backoff_s

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
MAX_PAUSE_S = 60.0
"""Longest pause that a server can ask for."""
_PASSING = frozenset({408, 409, 425, 429})
"""Statuses after which a request is made again, beside 5xx."""
_MAX_REPLY_BYTES = 1 << 22
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FIELD = re.compile(r"\{(prompt|response|answer|metadata\.(\w+))\}")


class Reply(NamedTuple):
    """What a server answers."""

    status: int
    body: bytes
    pause_s: float | None = None
    """How long it asks to wait, if it does."""


Send = Callable[[str, bytes | None, str, float], Reply]
"""(url, body or None for GET, key, time-out in seconds) -> reply. Raises `OSError` or `HTTPException` without one."""


class Pace:
    """When the next request may be made. It has no clock: times are arguments, in seconds.

    Example:
        >>> pace = Pace(requests_per_minute=30)
        >>> pace.take(100.0)
        >>> [pace.wait_s(now_s) for now_s in (100.0, 101.5, 103.5)]
        [2.0, 0.5, 0.0]
    """

    def __init__(self, requests_per_minute: float | None) -> None:
        self._every_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """How long until a request may be made."""
        return max(0.0, self._next_s - now_s)

    def take(self, now_s: float) -> None:
        """A request is made now."""
        self._next_s = max(now_s, self._next_s) + self._every_s

    def pause(self, until_s: float) -> None:
        """No request before this time."""
        self._next_s = max(self._next_s, until_s)


class JudgeReward:
    """A reward function with the settings of `reward.functions[].judge`. A coroutine function."""

    def __init__(self, spec: JudgeSpec, send: Send | None = None, environment: Mapping[str, str] = os.environ) -> None:
        """Raises `ConfigError` if the key is not in the environment."""
        self._spec = spec
        self._key = key_of(spec, environment)
        self._send = send or send_http
        self._pace = Pace(spec.requests_per_minute)
        self._turn = asyncio.Lock()
        self._pattern = re.compile(spec.pattern)
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._threads = ThreadPoolExecutor(spec.concurrency, thread_name_prefix="judge")

    async def __call__(
        self, *, prompt: str, response: str, answer: str, metadata: dict[str, Any], finish_reason: str
    ) -> float:
        """The score, divided by the best one. Raises `JudgeError`, `DataError` and `ValueError`."""
        body = request_body(self._spec, {"prompt": prompt, "response": response, "answer": answer}, metadata)
        place = hashlib.sha256(body).digest()
        if place in self._scores:
            self._scores.move_to_end(place)
            return self._scores[place]
        try:
            async with asyncio.timeout(self._spec.total_s):
                said = answer_in(await self._ask(body))
        except TimeoutError as error:
            raise JudgeError(
                f"the judge at {self._spec.url} has not answered within total_s ({self._spec.total_s:g} s)"
            ) from error
        score = score_in(said, self._pattern, self._spec.best)
        self._scores[place] = score
        if len(self._scores) > self._spec.cache_size:
            self._scores.popitem(last=False)
        return score

    async def _ask(self, body: bytes) -> bytes:
        url, failures = f"{self._spec.url.rstrip('/')}/chat/completions", list[str]()
        while True:
            await self._wait_for_turn()
            pause_s: float | None = None
            try:
                reply = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._send, url, body, self._key, self._spec.request_s
                )
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{type(error).__name__}: {error}")
            else:
                if reply.status == 200:
                    return reply.body
                failures.append(f"status {reply.status}: {_shown(reply.body)}")
                if not may_pass(reply.status):
                    raise ValueError(f"the judge at {url} refuses: {failures[-1]}")
                pause_s = reply.pause_s
            if len(failures) >= self._spec.max_attempts:
                raise JudgeError(f"the judge at {url} has failed {len(failures)} times, at last with {failures[-1]}")
            if pause_s is not None:
                self._pace.pause(time.monotonic() + min(pause_s, MAX_PAUSE_S))
            else:
                await asyncio.sleep(backoff_s(len(failures), FIRST_BACKOFF_S, MAX_BACKOFF_S))

    async def _wait_for_turn(self) -> None:
        """The first in the line waits for the time of a request. One that leaves the line has used no time."""
        async with self._turn:
            while True:
                now_s = time.monotonic()
                wait_s = self._pace.wait_s(now_s)
                if wait_s <= 0.0:
                    self._pace.take(now_s)
                    return
                await asyncio.sleep(wait_s)  # a server may ask for a pause meanwhile


def key_of(spec: JudgeSpec, environment: Mapping[str, str]) -> str:
    """The key of the judge, without white space at its ends; empty for none.

    Raises:
        ConfigError: the variable that is named is not set, or no header can have its value. The value is not shown.
    """
    if not spec.api_key_env:
        return ""
    key = environment.get(spec.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"`api_key_env` of `judge` is {spec.api_key_env!r}, and the environment has no such variable; set it"
        )
    if not key.isprintable() or max(key) > "\xff":
        raise ConfigError(
            f"the environment variable {spec.api_key_env!r} (`api_key_env` of `judge`) has a character that a key "
            "cannot have, such as a line break; set it again"
        )
    return key


def request_body(spec: JudgeSpec, fields: Mapping[str, str], metadata: Mapping[str, Any]) -> bytes:
    """The request for one response. Raises `DataError` if the record has no field that the template names."""

    def value(found: re.Match[str]) -> str:
        name = found[2]
        if name is None:
            return fields[found[1]]
        if name not in metadata:
            known = ", ".join(map(repr, metadata)) or "none"
            raise DataError(f"the template of the judge has {{{found[1]}}}, and the fields of the record are {known}")
        return metadata[name] if isinstance(metadata[name], str) else json.dumps(metadata[name], ensure_ascii=False)

    messages = [{"role": "system", "content": spec.system}] if spec.system else []
    messages.append({"role": "user", "content": _FIELD.sub(value, spec.template)})
    request = {"model": spec.model, "messages": messages, "temperature": spec.temperature}
    return json.dumps(request | {"max_tokens": spec.max_verdict_tokens}).encode()


def answer_in(body: bytes) -> str:
    """The text of a chat completion. Raises `ValueError` if it is none."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the judge answered with what is not a chat completion: {_shown(body)}") from error
    return content if isinstance(content, str) else ""


def score_in(said: str, pattern: re.Pattern[str], best: float) -> float:
    """The last score of an answer, divided by the best one. Raises `ValueError` if there is none.

    Example:
        >>> score_in("Score: 2? No. Score: 7", re.compile(r"Score: (\\d+)"), best=10.0)
        0.7
    """
    found = pattern.findall(said)
    if not found:
        raise ValueError(f"the judge gave no score (`pattern` is {pattern.pattern!r}); its answer ends {said[-200:]!r}")
    score = float(found[-1].replace("\u2212", "-"))
    if not 0 <= score <= best:
        raise ValueError(f"the judge gave the score {score:g}, and scores are from 0 to {best:g} (`best`)")
    return score / best


def may_pass(status: int) -> bool:
    """Whether the same request may be answered later."""
    return status in _PASSING or 500 <= status < 600


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is a reply like any other: another host would get the key."""

    def redirect_request(self, *_: Any) -> None:
        """Nothing to request."""


def send_http(url: str, body: bytes | None, key: str, timeout_s: float) -> Reply:
    """Make one request and wait for the reply, which may be a redirect. A proxy of the environment is not used for
    addresses of this machine."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=body, headers=headers)
    is_here = urllib.parse.urlsplit(url).hostname in _LOOPBACK
    opener = urllib.request.build_opener(_NoRedirects, *[urllib.request.ProxyHandler({})] * is_here)
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return Reply(response.status, response.read(_MAX_REPLY_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.read(_MAX_REPLY_BYTES), _pause_in(error.headers.get("Retry-After")))


def _pause_in(header: str | None) -> float | None:
    """Seconds; None for a date, which is rare."""
    return float(header) if header is not None and re.fullmatch(r"\d{1,9}(\.\d+)?", header.strip()) else None


def _shown(body: bytes) -> str:
    return body[:200].decode(errors="replace").strip() or "it is empty"
