"""What becomes of a sample. Each has exactly one outcome, and each decoded token that of its sample."""

from typing import Final, Literal, get_args

SampleOutcome = Literal["trained", "cancelled", "filtered", "stale", "abandoned", "evaluated"]
"""`trained`: it is in the gradient of a step. `cancelled`: it was stopped while it was decoded. `filtered`: it ended,
and was not selected, or its reward failed. `stale`: its tokens were too old for any step. `abandoned`: the run was
stopped before its end or its step was acknowledged; of tokens, also those of a generator that no longer had the sample.
Nothing of it is lost: its end is in the ledger. `evaluated`: it was drawn to measure, and not to train on."""

OUTCOMES: Final[tuple[SampleOutcome, ...]] = get_args(SampleOutcome)
EVALUATED: Final[SampleOutcome] = "evaluated"
