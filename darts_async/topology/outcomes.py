"""What becomes of a sample. Each has exactly one outcome, and each decoded token that of its sample."""

from typing import Final, Literal, get_args

SampleOutcome = Literal["trained", "cancelled", "filtered", "stale", "lost", "evaluated"]
"""`trained`: it is in the gradient of a step. `cancelled`: it was stopped while it was decoded. `filtered`: it ended,
and was not selected, or its reward failed. `stale`: its tokens were too old for any step. `lost`: the run was stopped
before its end was acknowledged; of tokens, also those of a generator that no longer had the sample. `evaluated`: it was
drawn to measure, and not to train on."""

OUTCOMES: Final[tuple[SampleOutcome, ...]] = get_args(SampleOutcome)
EVALUATED: Final[SampleOutcome] = "evaluated"
