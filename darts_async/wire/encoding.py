"""Structs, dataclasses, counters and arrays to bytes and back: MessagePack, with an array as its raw little-endian
elements, of the type in the annotation. Decoded arrays are read-only views."""

from collections import Counter
from typing import Any, get_args, get_origin

import msgspec
import numpy as np


def encode(value: Any) -> bytes:
    """The bytes of a struct, which may change afterwards."""
    return _encoder.encode(value)


def decoder(kind: Any) -> "msgspec.msgpack.Decoder[Any]":
    """Decodes values of this type. Raises `msgspec.DecodeError`."""
    return msgspec.msgpack.Decoder(kind, dec_hook=_attach)


def _detach(value: object) -> bytes:
    assert isinstance(value, np.ndarray), type(value)
    return value.tobytes()


def _attach(annotation: Any, data: Any) -> "np.ndarray[Any, Any] | Counter[Any]":
    if get_origin(annotation) is Counter:
        return Counter(data)
    _shape, element = get_args(annotation)
    return np.frombuffer(data, np.dtype(get_args(element)[0]))


_encoder = msgspec.msgpack.Encoder(enc_hook=_detach)
