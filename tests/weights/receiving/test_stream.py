"""Tensors from the thread that receives to the thread that loads."""

import threading
import time

import pytest
import torch

from darts_async.errors import WeightUpdateError
from darts_async.weights.receiving.staging import TensorStream


def test_tensors_come_in_order_and_end() -> None:
    stream = TensorStream(1, time.monotonic() + 30)

    def produce() -> None:
        for number in range(20):  # more than may wait
            stream.put(str(number), torch.tensor(number))
        stream.end()

    thread = threading.Thread(target=produce)
    thread.start()
    assert [(name, int(tensor)) for name, tensor in stream.tensors()] == [(str(n), n) for n in range(20)]
    thread.join()


def test_a_failure_ends_both_sides() -> None:
    stream = TensorStream(1, time.monotonic() + 30)
    stream.put("first", torch.zeros(1))
    stream.fail("the learner is gone")
    stream.fail("and later that")
    with pytest.raises(WeightUpdateError, match="the learner is gone"):
        stream.put("second", torch.zeros(1))
    tensors = stream.tensors()
    assert next(tensors)[0] == "first"
    with pytest.raises(WeightUpdateError, match="the learner is gone"):
        next(tensors)


def test_who_waits_beyond_the_deadline_is_told() -> None:
    stream = TensorStream(1, time.monotonic())
    with pytest.raises(WeightUpdateError, match="did not arrive by its deadline"):
        next(stream.tensors())
    for _ in range(4):  # there is room for so many
        stream.put("x", torch.zeros(1))
    with pytest.raises(WeightUpdateError, match="were not fetched by its deadline"):
        stream.put("x", torch.zeros(1))
