"""What a reward process takes from the shaper."""

import numpy as np
import pytest

from darts_async.protocol import Greet, Score, ShaperToReward
from darts_async.reward.boundary import refusal_of_shaper


def item(sample_id: int, *token_ids: int) -> Score:
    return Score(sample_id, "p", "a", "{}", np.array(token_ids, np.int32), "stop")


@pytest.mark.parametrize("message", [Greet(1), item(0), item((1 << 62) - 1, 0, (1 << 31) - 1)])
def test_what_can_be_meant_is_taken(message: ShaperToReward) -> None:
    assert refusal_of_shaper(message) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Greet(0), "greeting 0"),
        (item(-1), "sample -1"),
        (item(1 << 62), "sample 4611686018427387904"),
        (item(0, 3, -1), "token ids -1 to 3 are outside the vocabulary of 2147483648"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(message: ShaperToReward, reason: str) -> None:
    assert refusal_of_shaper(message) == reason
