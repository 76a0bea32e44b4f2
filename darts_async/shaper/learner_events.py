"""What the learner says: that it is up, which steps it has taken, and which versions it has published and saved."""

from darts_async.config import RunConfig
from darts_async.protocol import (
    GroupsCommitted,
    LearnerReady,
    LearnerToShaper,
    ShaperSnapshot,
    StepCompleted,
    TakeUpAgain,
    VersionPublished,
    VersionSaved,
)
from darts_async.shaper.estimates.planner import Planner
from darts_async.shaper.evaluation import Evaluation
from darts_async.shaper.ledger import VersionSeen
from darts_async.shaper.open_work import OpenWork
from darts_async.shaper.outbox import Outbox
from darts_async.shaper.phases import RunPhase, RunPhases
from darts_async.shaper.training import Training


class LearnerEvents:
    """Carries the learner's reports over to the training, the evaluation and the generators; it has no state of its
    own."""

    def __init__(
        self,
        config: RunConfig,
        work: OpenWork,
        planner: Planner,
        training: Training,
        evaluation: Evaluation,
        phases: RunPhases,
        outbox: Outbox,
    ) -> None:
        self._config = config
        self._work = work
        self._planner = planner
        self._training = training
        self._feed = training.feed
        self._evaluation = evaluation
        self._phases = phases
        self._outbox = outbox

    def handle(self, message: LearnerToShaper, now_s: float) -> None:
        """A message of the learner."""
        match message:
            case LearnerReady():
                self._ready(message, now_s)
            case GroupsCommitted():
                self._committed(message, now_s)
            case VersionPublished(policy_version=version):
                self._work.generators.published(version)
                self._outbox.record(VersionSeen(version))
                if self._phases.is_training:
                    self._evaluation.published(version)
            case VersionSaved(policy_version=version, oldest_kept=oldest):
                self._feed.committed.saved(version, oldest)

    def _ready(self, message: LearnerReady, now_s: float) -> None:
        version = message.policy_version
        if self._phases.phase is RunPhase.FINISHED:
            return
        if not self._feed.committed.can_rewind(version):
            self._take_up_again(version)
            return
        for unheard in self._feed.unheard(version):
            self._committed(unheard, now_s)
        self._feed.learner_ready(version, self._work.generators.newest_version)

    def _take_up_again(self, policy_version: int) -> None:
        """Later checkpoints have turned out damaged one after the other. A run that stops needs no learner for that."""
        self._feed.learner_up = False
        if self._phases.phase is not RunPhase.STOPPING:
            reason = (
                f"the learner came back at version {policy_version}, the groups from there on were given up after a "
                f"checkpoint of version {self._feed.committed.oldest_kept}, and generators may decode under later "
                "versions"
            )
            self._outbox.to_launcher(TakeUpAgain(reason))

    def _committed(self, message: GroupsCommitted, now_s: float) -> None:
        before = self._feed.committed.position
        metrics = self._training.committed(message, now_s)
        if self._feed.committed.position > before:
            self._add_to_checkpoint(message.step + 1)
        if metrics is not None:
            totals = self._work.totals
            metrics |= self._planner.metrics()
            metrics |= {f"tokens/{outcome}": float(n) for outcome, n in totals.tokens_by_outcome.items()}
            metrics["run/failed_rewards"] = float(totals.rewards.num_failed)
            metrics["run/groups_not_shown"] = float(self._work.rollouts.num_given_up)
            self._outbox.to_launcher(StepCompleted(message.step, metrics))

    def _add_to_checkpoint(self, policy_version: int) -> None:
        """Where a checkpoint is written, it holds what is known here after that event: `ReplayableState` puts what
        `ShaperState.to_checkpoint` gives into the message."""
        if self._config.learner.is_saved(policy_version):
            self._outbox.to_learner(ShaperSnapshot(policy_version, b""))
