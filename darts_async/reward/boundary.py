"""Refuses invalid messages of the shaper, and names it, before a worker gets them. A reward function that fails on a
valid item is not the fault of the shaper.
"""

from darts_async.protocol import Greet, Score, ShaperToReward
from darts_async.token_checks import NUM_INT32, not_tokens

_ID_LIMIT = 1 << 62


def refusal_of_shaper(message: ShaperToReward) -> str | None:
    """Why a message of the shaper cannot be meant; None if it is to be taken."""
    match message:
        case Greet(number=number):
            return None if number >= 1 else f"greeting {number}"
        case Score(sample_id=sample_id, token_ids=token_ids):
            return f"sample {sample_id}" if not 0 <= sample_id < _ID_LIMIT else not_tokens(token_ids, NUM_INT32)
