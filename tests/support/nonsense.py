"""Well-formed messages that say anything: strategies for every message type, from its annotations."""

import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from hypothesis import strategies as st
from msgspec import Struct

from darts_async.protocol import SAMPLES_PER_GROUP_LIMIT, TokensDecoded, TrainGroup

INTS = st.integers(-2, 9) | st.sampled_from([-(1 << 63), 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63])
FLOATS = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.0, -1.0, 1e308])
SAMPLE_IDS = st.builds(lambda group, index: group * SAMPLES_PER_GROUP_LIMIT + index, INTS, st.integers(0, 7)) | INTS
COUNTS = st.lists(st.integers(1, 3), max_size=4)


def messages(union: Any) -> st.SearchStrategy[Any]:
    """Any message of a union."""
    return st.one_of([message(kind) for kind in get_args(union) or (union,)])


def message(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any message of a type that a decoder would let through."""
    if kind in (TokensDecoded, TrainGroup):
        return st.builds(_consistent, st.just(kind), COUNTS, st.data())
    hints = get_type_hints(kind)
    fields = {name: _values(name, hints[name]) for name in kind.__struct_fields__}
    return st.fixed_dictionaries(fields).map(lambda values: _made(kind, values)).filter(lambda made: made is not None)


def _made(kind: type[Any], values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except ValueError:  # not even a decoder would let it through
        return None


def _consistent(kind: type[Any], counts: list[int], data: st.DataObject) -> Any:
    """The lengths of arrays agree, as the decoder demands; what is in them is anything."""
    num_samples, total = len(counts), sum(counts)
    lengths = dict.fromkeys(("token_ids", "logprobs", "versions"), total)
    lengths |= dict.fromkeys(("sample_ids", "rewards", "weights"), num_samples)
    values: dict[str, Any] = {"num_tokens": np.array(counts, np.int32)}
    for name, hint in get_type_hints(kind).items():
        if name in lengths and name in kind.__struct_fields__:
            drawn = data.draw(st.lists(_elements(name, hint), min_size=lengths[name], max_size=lengths[name]))
            values[name] = np.array(drawn, _dtype(hint))
        elif name in kind.__struct_fields__ and name != "num_tokens":
            values[name] = data.draw(_values(name, hint))
    return kind(**values)


def _values(name: str, hint: Any) -> st.SearchStrategy[Any]:
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: SAMPLE_IDS if name == "sample_id" else INTS,
        float: FLOATS,
        str: st.text(max_size=8),
        bytes: st.binary(max_size=24),
        bool: st.booleans(),
        type(None): st.none(),
    }
    if hint in plain:
        return plain[hint]
    arguments = get_args(hint)
    compound: dict[Any, Callable[[], st.SearchStrategy[Any]]] = {
        Literal: lambda: st.sampled_from(arguments),
        np.ndarray: lambda: st.lists(_elements(name, hint), max_size=4).map(lambda row: np.array(row, _dtype(hint))),
        dict: lambda: st.dictionaries(_values("", arguments[0]), _values("", arguments[1]), max_size=3),
        list: lambda: st.lists(_values("", arguments[0]), max_size=3),
        tuple: lambda: st.lists(_values("", arguments[0]), max_size=3).map(tuple),
        Union: lambda: st.one_of([_values(name, argument) for argument in arguments]),
        types.UnionType: lambda: st.one_of([_values(name, argument) for argument in arguments]),
    }
    if (origin := get_origin(hint)) in compound:
        return compound[origin]()
    assert issubclass(hint, Struct), hint
    return message(hint)


def _dtype(hint: Any) -> np.dtype[Any]:
    return np.dtype(get_args(get_args(hint)[1])[0])


def _elements(name: str, hint: Any) -> st.SearchStrategy[Any]:
    dtype = _dtype(hint)
    if dtype.kind == "f":
        return st.floats(width=32) | st.sampled_from([0.0, -1.0])
    limits = np.iinfo(dtype)
    drawn = SAMPLE_IDS if name == "sample_ids" else INTS
    return drawn.map(lambda number: min(max(number, int(limits.min)), int(limits.max)))
