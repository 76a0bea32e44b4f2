"""A learner that takes as long as accelerators would: for benchmarks of everything else, on a machine without any.

Groups, steps, versions, broadcasts and checkpoints are real; the gradient is zero, so the model stays what it is.
"""

import time
from collections.abc import Callable

from darts_async.learner.metric_sums import Tally
from darts_async.learner.objective import Objective
from darts_async.learner.packing.batch import PackedBatch


class ScriptedObjective(Objective):
    """Sleeps where `Objective` computes; see `LearnerScriptConfig` for the times."""

    def before_update(self) -> None:
        """The optimiser step of a large model."""
        assert self._config.script is not None
        time.sleep(self._config.script.step_s)

    def take_utilisation(self, busy_s: float) -> dict[str, float]:
        """Nothing is computed."""
        return {}

    def _pass(self, batch: PackedBatch, has_gradient: bool, collect: Callable[[], None]) -> Tally:
        """Of all groups alike, though those with equal rewards would need no gradient: rewards mean nothing here. A
        rank has its share of the tokens, and the ranks sleep at the same time."""
        assert self._config.script is not None
        if not batch.idle:
            time.sleep(self._config.script.token_s * len(batch.targets) * self._num_ranks)
        return Tally()
