"""The shaper as a pure state machine: messages in, messages and ledger records out.

No clock, socket, log, task or random source inside; time and seeds are arguments. The same object runs in the
process, in simulation and under Hypothesis. Each method makes one decision completely and returns what to do about
it; `validate` states the invariants and holds between any two calls.

A training group is opened when the staleness window and the generators have room, complete when its rule has nothing
left to wait for, shipped when the window lets it into the next step, and done when the learner has committed it.
Samples of a generator that is gone go on elsewhere behind the tokens that were streamed. A learner that comes back from
a checkpoint gets the groups since then again, for the same steps, and nothing is counted twice; where they are not kept
any more, the run starts over from what that checkpoint has of the shaper (`Standing`). It can do so at the beginning of
a life only: later, generators may have versions that are undone by it, and all processes have to be new
(`TakeUpAgain`). A run is finished when its last step is in a checkpoint and every generator has told of all that it
decoded.
"""

from enum import Enum, auto
from typing import Any

from msgspec import Struct

from darts_async.config import RunConfig
from darts_async.prompts.source import Prompt, PromptSource
from darts_async.protocol import (
    Cancel,
    FinishReason,
    GeneratorReady,
    GeneratorToShaper,
    Greet,
    GroupsCommitted,
    LearnerReady,
    LearnerToShaper,
    RewardFailed,
    RewardReady,
    RewardToShaper,
    RunFinished,
    SampleCancelled,
    SampleFinished,
    SampleRejected,
    SampleScored,
    ScoreFailed,
    ShaperSnapshot,
    StepCompleted,
    TakeUpAgain,
    TokensDecoded,
    VersionPublished,
    VersionSaved,
    WeightsApplied,
)
from darts_async.shaper.estimates.decode_elasticity import PaceState
from darts_async.shaper.estimates.planner import Planner
from darts_async.shaper.evaluation import Evaluation, EvaluationState
from darts_async.shaper.group import Group, Purpose, Sample, Stage
from darts_async.shaper.ledger import BroughtForward, GroupOpened, RunReopened, VersionSeen, WeightsAcknowledged
from darts_async.shaper.training import Training, TrainingState
from darts_async.shaper.workload import Forget, Output, Send, Workload, WorkloadState
from darts_async.topology.roles import LAUNCHER, LEARNER

FINISHED = "finished"
"""Why a run ends that is not stopped."""
TOLD_WITHIN_S = 10.0
"""How long the end of a run waits for generators that were silent and may have tokens to tell."""


Incoming = GeneratorToShaper | RewardToShaper | LearnerToShaper


class Phase(Enum):
    """What the run is doing."""

    STARTING = auto()
    EVALUATING_BEFORE = auto()
    TRAINING = auto()
    EVALUATING_AFTER = auto()
    STOPPING = auto()
    FINISHED = auto()


class Snapshot(Struct, frozen=True):
    """All that a `ShaperState` knows between two events, beside what it is made with. To be encoded at once: it shares
    its parts with the state."""

    phase: Phase
    stop_reason: str
    learnt: dict[str, Any]
    pace: PaceState | None
    work: WorkloadState
    training: TrainingState
    evaluation: EvaluationState
    incarnations: dict[str, int]
    greetings: dict[str, int]
    told_by_s: float | None


class ShaperState:
    """All that the shaper knows and decides."""

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptSource,
        held_out: tuple[Prompt, ...],
        stop_token_ids: frozenset[int] = frozenset(),
        snapshot: Snapshot | None = None,
    ) -> None:
        """
        Args:
            config: of the run.
            prompts: to train on.
            held_out: to evaluate on.
            stop_token_ids: the tokens that end a response, where the engine's model names any.
            snapshot: what `to_state` gave of a state that was made with the same of all these: this one behaves from
                here on as that one does.
        """
        self._config = config
        self.planner = Planner(config, snapshot.learnt if snapshot is not None else None)
        self.phase = Phase.STARTING
        self.work = Workload(config, stop_token_ids)
        self._training = Training(config, prompts, self.work, self.planner)
        self._incarnations: dict[str, int] = {}
        self._greetings: dict[str, int] = {}
        self._evaluation = Evaluation(config.evaluation, self.work, held_out)
        self._stop_reason = FINISHED
        self._told_by_s: float | None = None
        if snapshot is not None:
            self._restore(snapshot)

    def to_state(self) -> Snapshot:
        """For another one that is to go on from here."""
        return Snapshot(
            phase=self.phase,
            stop_reason=self._stop_reason,
            learnt=self.planner.to_state(),
            pace=self.planner.pace.to_state() if self.planner.pace is not None else None,
            work=self.work.to_state(),
            training=self._training.to_state(),
            evaluation=self._evaluation.to_state(),
            incarnations=self._incarnations,
            greetings=self._greetings,
            told_by_s=self._told_by_s,
        )

    def to_checkpoint(self, policy_version: int) -> Snapshot:
        """For another one that goes on from a checkpoint of this version, when none of the processes is there any more:
        it is to `start_over`. Without the tokens of open groups, and of what the checkpoint has consumed."""
        return Snapshot(
            phase=self.phase,
            stop_reason=self._stop_reason,
            learnt=self.planner.to_state(),
            pace=None,
            work=self.work.to_checkpoint(),
            training=self._training.to_checkpoint(policy_version),
            evaluation=self._evaluation.to_state(),
            incarnations={},
            greetings={},
            told_by_s=None,
        )

    def _restore(self, snapshot: Snapshot) -> None:
        self.phase, self._stop_reason = snapshot.phase, snapshot.stop_reason
        if self.planner.pace is not None and snapshot.pace is not None:
            self.planner.pace.restore(snapshot.pace)
        self.work.restore(snapshot.work)
        self._training.restore(snapshot.training)
        self._evaluation.restore(snapshot.evaluation)
        self._incarnations, self._greetings = snapshot.incarnations, snapshot.greetings
        self._told_by_s = snapshot.told_by_s

    # --- events ----------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Optimiser steps that were committed."""
        return self._training.num_steps

    @property
    def training(self) -> Training:
        """The training groups, to look at."""
        return self._training

    @property
    def is_ending(self) -> bool:
        """Whether the run was told to stop, or is over: groups that were shipped may have been given up."""
        return self.phase in (Phase.STOPPING, Phase.FINISHED)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.phase is Phase.FINISHED

    def greeting(self, peer: str) -> int:
        """The number of the newest greeting of a peer; 0 before the first."""
        return self._greetings.get(peer, 0)

    def handle(self, peer: str, message: Incoming, now_s: float) -> list[Output]:
        """A message of a peer that has passed the `Boundary`."""
        match message:
            case TokensDecoded():
                self._tokens_decoded(peer, message, now_s)
                return self._take()  # tokens alone open and close nothing
            case SampleFinished():
                self._sample_finished(peer, message)
            case SampleCancelled():
                self._sample_cancelled(peer, message)
            case SampleScored():
                if not self._sample_scored(peer, message):
                    return self._take()
            case WeightsApplied():
                self._weights_applied(peer, message, now_s)
            case GeneratorReady():
                if message.greeting == self._greetings.get(peer):
                    self.work.generators.join(
                        peer, message.num_slots, self._config.generator.max_queued, self._incarnations[peer]
                    )
            case SampleRejected():
                self._sample_rejected(peer, message)
            case ScoreFailed():
                self._score_failed(peer, message)
            case RewardReady():
                self.work.rewards.join(peer)
            case LearnerReady() | GroupsCommitted() | VersionPublished() | VersionSaved():
                self._learner_said(message, now_s)
        return self._advance(now_s)

    def peer_up(self, peer: str, incarnation: int, now_s: float) -> list[Output]:
        """A peer is connected, anew or again. Whatever it had is taken back, and it is asked to announce itself."""
        is_another = self._incarnations.get(peer, incarnation) != incarnation
        self._lose(peer, is_gone=is_another)
        if is_another:
            self._record(Forget(peer))
        self._incarnations[peer] = incarnation
        self._greetings[peer] = self._greetings.get(peer, 0) + 1
        self._record(Send(peer, Greet(self._greetings[peer])))
        return self._advance(now_s)

    def peer_lost(self, peer: str, now_s: float, *, is_gone: bool) -> list[Output]:
        """A peer is gone, or has been silent for too long."""
        self._lose(peer, is_gone=is_gone)
        return self._advance(now_s)

    def restarted(self, now_s: float) -> list[Output]:
        """The process of this state has died and come back: it knows of nobody whether they are up. Each is greeted
        when it is heard of, and goes on behind what had been streamed."""
        self._training.restarted()
        for peer in sorted(self._incarnations):
            self._lose(peer, is_gone=False)
        return self._advance(now_s)

    def tick(self, now_s: float) -> list[Output]:
        """Time has passed."""
        if self.phase is Phase.TRAINING:
            self._training.tick(now_s)
        return self._advance(now_s)

    def stop(self, reason: str, now_s: float) -> list[Output]:
        """End early: nothing new is opened, what runs is cancelled, and full steps are still committed."""
        if self.phase not in (Phase.STOPPING, Phase.FINISHED):
            self.phase, self._stop_reason = Phase.STOPPING, reason
            self._training.stop("run_stopped")
            self._evaluation.abandon()
        return self._advance(now_s)

    def reopen(self, now_s: float, life: int = 0) -> list[Output]:
        """All processes have ended, and the run goes on with new ones in this life of it. What was decoded and judged
        goes on; of a run that had been stopped, the prompts that the stop took are asked again. One that had nothing
        left to do ends again when the learner has said that it has the last version."""
        for peer in sorted(self._incarnations):
            self._lose(peer, is_gone=True)
        self.work.generators.reopen()
        self._training.has_begun = False
        self.work.totals.end_of_life()
        self._record(RunReopened(self.num_steps, life))
        if self.phase is Phase.FINISHED and self._stop_reason == FINISHED:
            self.phase = Phase.EVALUATING_AFTER
        elif self.phase in (Phase.STOPPING, Phase.FINISHED):
            self._lose_the_rest("unacknowledged_at_stop")
            self._train_again(now_s)
        return self._advance(now_s)

    def start_over(self, now_s: float, life: int, policy_version: int, next_group_id: int = 0) -> list[Output]:
        """Nothing that is open goes on, and its prompts are asked again: this state was in a checkpoint, or some of
        what followed from it is not known any more. The learner is at `policy_version`; a step before it that is not
        known here is taken to be done. Groups get ids from `next_group_id` on."""
        self._training.give_up()
        self._lose_the_rest("taken_up_without_it")
        self.work.totals.end_of_life()
        self.work.next_group_id = max(self.work.next_group_id, next_group_id)
        if not self._training.explains(policy_version):
            self._training.taken.jump(policy_version)
        self._record(RunReopened(self.num_steps, life))
        self._train_again(now_s)
        return self._take()

    def sums(self, num_records: int) -> BroughtForward:
        """What so many records, some of them lost, have come to, when nothing is open."""
        assert not self.work.groups, sorted(self.work.groups)
        totals = self.work.totals
        return BroughtForward(
            num_records=num_records,
            num_steps=self.num_steps,
            next_group_id=self.work.next_group_id,
            samples_by_fate=dict(totals.samples_by_fate),
            tokens_by_fate=dict(totals.tokens_by_fate),
        )

    def _train_again(self, now_s: float) -> None:
        self._training.reopen()
        self._evaluation.abandon()
        self.phase, self._stop_reason, self._told_by_s = Phase.STARTING, FINISHED, None
        if self.num_steps or self._training.cursor:
            self.phase = Phase.TRAINING
            self._training.begin(now_s)

    def explains(self, policy_version: int) -> bool:
        """Whether a learner at this version can have got there from here, and can be told all that follows."""
        return self._training.explains(policy_version)

    @property
    def may_start_over(self) -> bool:
        """Whether no generator can have a version, which it would not give back: no learner of this life was told to go
        on. What generators say to have is not enough to know: one that is silent may have a later one."""
        return not self._training.has_begun

    def take_peers_of(self, other: "ShaperState") -> None:
        """This state takes the place of another one, and the processes that were up are up. What they had of the other
        one is not for this one."""
        self._incarnations, self._greetings = other._incarnations, other._greetings
        self.work.take_peers_of(other.work)

    def abandon(self, now_s: float) -> list[Output]:
        """What has not been acknowledged by the end of a stop is lost."""
        self._lose_the_rest("unacknowledged_at_stop")
        return self._advance(now_s)

    def _lose_the_rest(self, reason: str) -> None:
        self._training.abandon()
        self.work.generators.owing.clear()
        for sample in self.work.samples():
            if sample.stage is not Stage.ENDED:
                self.work.end(sample, "lost", reason)

    # --- from generators -------------------------------------------------------------------------------------

    def _tokens_decoded(self, peer: str, message: TokensDecoded, now_s: float) -> None:
        self.work.totals.num_tokens_received += len(message.token_ids)
        self.work.totals.tokens_by_generator[peer][self._incarnations[peer]] += len(message.token_ids)
        version, token_ids, logprobs = message.policy_version, message.token_ids, message.logprobs
        sample_ids, counts, begin = message.sample_ids.tolist(), message.num_tokens.tolist(), 0
        for sample_id, sample, count in zip(sample_ids, self.work.all_owned(peer, sample_ids), counts, strict=True):
            end = begin + count
            if sample is not None:
                sample.append(version, token_ids[begin:end], logprobs[begin:end])
            else:  # it was given to another generator while this one was silent
                self.work.totals.tokens_by_fate["lost"] += count
                self._record(Send(peer, Cancel(sample_id)))
            begin = end
        seat = self.work.generators.seat(peer)
        if self.planner.pace is not None and seat is not None:
            self.planner.pace.reported(
                peer, sample_ids, counts, held=seat.sample_ids, num_slots=seat.num_slots, now_s=now_s
            )

    def _sample_finished(self, peer: str, message: SampleFinished) -> None:
        sample = self.work.owned(peer, message.sample_id)
        if sample is None:
            return
        assert message.num_tokens == sample.num_tokens, (message, sample.num_tokens)
        self.work.release(sample)
        if sample.stage is Stage.CANCELLING:  # the cancel came too late, the decision stands
            self.work.end(sample, sample.end_fate, sample.end_reason)
            return
        self._finish_sample(sample, message.finish_reason)

    def _finish_sample(self, sample: Sample, reason: FinishReason) -> None:
        """A sample has come to the end of its response, and is judged."""
        group = self.work.group_of(sample)
        group.finish(sample, reason)
        self.work.judge(sample)
        self._decide(group)

    def _sample_cancelled(self, peer: str, message: SampleCancelled) -> None:
        sample = self.work.owned(peer, message.sample_id)
        if sample is not None and sample.stage is Stage.CANCELLING:
            assert message.num_tokens == sample.num_tokens, (message, sample.num_tokens)
            self.work.end(sample, sample.end_fate, sample.end_reason)

    def _sample_rejected(self, peer: str, message: SampleRejected) -> None:
        sample = self.work.owned(peer, message.sample_id)
        if sample is None:
            return
        self.work.release(sample)
        if sample.stage is Stage.CANCELLING:
            self.work.end(sample, sample.end_fate, sample.end_reason)
            return
        group = self.work.group_of(sample)
        self._training.rejected(group)
        self._fail(sample, "rejected_by_engine")

    def _weights_applied(self, peer: str, message: WeightsApplied, now_s: float) -> None:
        self.work.generators.applied(peer, message.policy_version)
        self._record(WeightsAcknowledged(peer, self._incarnations[peer], message.policy_version))
        if self.planner.pace is not None:
            self.planner.pace.paused(peer, now_s)

    # --- from reward processes -------------------------------------------------------------------------------

    def _sample_scored(self, peer: str, message: SampleScored) -> bool:
        """False if nothing follows from it: the group waits for others."""
        sample = self._judged(peer, message.sample_id)
        if sample is None:
            return False
        self.work.totals.rewards.num_scored += 1
        sample.reward = message.reward
        sample.to(Stage.SCORED)
        group = self.work.group_of(sample)
        self._decide(group)
        return bool(self.work.out) or not group.undecided

    def _score_failed(self, peer: str, message: ScoreFailed) -> None:
        sample = self._judged(peer, message.sample_id)
        if sample is not None:
            if self.work.totals.rewards.failed(message.kind, message.error):
                self._record(Send(LAUNCHER, RewardFailed(message.sample_id, message.kind, message.error)))
            self._fail(sample, f"reward_{message.kind}")

    def _judged(self, peer: str, sample_id: int) -> Sample | None:
        """The sample that this reward process has just answered for, if the answer still matters."""
        known = self.work.rewards.done(peer, sample_id)
        sample = self.work.sample(sample_id)
        return sample if known and sample is not None and sample.stage is Stage.FINISHED else None

    def _fail(self, sample: Sample, reason: str) -> None:
        """The sample has no reward, which is not a reward of zero."""
        sample.end_reason = reason
        sample.to(Stage.UNSCORABLE)
        self._decide(self.work.group_of(sample))

    # --- from the learner ------------------------------------------------------------------------------------

    def _learner_said(self, message: LearnerToShaper, now_s: float) -> None:
        match message:
            case LearnerReady():
                self._learner_ready(message, now_s)
            case GroupsCommitted():
                self._groups_committed(message, now_s)
            case VersionPublished():
                self.work.generators.published(message.policy_version)
                self._record(VersionSeen(message.policy_version))
                if self._training_goes_on:
                    self._evaluation.published(message.policy_version)
            case VersionSaved():
                self._training.taken.saved(message.policy_version, message.oldest_kept)

    def _learner_ready(self, message: LearnerReady, now_s: float) -> None:
        version, taken = message.policy_version, self._training.taken
        if self.phase is Phase.FINISHED:
            return
        if not taken.can_rewind(version):
            self._take_up_again(version, taken.oldest_kept)
            return
        for unheard in self._training.unheard(version):
            self._groups_committed(unheard, now_s)
        self._training.learner_ready(version)

    def _take_up_again(self, policy_version: int, oldest_kept: int) -> None:
        """Later checkpoints have turned out damaged one after the other. A run that stops needs no learner for that."""
        self._training.learner_up = False
        if self.phase is not Phase.STOPPING:
            reason = (
                f"the learner came back at version {policy_version}, the groups from there on were given up after a "
                f"checkpoint of version {oldest_kept}, and generators may decode under later versions"
            )
            self._record(Send(LAUNCHER, TakeUpAgain(reason)))

    def _groups_committed(self, message: GroupsCommitted, now_s: float) -> None:
        before = self._training.taken.position
        metrics = self._training.committed(message, now_s)
        if self._training.taken.position > before:
            self._add_to_checkpoint(message.step + 1)
        if metrics is not None:
            metrics |= self.planner.metrics()
            metrics |= {f"tokens/{fate}": float(n) for fate, n in self.work.totals.tokens_by_fate.items()}
            metrics["run/failed_rewards"] = float(self.work.totals.rewards.num_failed)
            self._record(Send(LAUNCHER, StepCompleted(message.step, metrics)))

    def _add_to_checkpoint(self, policy_version: int) -> None:
        """Where a checkpoint is written, it holds what is known here after that event: see `to_checkpoint`, which
        `Standing` puts into the message."""
        if self._config.learner.is_saved(policy_version):
            self._record(Send(LEARNER.first, ShaperSnapshot(policy_version, b"")))

    # --- decisions on one group ------------------------------------------------------------------------------

    def _decide(self, group: Group) -> None:
        """A sample of the group has finished, failed or got its reward."""
        if group.purpose == "train":
            self._training.decide(group)
        else:
            self._evaluation.decide(group)

    # --- what follows from any event -------------------------------------------------------------------------

    def _advance(self, now_s: float) -> list[Output]:
        self._training.advance(now_s)
        report = self._evaluation.close()
        if report is not None:
            self._record(Send(LAUNCHER, report))
        self._change_phase(now_s)
        self.work.judge_waiting()
        self.work.place()
        while self.work.has_room and self._admit(now_s):
            self.work.place()
        return self._take()

    @property
    def _training_goes_on(self) -> bool:
        return self.phase is Phase.TRAINING and self.num_steps < self._config.learner.steps

    def _admit(self, now_s: float) -> bool:
        """Open a group if an evaluation wants one, or training and the window allows it."""
        lowest = self.work.generators.lowest_version
        assert lowest is not None
        floor = min(lowest, self.num_steps)  # a generator may tell of a version before the learner tells of its step
        prompt = self._evaluation.next_prompt(alone=not self._training_goes_on)
        if prompt is not None:
            num_samples = self._config.evaluation.samples_per_prompt
            self._evaluation.opened(self._open(prompt, "evaluate", num_samples, floor, now_s))
            return True
        launch = self._training.next_launch(floor) if self.phase is Phase.TRAINING else None
        if launch is None:
            return False
        self._training.opened(self._open(launch.prompt, "train", launch.num_samples, floor, now_s), launch)
        return True

    def _open(self, prompt: Prompt, purpose: Purpose, num_samples: int, floor: int, now_s: float) -> Group:
        group = self.work.open(prompt, purpose, num_samples, floor, now_s)
        self._record(GroupOpened(group.group_id, prompt.prompt_id, purpose, num_samples, floor, self._training.cursor))
        return group

    def _change_phase(self, now_s: float) -> None:
        lowest = self.work.generators.lowest_version
        match self.phase:
            case Phase.STARTING if self._training.learner_up and self.work.rewards.num_up and lowest is not None:
                self.phase = Phase.EVALUATING_BEFORE
                self._evaluation.begin(self.num_steps)
            case Phase.STOPPING if not self.work.groups and self._is_told(now_s):
                self._finish()
            case _ if self._evaluation.under_way or self._training_goes_on:
                return
            case Phase.EVALUATING_BEFORE:
                self.phase = Phase.TRAINING
                self._training.begin(now_s)
            case Phase.TRAINING if lowest == self.num_steps:
                self.phase = Phase.EVALUATING_AFTER
                self._evaluation.begin(self.num_steps)
            case Phase.EVALUATING_AFTER if (
                not self.work.groups
                and self._training.learner_up
                and self._training.taken.durable == self._training.taken.position == self.num_steps
                and self._is_told(now_s)
            ):
                self._finish()
            case _:
                return
        self._change_phase(now_s)  # without held-out prompts an evaluation ends as it begins

    def _is_told(self, now_s: float) -> bool:
        """Every token that was decoded is known of. A generator that was not heard of while others did its work comes
        back with what it had decoded by then: without it, the end would be told and the tokens would not add up."""
        if not self.work.generators.owing:
            return True
        if self._told_by_s is None:
            self._told_by_s = now_s + TOLD_WITHIN_S
        return now_s >= self._told_by_s

    def _finish(self) -> None:
        self.phase = Phase.FINISHED
        if self._stop_reason != FINISHED and self.num_steps:  # the learner leaves a checkpoint of this version
            self._record(Send(LEARNER.first, ShaperSnapshot(self.num_steps, b"")))
        totals = self.work.totals
        message = RunFinished(
            reason=self._stop_reason,
            tokens_by_fate=dict(totals.tokens_by_fate),
            samples_by_fate=dict(totals.samples_by_fate),
            tokens_by_staleness=dict(totals.tokens_by_staleness),
            num_steps=self.num_steps,
            tokens_by_generator={name: dict(counts) for name, counts in totals.tokens_by_generator.items()},
            num_rewards=totals.rewards.num_scored + totals.rewards.num_failed,
            failed_rewards=dict(totals.rewards.num_by_kind),
            first_failures=dict(totals.rewards.first_by_kind),
        )
        self._record(Send(LAUNCHER, message))

    def _lose(self, peer: str, *, is_gone: bool) -> None:
        if peer == LEARNER.first:
            self._training.learner_up = False
        if self.planner.pace is not None:
            self.planner.pace.forget(peer)
        for sample, reason in self.work.lose(peer, is_gone=is_gone):
            if sample.stage is Stage.WAITING:  # what was decided about one may have cancelled the next
                self._finish_sample(sample, reason)

    def _record(self, output: Output) -> None:
        self.work.out.append(output)

    def _take(self) -> list[Output]:
        out, self.work.out = self.work.out, []
        return out

    # --- invariants ------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """What holds between any two calls; the parts have their own."""
        self.work.validate()
        if self.phase not in (Phase.STOPPING, Phase.FINISHED):
            self._training.validate()
            self._evaluation.validate()
