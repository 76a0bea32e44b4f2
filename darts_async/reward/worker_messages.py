"""What a reward pool and its workers say to each other over a pipe: a length, then a MessagePack body.

A worker speaks first (`Ready` or `LoadFailed`), then answers every `WorkItem` with one `Rewarded` or `Failed`.
There is never more than one item under way, so an answer needs no id.
"""

from typing import BinaryIO, Literal

import msgspec
from msgspec import Struct

from darts_async.protocol import FinishReason

LENGTH_BYTES = 4


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

_encoder = msgspec.msgpack.Encoder()
_item_decoder = msgspec.msgpack.Decoder(WorkItem)
_reply_decoder: msgspec.msgpack.Decoder[WorkerReply] = msgspec.msgpack.Decoder(WorkerReply)

decode_item = _item_decoder.decode
decode_reply = _reply_decoder.decode


def encode_frame(message: WorkItem | WorkerReply) -> bytes:
    """A message with its length in front."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def read_frame(stream: BinaryIO) -> bytes | None:
    """The body of the next frame; None at the end of the stream, also when it ends inside a frame."""
    header = stream.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    length = int.from_bytes(header, "little")
    body = stream.read(length)
    return body if len(body) == length else None
