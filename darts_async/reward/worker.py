"""A reward worker: a process that judges one response at a time, so that a function may hang, leak or crash.

    darts_async.reward.worker --function NAME --tokenizer DIRECTORY

Items come on standard input and replies go to standard output (`wire`). Both are moved to private descriptors
before any foreign code runs: what a function prints goes to standard error, what it reads is empty, and what it
starts inherits neither pipe. The worker ends with its input, and the kernel ends it with its parent.
"""

import argparse
import faulthandler
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer

from darts_async.errors import ModelError, RewardError
from darts_async.models import load_tokenizer
from darts_async.reward.functions import NotFiniteError, RewardFunction, checked_reward, load_function
from darts_async.reward.wire import Failed, LoadFailed, Ready, Rewarded, WorkItem, decode_item, encode_frame, read_frame

MAX_TRACEBACK_LINES = 8
MAX_ERROR_CHARS = 4000


class Judge:
    """Decodes a response and asks the reward function about it."""

    def __init__(self, function: RewardFunction, tokenizer: Tokenizer) -> None:
        self._function = function
        self._tokenizer = tokenizer

    def judge(self, item: WorkItem) -> Rewarded | Failed:
        """The reward, or why there is none."""
        token_ids = np.frombuffer(item.token_ids, np.int32).tolist()
        try:
            value = self._function(
                prompt=item.prompt,
                response=self._tokenizer.decode(token_ids, skip_special_tokens=True),
                answer=item.answer,
                metadata=item.metadata,
                finish_reason=item.finish_reason,
            )
        except Exception as error:  # noqa: BLE001 - the boundary to a user's code: it is reported, never a zero
            return Failed("raised", last_lines(error))
        try:
            return Rewarded(checked_reward(value))
        except NotFiniteError as error:
            return Failed("not_finite", str(error))


def last_lines(error: Exception) -> str:
    """The end of a traceback, as text that can be encoded."""
    lines = "".join(traceback.format_exception(error)).splitlines()[-MAX_TRACEBACK_LINES:]
    return "\n".join(lines)[-MAX_ERROR_CHARS:].encode("utf-8", "replace").decode()


def serve(items: BinaryIO, replies: BinaryIO, function_name: str, tokenizer_dir: Path) -> None:
    """Judge items until there are no more."""
    try:
        judge = Judge(load_function(function_name), load_tokenizer(tokenizer_dir))
    except (RewardError, ModelError) as error:
        cause = f"\n{last_lines(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
        _send(replies, LoadFailed(f"{error}{cause}"))
        return
    _send(replies, Ready())
    while (body := read_frame(items)) is not None:
        _send(replies, judge.judge(decode_item(body)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="darts_async.reward.worker")
    parser.add_argument("--function", required=True)
    parser.add_argument("--tokenizer", required=True, type=Path)
    options = parser.parse_args(arguments)
    faulthandler.enable()
    items, replies = _claim_pipes()
    serve(items, replies, options.function, options.tokenizer)


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    items, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return items, replies


def _send(replies: BinaryIO, reply: Ready | LoadFailed | Rewarded | Failed) -> None:
    replies.write(encode_frame(reply))
    replies.flush()


if __name__ == "__main__":
    main()
