"""The shaper as a pure state machine: messages in, messages and ledger records out.

No clock, socket, log, task or random source inside; time and seeds are arguments. The same object runs in the
process, in simulation and under Hypothesis. Each method makes one decision completely and returns what is to be done;
`validate` states the invariants, which hold between any two calls. A part continues by `restore` where `to_state` was
taken.

    training         which group is opened, complete, or given up          `Spares`, `PromptQueue`, `StalenessWindow`
    learner_feed     what the learner is sent, and in which order          `CommittedSteps`
    evaluation       held-out prompts
    open_work        which process decodes or scores which sample          `rosters`
    phases           what the run is doing, and how it ends
    sample_events    what generators and reward processes say of samples
    outbox           what is to be sent and recorded

A training group is opened when the staleness window and the generators have room, complete when its rule has nothing
left to wait for, shipped when the window lets it into the next step, and done when the learner has committed it.
Samples of a generator that is gone continue elsewhere after the tokens that were streamed. A learner that comes back
from a checkpoint gets the groups since then again, for the same steps, and nothing is counted twice. Where they are no
longer kept, the run starts over from what that checkpoint has of the shaper (`ReplayableState`). It can do so at the
beginning of a life only: later, generators may have versions that are undone by it, and all processes have to be new
(`TakeUpAgain`).
"""

from msgspec import Struct
from msgspec.structs import replace

from darts_async.config import RunConfig
from darts_async.prompts.source import Prompt, PromptSource
from darts_async.protocol import (
    GeneratorReady,
    GeneratorToShaper,
    Greet,
    GroupsCommitted,
    LearnerReady,
    LearnerToShaper,
    RewardReady,
    RewardToShaper,
    TakeUpAgain,
    VersionPublished,
    VersionSaved,
    WeightsApplied,
)
from darts_async.shaper.estimates.decode_elasticity import DecodePace
from darts_async.shaper.estimates.planner import Learnt, Planner
from darts_async.shaper.evaluation import Evaluation, EvaluationState
from darts_async.shaper.ledger import BroughtForward, RunReopened, VersionSeen, WeightsAcknowledged
from darts_async.shaper.open_work import OpenWork, OpenWorkState
from darts_async.shaper.outbox import Outbox, Output
from darts_async.shaper.phases import PhasesState, RunPhase, RunPhases
from darts_async.shaper.sample_events import SampleEvents
from darts_async.shaper.training import Training, TrainingState
from darts_async.topology.roles import LEARNER

Incoming = GeneratorToShaper | RewardToShaper | LearnerToShaper


class StateSnapshot(Struct, frozen=True):
    """All that a `ShaperState` knows between two events. To be encoded at once: it shares its parts with the state."""

    phases: PhasesState
    learnt: Learnt
    pace: DecodePace | None
    work: OpenWorkState
    training: TrainingState
    evaluation: EvaluationState
    incarnations: dict[str, int]
    greetings: dict[str, int]


class ShaperState:
    """All that the shaper knows and decides."""

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptSource,
        held_out: tuple[Prompt, ...],
        stop_token_ids: frozenset[int] = frozenset(),
        snapshot: StateSnapshot | None = None,
    ) -> None:
        """
        Args:
            prompts: to train on.
            held_out: to evaluate on.
            stop_token_ids: the tokens that end a response, where the engine's model names any.
            snapshot: what `to_state` gave of a state that was made with the same of all these: this one behaves from
                here on as that one does.
        """
        self._config = config
        self._outbox = out = Outbox()
        self.planner = Planner(config, snapshot.learnt if snapshot is not None else None)
        self.work = work = OpenWork(config, out, stop_token_ids)
        self.training = training = Training(config, prompts, work, self.planner, out)
        self.feed = training.feed
        self._evaluation = evaluation = Evaluation(config.evaluation, work, held_out, config.reward.labels)
        self._phases = RunPhases(config, work, training, evaluation, out)
        self._samples = SampleEvents(work, self.planner, training, evaluation, out)
        self._incarnations: dict[str, int] = {}
        self._greetings: dict[str, int] = {}
        if snapshot is not None:
            self._restore(snapshot)

    def to_state(self) -> StateSnapshot:
        """For another one that is to continue from here."""
        return StateSnapshot(
            phases=self._phases.to_state(),
            learnt=self.planner.to_state(),
            pace=self.planner.pace,
            work=self.work.to_state(),
            training=self.training.to_state(),
            evaluation=self._evaluation.to_state(),
            incarnations=self._incarnations,
            greetings=self._greetings,
        )

    def to_checkpoint(self, policy_version: int) -> StateSnapshot:
        """For another one that continues from a checkpoint of this version after all processes have ended: it is to
        `start_over`. Without the tokens of open groups, and of what the checkpoint has consumed."""
        work, training = self.work.to_checkpoint(), self.training.to_checkpoint(policy_version)
        return replace(self.to_state(), pace=None, work=work, training=training, incarnations={}, greetings={})

    def _restore(self, snapshot: StateSnapshot) -> None:
        if self.planner.pace is not None and snapshot.pace is not None:
            self.planner.pace = snapshot.pace
        self.work.restore(snapshot.work)
        self.training.restore(snapshot.training)
        self._evaluation.restore(snapshot.evaluation)
        self._phases.restore(snapshot.phases)
        self._incarnations, self._greetings = snapshot.incarnations, snapshot.greetings

    # --- to look at ------------------------------------------------------------------------------------------

    @property
    def settings(self) -> str:
        """The settings under which it decides, as JSON."""
        return self._config.model_dump_json()

    @property
    def num_steps(self) -> int:
        """Optimiser steps that were committed."""
        return self.feed.num_steps

    @property
    def phase(self) -> RunPhase:
        """What the run is doing."""
        return self._phases.phase

    @property
    def is_ending(self) -> bool:
        """Whether the run was told to stop, or is over: groups that were shipped may have been given up."""
        return self._phases.is_ending

    @property
    def may_start_over(self) -> bool:
        """Whether no generator can have a version that would be undone: no learner of this life was told to continue.
        What generators report is not enough to know, because one that is silent may have a later version."""
        return not self.feed.has_begun

    def greeting(self, peer: str) -> int:
        """The number of the newest greeting of a peer; 0 before the first."""
        return self._greetings.get(peer, 0)

    def sums(self, num_records: int) -> BroughtForward:
        """The sums over so many records, some of them lost, when nothing is open."""
        assert not self.work.groups, sorted(self.work.groups)
        totals = self.work.totals
        return BroughtForward(
            num_records=num_records,
            num_steps=self.num_steps,
            next_group_id=self.work.next_group_id,
            samples_by_outcome=dict(totals.samples_by_outcome),
            tokens_by_outcome=dict(totals.tokens_by_outcome),
        )

    # --- events ----------------------------------------------------------------------------------------------

    def handle(self, peer: str, message: Incoming, now_s: float) -> list[Output]:
        """A message of a peer that has passed the `Boundary`."""
        match message:
            case GeneratorReady():
                if message.greeting == self._greetings.get(peer):
                    self.work.generators.join(
                        peer, message.num_slots, self._config.generator.max_queued, self._incarnations[peer]
                    )
            case WeightsApplied():
                self._weights_applied(peer, message, now_s)
            case RewardReady():
                self.work.rewards.join(peer)
            case LearnerReady(policy_version=version):
                self._learner_ready(version, now_s)
            case GroupsCommitted():
                self.training.committed(message, now_s)
            case VersionPublished(policy_version=version):
                self.work.generators.published(version)
                self._outbox.record(VersionSeen(version))
                if self._phases.is_training:
                    self._evaluation.published(version)
            case VersionSaved(policy_version=version, oldest_kept=oldest):
                self.feed.committed.saved(version, oldest)
            case _:
                if not self._samples.handle(peer, self._incarnations[peer], message, now_s):
                    return self._outbox.take()
        return self._advance(now_s)

    def peer_up(self, peer: str, incarnation: int, now_s: float) -> list[Output]:
        """A peer is connected, for the first time or again: what it had is taken back, and it is greeted."""
        is_another = self._incarnations.get(peer, incarnation) != incarnation
        self._lose(peer, is_gone=is_another)
        if is_another:
            self._outbox.forget(peer)
        self._incarnations[peer] = incarnation
        self._greetings[peer] = self._greetings.get(peer, 0) + 1
        self._outbox.send(peer, Greet(self._greetings[peer]))
        return self._advance(now_s)

    def peer_lost(self, peer: str, now_s: float, *, is_gone: bool) -> list[Output]:
        """A peer is gone, or has been silent for too long."""
        self._lose(peer, is_gone=is_gone)
        return self._advance(now_s)

    def restarted(self, now_s: float) -> list[Output]:
        """The process of this state has died and come back, and does not know which peers are up. Each is greeted when
        it connects, and continues after what had been streamed."""
        self.training.restarted()
        for peer in sorted(self._incarnations):
            self._lose(peer, is_gone=False)
        return self._advance(now_s)

    def tick(self, now_s: float) -> list[Output]:
        """Time has passed."""
        if self.phase is RunPhase.TRAINING:
            self.training.tick(now_s)
        return self._advance(now_s)

    def stop(self, reason: str, now_s: float) -> list[Output]:
        """End early: nothing new is opened, what runs is cancelled, and full steps are still committed."""
        self._phases.stop(reason)
        return self._advance(now_s)

    def abandon(self, now_s: float) -> list[Output]:
        """What has not been acknowledged by the end of a stop is lost."""
        self._phases.abandon()
        return self._advance(now_s)

    def reopen(self, now_s: float, life: int = 0) -> list[Output]:
        """All processes have ended, and the run continues with new ones in this life of it. What was decoded and scored
        is kept; see `RunPhases.reopen`."""
        for peer in sorted(self._incarnations):
            self._lose(peer, is_gone=True)
        self.work.generators.reopen()
        self.feed.has_begun = False
        self.work.totals.end_of_life()
        self._outbox.record(RunReopened(self.num_steps, life))
        self._phases.reopen(now_s)
        return self._advance(now_s)

    # --- starting over ---------------------------------------------------------------------------------------

    def explains(self, policy_version: int) -> bool:
        """Whether a learner at this version can have got there from here, and can be told all that follows."""
        return self.feed.explains(policy_version)

    def start_over(self, now_s: float, life: int, policy_version: int, next_group_id: int = 0) -> list[Output]:
        """No open group continues, and their prompts are asked again: this state was in a checkpoint, or some of what
        followed it is lost. The learner is at `policy_version`; a step before it that is not known here counts as
        taken. Groups get ids from `next_group_id` on."""
        self.training.give_up()
        self.work.abandon_all("taken_up_without_it")
        self.work.totals.end_of_life()
        self.work.next_group_id = max(self.work.next_group_id, next_group_id)
        self.work.rollouts.start_over()
        if not self.explains(policy_version):
            self.feed.committed.jump(policy_version)
        self._outbox.record(RunReopened(self.num_steps, life))
        self._phases.begin_again(now_s)
        return self._outbox.take()

    def take_peers_of(self, other: "ShaperState") -> None:
        """This state takes the place of another one: the same processes are up, and what they had is void."""
        self._incarnations, self._greetings = other._incarnations, other._greetings
        self.work.take_peers_of(other.work)

    # --- what follows from any event -------------------------------------------------------------------------

    def _weights_applied(self, peer: str, message: WeightsApplied, now_s: float) -> None:
        self.work.generators.applied(peer, message.policy_version)
        self._outbox.record(WeightsAcknowledged(peer, self._incarnations[peer], message.policy_version))
        if self.planner.pace is not None:
            self.planner.pace.paused(peer, now_s)

    def _learner_ready(self, policy_version: int, now_s: float) -> None:
        if self.phase is RunPhase.FINISHED:
            return
        if not self.feed.committed.can_rewind(policy_version):
            self._take_up_again(policy_version)
            return
        for unheard in self.feed.unheard(policy_version):
            self.training.committed(unheard, now_s)
        self.feed.learner_ready(policy_version, self.work.generators.newest_version)

    def _take_up_again(self, policy_version: int) -> None:
        """The later checkpoints have all turned out to be damaged. A run that stops needs no learner for that."""
        self.feed.learner_up = False
        if self.phase is not RunPhase.STOPPING:
            reason = (
                f"the learner came back at version {policy_version}, the groups from there on were given up after a "
                f"checkpoint of version {self.feed.committed.oldest_kept}, and generators may decode under later "
                "versions"
            )
            self._outbox.to_launcher(TakeUpAgain(reason))

    def _lose(self, peer: str, *, is_gone: bool) -> None:
        if peer == LEARNER.first:
            self.feed.learner_up = False
        if self.planner.pace is not None:
            self.planner.pace.forget(peer)
        self._samples.lose(peer, is_gone=is_gone)

    def _advance(self, now_s: float) -> list[Output]:
        self.training.advance(now_s)
        report = self._evaluation.close()
        if report is not None:
            self._outbox.to_launcher(report)
        self._phases.advance(now_s)
        self.work.rollouts.advance(self.num_steps, self.work.groups.values())
        self.work.score_waiting()
        self.work.place()
        while self.work.has_room and self._open_group(now_s):
            self.work.place()
        return self._outbox.take()

    def _open_group(self, now_s: float) -> bool:
        """Open a group if an evaluation wants one, or training and the window allows it."""
        lowest = self.work.generators.lowest_version
        assert lowest is not None
        floor = min(lowest, self.num_steps)  # a generator may tell of a version before the learner tells of its step
        cursor, alone = self.training.cursor, not self._phases.is_training
        if self._evaluation.open_group(alone=alone, floor=floor, cursor=cursor, now_s=now_s):
            return True
        return self.phase is RunPhase.TRAINING and self.training.open_group(floor, now_s)

    def validate(self) -> None:
        """What holds between any two calls; the parts have their own."""
        self.work.validate()
        self.work.rollouts.validate(self.num_steps)
        if not self.is_ending:
            self.training.validate()
            self._evaluation.validate()
