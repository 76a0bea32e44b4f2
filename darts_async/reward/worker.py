"""A reward worker is a process that scores one response at a time, so that a function may hang, leak or crash.

Its warden forks it and calls `work`. Items arrive on standard input and replies leave on standard output
(`worker_messages`). Both move to private descriptors before any foreign code runs. So the output of a function goes to
standard error, its input is empty, and its child processes inherit neither pipe. The worker ends at the end of its
input, and the kernel ends it with its warden.
"""

import errno
import faulthandler
import json
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer

from darts_async.errors import ExtensionError, ModelError
from darts_async.extensions import REWARD, Extension, load
from darts_async.models.location import load_tokenizer
from darts_async.reward.limits import Limits
from darts_async.reward.values import NotFiniteError, WrongTypeError, checked_reward
from darts_async.reward.worker_messages import (
    Failed,
    LoadFailed,
    Ready,
    Rewarded,
    WorkItem,
)
from darts_async.wire.channel import read_message, write_message
from darts_async.wire.encoding import decoder

MAX_TRACEBACK_LINES = 8
MAX_LINE_CHARS = 300
"""Longer lines lose their end, because a message begins with the name of its exception."""


class Scorer:
    """Decodes a response and calls the reward function."""

    def __init__(self, function: Extension, tokenizer: Tokenizer) -> None:
        self._function = function
        self._tokenizer = tokenizer

    def score(self, item: WorkItem) -> Rewarded | Failed:
        """The reward, or why there is none."""
        token_ids = np.frombuffer(item.token_ids, np.int32).tolist()
        try:
            reward = checked_reward(
                self._function(
                    prompt=item.prompt,
                    response=self._tokenizer.decode(token_ids, skip_special_tokens=True),
                    answer=item.answer,
                    metadata=json.loads(item.metadata_json),
                    finish_reason=item.finish_reason,
                )
            )
        except WrongTypeError as error:
            return Failed("wrong_type", str(error))
        except NotFiniteError as error:
            return Failed("not_finite", str(error))
        except BaseException as error:  # noqa: BLE001 - whatever a user's code raises is reported, never a zero
            return Failed("raised", last_lines(error)) if not _is_of_file_limit(error) else _too_large(error)
        return Rewarded(reward)


def last_lines(error: BaseException) -> str:
    """The end of a traceback, as text that can be encoded."""
    lines = "".join(traceback.format_exception(error)).splitlines()[-MAX_TRACEBACK_LINES:]
    return "\n".join(line[:MAX_LINE_CHARS] for line in lines).encode("utf-8", "replace").decode()


def _too_large(error: BaseException) -> Failed:
    limit = Limits(file_bytes=resource.getrlimit(resource.RLIMIT_FSIZE)[0]).describe("file_bytes")
    return Failed("limit", f"the reward function {limit}:\n{last_lines(error)}")


def _is_of_file_limit(error: BaseException) -> bool:
    """Whether this process, or one that the function has waited for, was kept from writing a large file."""
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY and any(
        getattr(cause, "errno", None) == errno.EFBIG or getattr(cause, "returncode", None) == -signal.SIGXFSZ
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def serve(
    items: BinaryIO, replies: BinaryIO, function_name: str, tokenizer_dir: Path, on_item: Callable[[], None]
) -> None:
    """Score items until the input ends. `on_item` is called before each item."""
    try:
        scorer = Scorer(load(REWARD, function_name), load_tokenizer(tokenizer_dir))
    except (ExtensionError, ModelError) as error:
        cause = f"\n{last_lines(error.__cause__)}" if error.__cause__ is not None else ""
        write_message(replies, LoadFailed(f"{error}{cause}"))
        return
    write_message(replies, Ready())
    decode = decoder(WorkItem)
    while (item := read_message(items, decode)) is not None:
        on_item()
        write_message(replies, scorer.score(item))


def work(function_name: str, tokenizer_dir: Path, on_item: Callable[[], None]) -> None:
    """The complete life of a worker."""
    faulthandler.enable()
    items, replies = _claim_pipes()
    serve(items, replies, function_name, tokenizer_dir, on_item)


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    items, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return items, replies
