"""Waits between tries."""

from hypothesis import given
from hypothesis import strategies as st

from darts_async.wire.backoff import backoff_s


@given(st.integers(0, 10_000), st.floats(1e-3, 10.0), st.floats(10.0, 1e4))
def test_a_wait_grows_with_the_failures_up_to_its_bound(num_failures: int, first_s: float, max_s: float) -> None:
    waits = [backoff_s(number, first_s, max_s) for number in (0, 1, num_failures, num_failures + 1, 10**6)]
    assert waits[:2] == [0.0, first_s]
    assert waits[2] <= waits[3] <= waits[4] == max_s


def test_a_wait_is_twice_the_one_before() -> None:
    assert [backoff_s(number, 0.5, 3.0) for number in range(6)] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]
