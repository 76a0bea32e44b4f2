"""What the run is doing, and how it ends, opens again and starts over.

A run begins when a generator, a reward process and the learner are up. It is finished when its last step is in a
checkpoint and every generator has reported its tokens, or, if it was stopped, when all samples have ended.
"""

from enum import Enum, auto

from msgspec import Struct

from darts_async.config import RunConfig
from darts_async.protocol import RunFinished, ShaperSnapshot
from darts_async.shaper.evaluation import Evaluation
from darts_async.shaper.open_work import OpenWork
from darts_async.shaper.outbox import Outbox
from darts_async.shaper.training import Training

FINISHED = "finished"
"""Why a run ends that is not stopped."""
TOLD_WITHIN_S = 10.0
"""How long the end of a run waits for generators that were silent and may have tokens to tell."""


class RunPhase(Enum):
    """What the run is doing."""

    STARTING = auto()
    EVALUATING_BEFORE = auto()
    TRAINING = auto()
    EVALUATING_AFTER = auto()
    STOPPING = auto()
    FINISHED = auto()


class PhasesState(Struct, frozen=True):
    """What `RunPhases` know between two events."""

    phase: RunPhase
    stop_reason: str
    told_by_s: float | None


class RunPhases:
    """The phase of the run, and its changes."""

    def __init__(
        self, config: RunConfig, work: OpenWork, training: Training, evaluation: Evaluation, outbox: Outbox
    ) -> None:
        self._learner = config.learner
        self._work = work
        self._training = training
        self._feed = training.feed
        self._evaluation = evaluation
        self._outbox = outbox
        self.phase = RunPhase.STARTING
        self._stop_reason = FINISHED
        self._told_by_s: float | None = None
        """When the end no longer waits for silent generators, once it does."""

    @property
    def is_ending(self) -> bool:
        """Whether the run was told to stop, or is over: groups that were shipped may have been given up."""
        return self.phase in (RunPhase.STOPPING, RunPhase.FINISHED)

    @property
    def is_training(self) -> bool:
        """Whether there are steps to take."""
        return self.phase is RunPhase.TRAINING and self._feed.num_steps < self._learner.steps

    def advance(self, now_s: float) -> None:
        """What follows from any event."""
        lowest, num_steps = self._work.generators.lowest_version, self._feed.num_steps
        match self.phase:
            case RunPhase.STARTING if self._feed.learner_up and self._work.rewards.items and lowest is not None:
                self.phase = RunPhase.EVALUATING_BEFORE
                self._evaluation.begin(num_steps)
            case RunPhase.STOPPING if not self._work.groups and self._is_told(now_s):
                self._finish()
            case _ if self._evaluation.under_way or self.is_training:
                return
            case RunPhase.EVALUATING_BEFORE:
                self.phase = RunPhase.TRAINING
                self._training.begin(now_s)
            case RunPhase.TRAINING if lowest == num_steps:
                self.phase = RunPhase.EVALUATING_AFTER
                if num_steps:  # a run without steps has evaluated this version
                    self._evaluation.begin(num_steps)
            case RunPhase.EVALUATING_AFTER if not self._work.groups and self._is_saved() and self._is_told(now_s):
                self._finish()
            case _:
                return
        self.advance(now_s)  # without held-out prompts an evaluation ends as it begins

    def stop(self, reason: str) -> None:
        """End early: nothing new is opened, what runs is cancelled, and full steps are still committed."""
        if not self.is_ending:
            self.phase, self._stop_reason = RunPhase.STOPPING, reason
            self._training.stop("run_stopped")
            self._evaluation.abandon()

    def abandon(self) -> None:
        """What has not been acknowledged by the end of a stop is abandoned."""
        self._training.abandon()
        self._work.abandon_all("unacknowledged_at_stop")

    def reopen(self, now_s: float) -> None:
        """The run continues in another life. If it had been stopped, the prompts of given-up groups are asked again. If
        it had finished and has no further steps, it ends again when the learner reports the last version."""
        had_all = self.phase is RunPhase.EVALUATING_AFTER or (self.is_ending and self._stop_reason == FINISHED)
        if had_all and self._feed.num_steps >= self._learner.steps:
            self.phase = RunPhase.EVALUATING_AFTER
        elif had_all or self.is_ending:
            self.abandon()
            self.begin_again(now_s)

    def begin_again(self, now_s: float) -> None:
        """No group is open: continue after the steps that were committed."""
        self._training.reopen()
        self._evaluation.abandon()
        self.phase, self._stop_reason, self._told_by_s = RunPhase.STARTING, FINISHED, None
        if self._feed.num_steps or self._training.cursor:
            self.phase = RunPhase.TRAINING
            self._training.begin(now_s)

    def _is_saved(self) -> bool:
        """Whether the learner is up and has a checkpoint of every step."""
        committed = self._feed.committed
        return self._feed.learner_up and committed.durable == committed.position == committed.num_steps

    def _is_told(self, now_s: float) -> bool:
        """Whether every decoded token is known, or has been waited for long enough. A generator that was silent may
        come back with more tokens; without these, the sums of the run would not add up."""
        if not self._work.generators.owing:
            return True
        if self._told_by_s is None:
            self._told_by_s = now_s + TOLD_WITHIN_S
        return now_s >= self._told_by_s

    def _finish(self) -> None:
        self.phase = RunPhase.FINISHED
        num_steps, totals = self._feed.num_steps, self._work.totals
        if self._stop_reason != FINISHED and num_steps:  # the learner leaves a checkpoint of this version
            self._outbox.to_learner(ShaperSnapshot(num_steps, b""))
        message = RunFinished(
            reason=self._stop_reason,
            tokens_by_outcome=dict(totals.tokens_by_outcome),
            samples_by_outcome=dict(totals.samples_by_outcome),
            tokens_by_staleness=dict(totals.tokens_by_staleness),
            num_steps=num_steps,
            tokens_by_generator={name: dict(counts) for name, counts in totals.tokens_by_generator.items()},
            num_rewards=totals.rewards.num_scored + totals.rewards.num_failed,
            failed_rewards=dict(totals.rewards.num_by_kind),
            first_failures=dict(totals.rewards.first_by_kind),
        )
        self._outbox.to_launcher(message)

    def to_state(self) -> PhasesState:
        return PhasesState(phase=self.phase, stop_reason=self._stop_reason, told_by_s=self._told_by_s)

    def restore(self, state: PhasesState) -> None:
        self.phase, self._stop_reason, self._told_by_s = state.phase, state.stop_reason, state.told_by_s
