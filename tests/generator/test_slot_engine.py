"""The bookkeeping of slots under arbitrary starts, cancels and ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts_async.generator.slot_engine import SlotTable
from tests.generator.world import Record, generate

Action = tuple[str, int, int]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["start", "start", "cancel", "step"]), st.integers(0, 11), st.integers(1, 6)), max_size=60
)


class Storage:
    """What an engine would keep per slot: here, whose it is."""

    def __init__(self, num_slots: int) -> None:
        self.owner = [-1] * num_slots

    def step(self, table: SlotTable, *, stop_on: int, max_admitted_tokens: int) -> Record:
        moves, admitted = table.begin_step(max_admitted_tokens)
        for move in moves:
            self.owner[move.target] = self.owner[move.source]
        for slot in admitted:
            self.owner[slot] = table.request(slot).sample_id
        assert self.owner[: table.num_active] == table.active["sample_id"].tolist()
        table.validate()
        assert admitted or not table._waiting or table.num_active == table.num_slots
        tokens = (table.active["sample_id"] + table.active["num_tokens"]).astype(np.int32)
        record = Record()
        record.add(table.finish_step(tokens, np.zeros(len(tokens), np.float32), tokens % 7 == stop_on))
        table.validate()
        return record


@pytest.mark.slow
@given(ACTIONS, st.integers(1, 5), st.integers(0, 6), st.integers(1, 12))
def test_samples_stay_compact_keep_their_slot_content_and_end_exactly_once(
    actions: list[Action], num_slots: int, stop_on: int, max_admitted_tokens: int
) -> None:
    table, storage, total = SlotTable(num_slots, 16), Storage(num_slots), Record()
    started: dict[int, int] = {}
    for action, index, limit in [*actions, *[("step", 0, 0)] * 200]:
        if action == "start" and index not in started:
            started[index] = limit
            table.start(generate(index, prompt=(1,) * (1 + index % 4), max_new_tokens=limit, priority=index % 3))
        elif action == "cancel":
            table.cancel(index)
        elif action == "step":
            step = storage.step(table, stop_on=stop_on, max_admitted_tokens=max_admitted_tokens)
            assert not step.tokens.keys() & total.ended.keys()
            assert not step.ended.keys() & total.ended.keys()
            for sample_id, tokens in step.tokens.items():
                total.tokens.setdefault(sample_id, []).extend(tokens)
            total.ended |= step.ended
        table.validate()
    assert total.ended.keys() == started.keys()
    assert table.num_unfinished == table.num_active == 0
    for sample_id, end in total.ended.items():
        assert end.num_tokens == len(total.tokens.get(sample_id, [])) <= started[sample_id]
        assert (end.finish_reason == "length") <= (end.num_tokens == started[sample_id])


def test_admission_is_bounded_in_tokens_but_never_stuck() -> None:
    table = SlotTable(4, 64)
    for index in range(4):
        table.start(generate(index, prompt=(1,) * 20))
    assert table.begin_step(max_admitted_tokens=45)[1] == (0, 1)
    assert table.begin_step(max_admitted_tokens=1)[1] == (2,)
    assert table.begin_step()[1] == (3,)


def test_a_freed_slot_is_filled_by_a_waiting_sample_before_any_is_moved() -> None:
    table = SlotTable(3, 64)
    for index in range(4):
        table.start(generate(index))
    table.begin_step()
    table.cancel(1)
    assert table.begin_step() == ((), (1,))
    assert table.active["sample_id"].tolist() == [0, 3, 2]
