"""The rendezvous store: writes become messages, waits end."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from darts_async.errors import DeadlineError, ProtocolError, WeightUpdateError
from darts_async.protocol import StoreValue
from darts_async.weights.broadcast.relay_store import MAX_VALUE_BYTES, RelayStore


def make_store(sent: list[StoreValue] | None = None, *, deadline_s: float = 10.0) -> RelayStore:
    sink = sent if sent is not None else []
    return RelayStore(3, sink.append, asyncio.get_running_loop(), deadline_s=deadline_s)


async def test_what_a_thread_sets_goes_out_on_the_event_loop() -> None:
    sent: list[StoreValue] = []
    store = make_store(sent)
    await asyncio.to_thread(store.set, "0/1", b"address")
    await asyncio.sleep(0)
    assert sent == [StoreValue(3, "0/1", b"address")]
    assert store.get("0/1") == b"address"
    assert store.check(["0/1"])
    assert not store.check(["0/1", "0/2"])
    assert store.get_num_keys() == 1


async def test_a_waiting_thread_gets_what_is_put() -> None:
    store = make_store()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.get, "0/2")
        store.put("0/2", b"other")
        assert await asyncio.wrap_future(waiting) == b"other"


async def test_members_meet_when_all_are_there() -> None:
    store = make_store()
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(store.meet, 0, 3)
        store.put("here/1", b"")
        store.put("here/2", b"")
        await asyncio.wrap_future(meeting)
    with pytest.raises(DeadlineError, match="here/1"):
        make_store(deadline_s=0.01).meet(0, 2)


async def test_fail_wakes_every_waiter_and_stays() -> None:
    store = make_store()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(store.get, "a"), pool.submit(store.wait, ["b", "c"])]
        store.fail("the epoch was given up")
        for future in waiting:
            with pytest.raises(WeightUpdateError, match="the epoch was given up"):
                await asyncio.wrap_future(future)
    with pytest.raises(WeightUpdateError):
        store.get("a")


async def test_a_deadline_names_the_missing_keys() -> None:
    store = make_store(deadline_s=0.01)
    store.put("there", b"")
    with pytest.raises(DeadlineError, match=r"\['missing'\] of epoch 3"):
        store.wait(["there", "missing"])


async def test_the_deadline_is_the_epochs_whatever_the_collective_asks_for() -> None:
    store = make_store(deadline_s=0.01)
    store.set_timeout(timedelta(hours=1))
    with pytest.raises(DeadlineError, match=r"waited 0\.01 s"):
        store.wait(["missing"], timedelta(hours=1))


async def test_a_contradicting_or_oversized_value_is_refused_and_a_repeated_one_is_not() -> None:
    store = make_store()
    store.put("k", b"1")
    store.put("k", b"1")
    with pytest.raises(ProtocolError, match="'k' of epoch 3"):
        store.put("k", b"2")
    with pytest.raises(ProtocolError, match="limit"):
        store.put("large", bytes(MAX_VALUE_BYTES + 1))
    assert store.delete_key("k")
    assert not store.delete_key("k")


async def test_counting_is_refused() -> None:
    with pytest.raises(WeightUpdateError, match="cannot count"):
        make_store().add("n", 1)
