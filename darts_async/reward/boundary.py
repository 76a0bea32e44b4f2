"""What a reward process takes from the shaper: a message that cannot be meant is refused, its sender named, before a
worker hears of it. What a reward function makes of an item is another matter: that it fails is no fault of the shaper.
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
