"""What a reward pool and its workers say to each other over a pipe (see `wire.channel`).

A worker speaks first (`Ready` or `LoadFailed`), then answers every `WorkItem` with one `Rewarded` or `Failed`.
There is never more than one item under way, so an answer needs no id.
"""

from typing import Literal

from msgspec import Struct

from darts_async.protocol import FinishReason


class WorkItem(Struct, frozen=True):
    """One response to judge."""

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
