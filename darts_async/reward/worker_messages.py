"""What a reward pool and its workers say to each other over a pipe (see `wire.channel`).

A worker first sends `Ready` or `LoadFailed`, and then answers every `WorkItem` with one `Rewarded` or `Failed`. It has
at most one item at a time, so an answer needs no id.
"""

from typing import Literal

from msgspec import Struct

from darts_async.protocol import FinishReason


class WorkItem(Struct, frozen=True):
    """One response to score."""

    prompt: str
    answer: str
    metadata_json: str
    finish_reason: FinishReason
    token_ids: bytes  # int32, native byte order: both ends are on one machine


class Ready(Struct, frozen=True, tag=True):
    """The function and the tokenizer are loaded."""


class LoadFailed(Struct, frozen=True, tag=True):
    """The function or the tokenizer cannot be loaded; the worker ends."""

    error: str


class Rewarded(Struct, frozen=True, tag=True):
    """The function returned a finite number."""

    reward: float


class Failed(Struct, frozen=True, tag=True):
    """The function raised, or returned something else."""

    kind: Literal["raised", "wrong_type", "not_finite", "limit"]
    error: str


WorkerReply = Ready | LoadFailed | Rewarded | Failed


def failure_text(kind: str, error: str) -> str:
    """A failed reward in one line: of a traceback the last one, which is the exception, else the first one."""
    lines = error.strip().splitlines() or [""]
    return f"{kind}: {lines[-1 if kind == 'raised' else 0]}"
