"""Stop strings: wherever one is completed the response ends, however the tokens come."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from darts_async.config import RunConfig
from darts_async.generator.engine import SampleEnd, StepEvents
from darts_async.generator.process import make_stop_strings
from darts_async.generator.stop_strings import StopStrings
from darts_async.models.location import load_tokenizer, resolve_model_path
from tests.generator.world import generate
from tests.support.byte_tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()


def brought(tokens: dict[int, list[int]], *ended: SampleEnd) -> StepEvents:
    ids = [sample_id for sample_id, each in tokens.items() for _ in each]
    flat = [token for each in tokens.values() for token in each]
    return StepEvents(np.array(ids, np.int64), np.array(flat, np.int32), np.zeros(len(flat), np.float32), ended)


def response(stopping: StopStrings, ids: list[int], sizes: list[int]) -> tuple[list[int], list[SampleEnd]]:
    """What is reported of a sample whose tokens come in steps of these sizes until the engine is told to cancel it."""
    kept: list[int] = []
    ends: list[SampleEnd] = []
    start = 0
    for size in [*sizes, len(ids)]:
        chunk, start = ids[start : start + size], start + size
        last = (SampleEnd(0, len(ids), "length"),) if start >= len(ids) else ()
        events = stopping.sift(brought({0: chunk}, *last))
        kept += events.token_ids.tolist()
        ends += events.ended
        if last:
            break
        if stopping.take_stopped() == [0]:
            assert not stopping.sift(brought({0: ids[start:][:2]}, SampleEnd(0, start + 2, None))).ended
            break
    return kept, ends


alphabet = st.sampled_from(["a", "b", "é", "日", "<", "/", "x>"])


@given(
    st.lists(alphabet, max_size=20).map("".join),
    st.lists(st.lists(alphabet, min_size=1, max_size=3).map("".join), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), max_size=30),
    st.integers(0, 10),
)
def test_a_response_ends_with_the_token_that_completes_the_first_stop_string(
    text: str, stops: list[str], sizes: list[int], num_prefix: int
) -> None:
    ids = TOKENIZER.encode(text).ids
    complete = [n for n in range(len(ids) + 1) if any(stop in TOKENIZER.decode(ids[:n]) for stop in stops)]
    expected = complete[0] if complete else len(ids)
    num_prefix = min(num_prefix, expected, max(len(ids) - 1, 0))
    stopping = StopStrings(tuple(stops), TOKENIZER)
    end = stopping.start(generate(0, prefix=ids[:num_prefix]))
    if end is not None:
        assert (end, num_prefix) == (SampleEnd(0, expected, "stop"), expected)
        return
    kept, ends = response(stopping, ids[num_prefix:], sizes)
    assert ids[:num_prefix] + kept == ids[:expected]
    reason = "stop" if complete else "length"
    assert [(each.sample_id, each.finish_reason) for each in ends] == [(0, reason)]
    if complete:
        assert ends[0].num_tokens == expected


def test_samples_are_told_apart_and_those_of_others_pass() -> None:
    stopping = StopStrings(("ab",), TOKENIZER)
    a, b = TOKENIZER.encode("ab").ids
    assert stopping.start(generate(1)) is None
    assert stopping.start(generate(2)) is None
    events = stopping.sift(brought({1: [a], 2: [b], -7: [a, b]}))
    assert events.sample_ids.tolist() == [1, 2, -7, -7]
    events = stopping.sift(brought({1: [b, a], 2: [a]}))
    assert (events.sample_ids.tolist(), events.ended) == ([1, 2], (SampleEnd(1, 2, "stop"),))
    assert (stopping.take_stopped(), stopping.take_stopped()) == ([1], [])
    assert stopping.num_tokens_dropped == 1


def test_a_sample_that_the_engine_ends_in_the_same_step_is_not_cancelled() -> None:
    stopping = StopStrings(("a",), TOKENIZER)
    stopping.start(generate(1))
    events = stopping.sift(brought({1: TOKENIZER.encode("a").ids}, SampleEnd(1, 1, "length")))
    assert events.ended == (SampleEnd(1, 1, "stop"),)
    assert stopping.take_stopped() == []


def test_the_setting_makes_them_with_the_tokenizer_of_the_model() -> None:
    tokenizer: Tokenizer = load_tokenizer(resolve_model_path("darts_async.quickstart:model"))
    assert make_stop_strings(RunConfig()) is None
    settings: dict[str, Any] = {"sampling": {"stop": ["ans"]}}
    stopping = make_stop_strings(RunConfig.model_validate(settings))
    assert stopping is not None
    stopping.start(generate(0))
    (token,) = tokenizer.encode("ans", add_special_tokens=False).ids
    assert stopping.sift(brought({0: [token, token]})).ended == (SampleEnd(0, 1, "stop"),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": {"stop": ["x", ""]}}, "would end every response before its first token"),
        (
            {"sampling": {"stop": ["x"]}, "generator": {"engine": "scripted", "script": {}}},
            "generates lengths and no text",
        ),
    ],
)
def test_stop_strings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(settings)
