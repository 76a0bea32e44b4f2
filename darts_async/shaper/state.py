"""The shaper as a pure state machine: messages in, messages and ledger records out.

No clock, socket, log, task or random source inside; time and seeds are arguments. The same object runs in the
process, in simulation and under Hypothesis. Each method makes one decision completely and returns what to do about
it; `validate` states the invariants and holds between any two calls.

A training group is opened when the staleness window and the generators have room, complete when its rule has nothing
left to wait for, shipped when the window lets it into the next step, and done when the learner has committed it.
With `overcommit` there are spare groups beside those in the window: one that completes takes the place of one that has
not, which becomes a spare in its turn; spares too old for any step are cut, and their prompts asked again.
Samples of a generator that is gone go on elsewhere behind the tokens that were streamed.
"""

from collections import Counter, deque
from enum import Enum, auto

import numpy as np

from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.prompts.source import Prompt, PromptSource
from darts_async.protocol import (
    Cancel,
    EvaluationCompleted,
    GeneratorReady,
    GeneratorToShaper,
    Greet,
    GroupsCommitted,
    LearnerReady,
    LearnerToShaper,
    RewardReady,
    RewardToShaper,
    RunFinished,
    SampleCancelled,
    SampleFinished,
    SampleRejected,
    SampleScored,
    ScoreFailed,
    StepCompleted,
    TokensDecoded,
    VersionPublished,
    WeightsApplied,
)
from darts_async.shaper.accounting import StepStatistics
from darts_async.shaper.group import Fate, Group, Purpose, Sample, Stage, train_group
from darts_async.shaper.history import History
from darts_async.shaper.ledger import GroupDropped, GroupOpened, GroupShipped, VersionSeen
from darts_async.shaper.planner import Planner
from darts_async.shaper.staleness import StalenessWindow
from darts_async.shaper.workload import Forget, Output, Send, Workload

LEARNER = "learner/0"
LAUNCHER = "launcher"
MAX_RETRIES_PER_PROMPT = 3
"""A prompt whose groups came to nothing this often is left until the source brings it again."""

MAX_DROPPED_IN_A_ROW = 200
"""Without a complete group in between: the run cannot go on."""

Incoming = GeneratorToShaper | RewardToShaper | LearnerToShaper


class Phase(Enum):
    """What the run is doing."""

    STARTING = auto()
    EVALUATING_BEFORE = auto()
    TRAINING = auto()
    EVALUATING_AFTER = auto()
    STOPPING = auto()
    FINISHED = auto()


class ShaperState:
    """All that the shaper knows and decides."""

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptSource,
        held_out: tuple[Prompt, ...],
        history: History | None = None,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._held_out = held_out if config.evaluation.samples_per_prompt else ()
        self.planner = Planner(config, history or History())
        self._num_train_groups = config.learner.steps * config.learner.groups_per_step
        self._window = StalenessWindow(
            groups_per_step=config.learner.groups_per_step, max_staleness=config.staleness.max_staleness
        )
        self.phase = Phase.STARTING
        self.work = Workload(config)
        self._incarnations: dict[str, int] = {}
        self._greetings: dict[str, int] = {}
        self._learner_up = False
        self._learner_fed_s = 0.0
        self._complete: dict[int, Group] = {}
        self._shipped: dict[int, Group] = {}
        self._spares: dict[int, Group] = {}
        self._max_spares = round((config.shaping.overcommit - 1) * config.max_open_groups)
        self._requeued: deque[Prompt] = deque()
        self._retries: Counter[int] = Counter()
        self._num_dropped_in_a_row = 0
        self._evaluated: list[tuple[int, Sample]] = []
        self._statistics = StepStatistics()
        self.num_steps = 0
        self._stop_reason = "finished"

    # --- events ----------------------------------------------------------------------------------------------

    def handle(self, peer: str, message: Incoming, now_s: float) -> list[Output]:
        """A message of a peer."""
        match message:
            case TokensDecoded():
                self._tokens_decoded(peer, message)
                return self._take()  # tokens alone open and close nothing
            case SampleFinished():
                self._sample_finished(peer, message)
            case SampleCancelled():
                self._sample_cancelled(peer, message)
            case SampleScored():
                self._sample_scored(peer, message)
            case WeightsApplied():
                self.work.generators.applied(peer, message.policy_version)
            case GeneratorReady():
                if message.greeting == self._greetings.get(peer):
                    self.work.generators.join(peer, message.num_slots + self._config.generator.max_queued)
            case SampleRejected():
                self._sample_rejected(peer, message)
            case ScoreFailed():
                self._score_failed(peer, message)
            case RewardReady():
                self.work.rewards.join(peer)
            case LearnerReady():
                self._learner_ready(message)
            case GroupsCommitted():
                self._groups_committed(message, now_s)
            case VersionPublished():
                self.work.generators.published(message.policy_version)
                self._record(VersionSeen(message.policy_version))
        return self._advance(now_s)

    def peer_up(self, peer: str, incarnation: int, now_s: float) -> list[Output]:
        """A peer is connected, anew or again. Whatever it had is taken back, and it is asked to announce itself."""
        self._lose(peer)
        if self._incarnations.get(peer, incarnation) != incarnation:
            self._record(Forget(peer))
        self._incarnations[peer] = incarnation
        self._greetings[peer] = self._greetings.get(peer, 0) + 1
        self._record(Send(peer, Greet(self._greetings[peer])))
        return self._advance(now_s)

    def peer_lost(self, peer: str, now_s: float) -> list[Output]:
        """A peer is gone or has been silent for too long."""
        self._lose(peer)
        return self._advance(now_s)

    def tick(self, now_s: float) -> list[Output]:
        """Time has passed: tails have grown, and a group that alone keeps the learner waiting for too long is cut."""
        if self._config.shaping.pruning.mode == "hazard":
            for running in [g for g in self.work.groups.values() if g.purpose == "train" and g.undecided]:
                self._decide(running)
        patience_s = self._config.staleness.cut_after_s
        if self.phase is Phase.TRAINING and now_s - self._learner_fed_s > patience_s:
            group = self._blocking_group()
            if group is not None and now_s - group.opened_s > patience_s:
                self._give_up(group, fate="stale", reason="kept_learner_waiting")
                self._learner_fed_s = now_s
        return self._advance(now_s)

    def stop(self, reason: str, now_s: float) -> list[Output]:
        """End early: nothing new is opened, what runs is cancelled, and full steps are still committed."""
        if self.phase not in (Phase.STOPPING, Phase.FINISHED):
            self.phase, self._stop_reason = Phase.STOPPING, reason
            self._complete.clear()
            self._spares.clear()
            for group in list(self.work.groups.values()):
                if group.step is None or group.step == self._window.next_step:
                    self._shipped.pop(group.group_id, None)
                    self._end_all(group, "filtered", "run_stopped", cancel_fate="cancelled")
        return self._advance(now_s)

    def abandon(self, now_s: float) -> list[Output]:
        """What has not been acknowledged by the end of a stop is lost."""
        self._shipped.clear()
        for sample in self.work.samples():
            if sample.stage is not Stage.ENDED:
                self.work.end(sample, "lost", "unacknowledged_at_stop")
        return self._advance(now_s)

    # --- from generators -------------------------------------------------------------------------------------

    def _tokens_decoded(self, peer: str, message: TokensDecoded) -> None:
        self.work.totals.num_tokens_received += len(message.token_ids)
        ends = np.cumsum(message.num_tokens).tolist()
        begin = 0
        for sample_id, end in zip(message.sample_ids.tolist(), ends, strict=True):
            sample = self.work.owned(peer, sample_id)
            if sample is not None:
                sample.append(message.policy_version, message.token_ids[begin:end], message.logprobs[begin:end])
            else:  # it was given to another generator while this one was silent
                self.work.totals.tokens_by_fate["lost"] += end - begin
                self._record(Send(peer, Cancel(sample_id)))
            begin = end

    def _sample_finished(self, peer: str, message: SampleFinished) -> None:
        sample = self.work.owned(peer, message.sample_id)
        if sample is None:
            return
        assert message.num_tokens == sample.num_tokens, (message, sample.num_tokens)
        self.work.release(sample)
        if sample.stage is Stage.CANCELLING:  # the cancel came too late, the decision stands
            self.work.end(sample, sample.end_fate, sample.end_reason)
            return
        group = self.work.group_of(sample)
        group.finish(sample, message.finish_reason)
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
        self._retries[group.prompt.prompt_id] = MAX_RETRIES_PER_PROMPT  # it would be rejected again
        self._fail(sample, "rejected_by_engine")

    # --- from reward processes -------------------------------------------------------------------------------

    def _sample_scored(self, peer: str, message: SampleScored) -> None:
        sample = self._judged(peer, message.sample_id)
        if sample is not None:
            sample.reward, sample.stage = message.reward, Stage.SCORED
            self._decide(self.work.group_of(sample))

    def _score_failed(self, peer: str, message: ScoreFailed) -> None:
        sample = self._judged(peer, message.sample_id)
        if sample is not None:
            self._fail(sample, f"reward_{message.kind}")

    def _judged(self, peer: str, sample_id: int) -> Sample | None:
        """The sample that this reward process has just answered for, if the answer still matters."""
        known = self.work.rewards.done(peer, sample_id)
        sample = self.work.sample(sample_id)
        return sample if known and sample is not None and sample.stage is Stage.FINISHED else None

    def _fail(self, sample: Sample, reason: str) -> None:
        """The sample has no reward, which is not a reward of zero."""
        sample.stage, sample.end_reason = Stage.UNSCORABLE, reason
        self._decide(self.work.group_of(sample))

    # --- from the learner ------------------------------------------------------------------------------------

    def _learner_ready(self, message: LearnerReady) -> None:
        self._learner_up = True
        for group in self._shipped.values():  # what it already has it drops by group id
            if group.step is not None and group.step >= message.policy_version:
                self._record(Send(LEARNER, train_group(group)))

    def _groups_committed(self, message: GroupsCommitted, now_s: float) -> None:
        groups = [self._shipped.pop(g) for g in message.group_ids.tolist() if g in self._shipped]
        if not groups:  # told twice
            return
        metrics = self._statistics.close(message.step, groups)
        for group in groups:
            for sample, _ in group.kept or []:
                self.work.totals.trained(sample, message.step)
                self.work.end(sample, "trained", "committed", step=message.step)
        self.num_steps = message.step + 1
        self._learner_fed_s = now_s
        metrics |= {f"tokens/{fate}": float(n) for fate, n in self.work.totals.tokens_by_fate.items()}
        self._record(Send(LAUNCHER, StepCompleted(message.step, metrics)))

    # --- decisions on one group ------------------------------------------------------------------------------

    def _decide(self, group: Group) -> None:
        """A sample of the group has finished, failed or got its reward: whom to cancel, and is it complete?"""
        if group.purpose == "train":
            for sample in self.planner.rule(group).to_cancel(group, self._config.seed):
                self.work.cancel(sample, "cancelled", self._config.shaping.rule)
            for sample in self.planner.tail_to_prune(group):
                self.work.cancel(sample, "cancelled", "hazard")
        if not group.undecided:
            complete = self._complete_training if group.purpose == "train" else self._complete_evaluation
            complete(group)

    def _complete_training(self, group: Group) -> None:
        kept = self.planner.weighed(group, self.planner.rule(group).select(group))
        if len(kept) < self._config.shaping.keep:
            self._give_up(group, fate="filtered", reason="too_few_rewards")
            return
        group.kept = kept
        self._statistics.completed(group, self.planner.tercile(group))
        self.planner.observe(group)
        if group.group_id not in self._spares:
            self._complete[group.group_id] = group
            self._window.set_floor(group.group_id, group.oldest_kept_version)
        self._num_dropped_in_a_row = 0
        self._retries.pop(group.prompt.prompt_id, None)
        chosen = {sample.sample_id for sample, _ in kept}
        for sample in group.at(Stage.SCORED, Stage.UNSCORABLE):
            if sample.sample_id not in chosen:
                self.work.end(sample, "filtered", sample.end_reason or "not_selected")

    def _complete_evaluation(self, group: Group) -> None:
        for sample in group.samples:
            if sample.stage is Stage.SCORED:
                self._evaluated.append((group.prompt.prompt_id, sample))
                self.work.end(sample, "evaluated", "held_out")
            else:
                self.work.end(sample, "filtered", sample.end_reason)

    def _give_up(self, group: Group, *, fate: Fate, reason: str) -> None:
        """A group comes to nothing; its prompt is asked again, but not for ever."""
        if self._spares.pop(group.group_id, None) is None:
            self._window.drop(group.group_id)
        self._num_dropped_in_a_row += 1
        if self._num_dropped_in_a_row > MAX_DROPPED_IN_A_ROW:
            raise DataError(
                f"{self._num_dropped_in_a_row} groups came to nothing one after another, the last because of "
                f"{reason!r}: no step can be filled; the logs of reward and generator say why"
            )
        if self._retries[group.prompt.prompt_id] < MAX_RETRIES_PER_PROMPT:
            self._retries[group.prompt.prompt_id] += 1
            self._requeued.append(group.prompt)
        self._drop(group, fate=fate, reason=reason)

    def _drop(self, group: Group, *, fate: Fate, reason: str) -> None:
        """End a training group that is neither in the window nor a spare any more."""
        self._statistics.dropped(group.group_id, self.planner.tercile(group))
        if group.kept is None:
            self.planner.observe(group)
        self._record(GroupDropped(group.group_id, reason))
        self._end_all(group, fate, reason, cancel_fate=fate)

    def _end_all(self, group: Group, fate: Fate, reason: str, *, cancel_fate: Fate) -> None:
        for sample in group.samples:
            if sample.stage in (Stage.WAITING, Stage.DECODING):
                self.work.cancel(sample, cancel_fate, reason)
            elif sample.stage not in (Stage.CANCELLING, Stage.ENDED):
                self.work.end(sample, fate, sample.end_reason or reason)

    def _blocking_group(self) -> Group | None:
        """The slowest group, if it alone keeps the learner and others waiting."""
        size = self._config.learner.groups_per_step
        groups = self._undecided()
        learner_waits = self._learner_up and len(self._shipped) < size
        others_wait = bool(self._complete) or (len(groups) == 1 and self._window.num_shipped % size > 0)
        return min(groups, key=self._urgency) if groups and learner_waits and others_wait else None

    def _undecided(self) -> list[Group]:
        """Groups in the window that are still waited for."""
        return [
            group
            for group in self.work.groups.values()
            if group.purpose == "train" and group.undecided and group.group_id not in self._spares
        ]

    def _urgency(self, group: Group) -> tuple[int, int]:
        return self._window.deadline(group.group_id), group.group_id

    # --- what follows from any event -------------------------------------------------------------------------

    def _advance(self, now_s: float) -> list[Output]:
        self._use_spares()
        self._ship(now_s)
        self._cut_spares()
        self._change_phase(now_s)
        self.work.judge_waiting()
        self.work.place()
        self._admit(now_s)
        return self._take()

    def _ship(self, now_s: float) -> None:
        """Complete groups go to the learner, the most urgent first, while the window allows."""
        if not self._learner_up:
            return
        while self._complete:
            group = min(self._complete.values(), key=self._urgency)
            if not self._window.may_ship(group.group_id):
                return  # nor may any later one, which would leave this one waiting as well
            group.step = self._window.ship(group.group_id)
            self._shipped[group.group_id] = self._complete.pop(group.group_id)
            self._record(GroupShipped(group.group_id, group.step))
            self._record(Send(LEARNER, train_group(group)))
            self._learner_fed_s = now_s

    def _admit(self, now_s: float) -> None:
        """Open groups while generators have room and the window allows."""
        while self.phase is Phase.TRAINING and self.work.has_room:
            floor = self.work.generators.lowest_version
            assert floor is not None
            num_unfinished = self._window.num_shipped + self._window.num_open
            if num_unfinished < self._num_train_groups and self._window.may_admit(floor):
                asked_again = bool(self._requeued)
                prompt = self._requeued.popleft() if asked_again else self._prompts.draw()
                group = self._open_training(prompt, floor, now_s)
                group.asked_again = asked_again
                self._window.admit(group.group_id, floor)
            elif len(self._spares) < self._max_spares and not self._is_too_late(floor):
                group = self._open_training(self._prompts.draw(), floor, now_s)
                self._spares[group.group_id] = group
            else:
                return
            self.work.place()

    def _open_training(self, prompt: Prompt, floor: int, now_s: float) -> Group:
        group = self._open(prompt, self.planner.num_samples(prompt.prompt_id), floor, now_s)
        group.baseline = self.planner.baseline(prompt.prompt_id)
        return group

    def _is_too_late(self, floor: int) -> bool:
        """Whether no step may take a group whose oldest token is of version `floor`."""
        step = self._window.next_step
        return step >= self._config.learner.steps or floor + self._config.staleness.max_staleness < step

    def _use_spares(self) -> None:
        """Complete spares take places in the window: free ones, or those of groups that are still waited for."""
        for spare in [g for g in self._spares.values() if g.kept is not None]:
            floor = spare.oldest_kept_version
            if self._window.num_shipped + self._window.num_open < self._num_train_groups and self._enter(spare, floor):
                continue
            for rival in sorted(self._undecided(), key=lambda g: (-self._window.deadline(g.group_id), -g.group_id)):
                if not rival.asked_again and self._replace(rival, spare, floor):
                    break

    def _enter(self, spare: Group, floor: int) -> bool:
        """The spare joins the window, if that has a place for it."""
        if not self._window.may_admit(floor):
            return False
        self._window.admit(spare.group_id, floor)
        self._complete[spare.group_id] = self._spares.pop(spare.group_id)
        return True

    def _replace(self, rival: Group, spare: Group, floor: int) -> bool:
        """The spare takes the place of a rival, which becomes a spare, if everyone else still meets its deadline."""
        deadline = self._window.deadline(rival.group_id)
        self._window.drop(rival.group_id)
        if self._enter(spare, floor):
            self._spares[rival.group_id] = rival
            return True
        self._window.admit(rival.group_id, deadline - self._config.staleness.max_staleness)
        return False

    def _cut_spares(self) -> None:
        """Spares that no step may take any more, and all when the last step is filled."""
        for spare in list(self._spares.values()):
            if self._is_too_late(spare.floor if spare.kept is None else spare.oldest_kept_version):
                del self._spares[spare.group_id]
                self._requeued.append(spare.prompt)
                self._drop(spare, fate="cancelled", reason="overcommitted")

    def _open(self, prompt: Prompt, num_samples: int, floor: int, now_s: float) -> Group:
        purpose: Purpose = "train" if self.phase is Phase.TRAINING else "evaluate"
        group = self.work.open(prompt, purpose, num_samples, floor, now_s)
        self._record(
            GroupOpened(group.group_id, prompt.prompt_id, group.purpose, num_samples, floor, self._prompts.cursor)
        )
        return group

    def _change_phase(self, now_s: float) -> None:
        lowest = self.work.generators.lowest_version
        match self.phase:
            case Phase.STARTING if self._learner_up and self.work.rewards.num_up and lowest is not None:
                self._begin_evaluation(Phase.EVALUATING_BEFORE, lowest, now_s)
            case Phase.EVALUATING_BEFORE if not self.work.groups:
                self._report_evaluation()
                self.phase, self._learner_fed_s = Phase.TRAINING, now_s
            case Phase.TRAINING if self.num_steps == self._config.learner.steps == lowest:
                self._begin_evaluation(Phase.EVALUATING_AFTER, lowest, now_s)
            case Phase.EVALUATING_AFTER if not self.work.groups:
                self._report_evaluation()
                self._finish()
            case Phase.STOPPING if not self.work.groups:
                self._finish()
            case _:
                return
        self._change_phase(now_s)  # without held-out prompts an evaluation ends as it begins

    def _begin_evaluation(self, phase: Phase, floor: int, now_s: float) -> None:
        self.phase = phase
        for prompt in self._held_out:
            self._open(prompt, self._config.evaluation.samples_per_prompt, floor, now_s)

    def _report_evaluation(self) -> None:
        evaluated = sorted(self._evaluated, key=lambda pair: pair[1].sample_id)
        samples = [sample for _, sample in evaluated]
        if samples:
            report = EvaluationCompleted(
                policy_version=self.num_steps,
                prompt_ids=np.array([prompt_id for prompt_id, _ in evaluated], np.int64),
                rewards=np.array([s.reward for s in samples], np.float32),
                num_tokens=np.array([s.num_tokens for s in samples], np.int32),
            )
            self._record(Send(LAUNCHER, report))
        self._evaluated = []

    def _finish(self) -> None:
        self.phase = Phase.FINISHED
        totals = self.work.totals
        message = RunFinished(
            reason=self._stop_reason,
            tokens_by_fate=dict(totals.tokens_by_fate),
            samples_by_fate=dict(totals.samples_by_fate),
            tokens_by_staleness=dict(totals.tokens_by_staleness),
            num_steps=self.num_steps,
        )
        self._record(Send(LAUNCHER, message))

    def _lose(self, peer: str) -> None:
        if peer == LEARNER:
            self._learner_up = False
        self.work.lose(peer)

    def _record(self, output: Output) -> None:
        self.work.out.append(output)

    def _take(self) -> list[Output]:
        out, self.work.out = self.work.out, []
        return out

    # --- invariants ------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """What holds between any two calls; the parts have their own."""
        self.work.validate()
        self._window.validate()
        if self.phase in (Phase.STOPPING, Phase.FINISHED):
            return
        groups = [g for g in self.work.groups.values() if g.purpose == "train"]
        num_open = len(self._undecided()) + len(self._complete)
        assert len(self._spares) <= self._max_spares, len(self._spares)
        assert not self._spares.keys() & self._complete.keys()
        assert num_open == self._window.num_open, (num_open, self._window.num_open)
        assert self._window.num_open + len(self._shipped) <= self._config.max_open_groups
        for group in groups:
            assert not (group.undecided and group.kept), group.group_id
        for group in [*self._complete.values(), *self._shipped.values()]:
            assert len(group.kept or []) == self._config.shaping.keep, group.group_id
        for group in self._shipped.values():
            assert group.step is not None
            assert group.step - group.oldest_kept_version <= self._config.staleness.max_staleness, group.group_id
