"""What becomes of a sample. Each has exactly one outcome, and each decoded token that of its sample."""

from typing import Final, Literal, get_args

Outcome = Literal["trained", "cancelled", "filtered", "stale", "lost", "evaluated"]
"""`trained`: it is in the gradient of a step. `cancelled`: it was stopped while it was decoded. `filtered`: it ended,
and was not selected. `stale`: its tokens were too old for any step. `lost`: the process that had it died, and it was
decoded again. `evaluated`: it was drawn to measure, and not to train on."""

OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
EVALUATED: Final[Outcome] = "evaluated"
