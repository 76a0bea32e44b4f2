"""The bookkeeping of the vLLM engine, under any order of events."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from darts_async.generator.vllm.requests import stream_seed
from darts_async.generator.vllm.sample_tracker import SampleTracker
from tests.generator.world import Record, generate

EVENTS = st.lists(st.tuples(st.sampled_from(("start", "cancel", "send", "abort", "decode", "stop")), st.integers(0, 4)))


@given(EVENTS)
def test_every_sample_ends_once_with_the_tokens_it_was_reported_to_have(events: list[tuple[str, int]]) -> None:
    book, record = SampleTracker(100, 48), Record()
    started: set[int] = set()
    for place, (kind, sample_id) in enumerate(events):
        match kind:
            case "start" if sample_id not in started:
                started.add(sample_id)
                book.start(generate(sample_id, prefix=[1] * sample_id, max_new_tokens=50))
            case "cancel":
                book.cancel(sample_id)
            case "send":
                book.take_unsent()
            case "abort":
                book.confirm_aborted(book.take_aborts())
            case "decode" | "stop":
                book.decoded(sample_id, [place, place], [-1.0, -2.0], "stop" if kind == "stop" else None)
        record.add(book.take_events())  # raises on a second end, and on a token behind it
    for sample_id in started:
        book.cancel(sample_id)
    book.confirm_aborted(book.take_aborts())
    assert book.has_events == (book.num_unfinished > 0)
    record.add(book.take_events())
    assert book.num_unfinished == book.num_live == 0
    assert set(record.ended) == started
    for sample_id, end in record.ended.items():
        assert end.num_tokens == sample_id + len(record.tokens.get(sample_id, []))
        assert sorted(record.tokens.get(sample_id, [])) == record.tokens.get(sample_id, [])
    assert book.num_tokens_decoded == sum(len(tokens) for tokens in record.tokens.values())


def test_what_comes_behind_an_end_is_dropped() -> None:
    book = SampleTracker(100, 48)
    book.start(generate(0))
    book.take_unsent()
    book.decoded(0, [3], [-1.0], "stop")
    book.decoded(0, [4], [-1.0], None)
    assert book.take_events().token_ids.tolist() == [3]
    assert book.num_tokens_decoded == 1


def test_a_sample_that_ends_before_its_abort_goes_out_is_not_aborted() -> None:
    book = SampleTracker(100, 48)
    book.start(generate(0))
    book.take_unsent()
    book.cancel(0)
    book.decoded(0, [3], [-1.0], "stop")
    assert book.take_aborts() == []
    assert [end.finish_reason for end in book.take_events().ended] == ["stop"]


def test_streams_differ_by_seed_and_by_place_and_fit_into_63_bits() -> None:
    seeds = {stream_seed(seed, num_prefix) for seed in (-1, 0, 1, 1 << 40) for num_prefix in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert np.std([seed / 2**63 for seed in seeds]) > 0.2
