"""Training groups from opening to commit: which is opened, when one is complete, and when one is given up.

Groups wait in the staleness window until their rule has decided. A complete group goes to the `LearnerFeed`, which
ships it; one that is given up is dropped, and its prompt is asked again (`PromptQueue`). `Spares` are open groups
outside the window. All of it is pure: time is an argument, and what is to be sent goes to the outbox.
"""

from msgspec import Struct
from msgspec.structs import replace

from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.prompts.source import PromptSource
from darts_async.protocol import GroupsCommitted, ShaperSnapshot, StepCompleted
from darts_async.shaper.estimates.patience import Patience
from darts_async.shaper.estimates.planner import Planner
from darts_async.shaper.group import Group, Stage
from darts_async.shaper.learner_feed import LearnerFeed, LearnerFeedState
from darts_async.shaper.ledger import GroupDropped
from darts_async.shaper.open_work import OpenWork
from darts_async.shaper.outbox import Outbox
from darts_async.shaper.prompt_queue import PlannedGroup, PromptQueue, QueueState
from darts_async.shaper.spares import Spares
from darts_async.shaper.token_accounts import StepStatistics
from darts_async.shaper.window import StalenessWindow, WindowState
from darts_async.topology.outcomes import SampleOutcome

MAX_DROPPED_IN_A_ROW = 200
"""Without a complete group in between: the run cannot continue."""


class TrainingState(Struct, frozen=True):
    """What `Training` knows between two events; groups by id."""

    window: WindowState
    feed: LearnerFeedState
    spares: list[int]
    queue: QueueState
    num_dropped_in_a_row: int
    learner_fed_s: float
    statistics: StepStatistics
    group_times_s: list[float]


class Training:
    """All training groups and the staleness window."""

    def __init__(
        self, config: RunConfig, prompts: PromptSource, work: OpenWork, planner: Planner, outbox: Outbox
    ) -> None:
        self._config = config
        self._work = work
        self._planner = planner
        self._outbox = outbox
        self._window = StalenessWindow(
            groups_per_step=config.learner.groups_per_step, max_staleness=config.staleness.max_staleness
        )
        self.feed = LearnerFeed(config, self._window, outbox)
        """Complete groups on their way into the gradient."""
        self._spares = Spares(config, self._window, work.groups)
        self._queue = PromptQueue(prompts, planner.num_samples, planner.batch, planner.passes_over)
        self._num_dropped_in_a_row = 0
        self._learner_fed_s = 0.0
        self._patience = Patience(config.staleness.cut_after_s)
        self._completed_now: list[Group] = []
        """By the present event."""
        self._statistics = StepStatistics()

    # --- opening ---------------------------------------------------------------------------------------------

    @property
    def cursor(self) -> int:
        """Prompts of the source that have been asked."""
        return self._queue.cursor

    def open_group(self, floor: int, now_s: float) -> bool:
        """Open a group whose tokens will be of version `floor` or later, in the window or as a spare, if there is a
        place for one. Returns whether there was."""
        num_groups = self._config.learner.steps * self._config.learner.groups_per_step
        if self._window.num_shipped + self._window.num_open < num_groups and self._window.may_admit(floor):
            group = self._open(self._queue.next(), floor, now_s)
            self._window.admit(group.group_id, floor)
            self._spares.add_rival(group)
            return True
        if self._spares.has_room(floor):
            self._spares.add(self._open(self._queue.fresh(), floor, now_s))
            return True
        return False

    def _open(self, planned: PlannedGroup, floor: int, now_s: float) -> Group:
        group = self._work.open(
            planned.prompt, "train", planned.num_samples, floor=floor, cursor=self.cursor, now_s=now_s
        )
        group.baseline = self._planner.baseline(planned.prompt.prompt_id)
        group.asked_again = planned.asked_again
        return group

    # --- one group -------------------------------------------------------------------------------------------

    def decide(self, group: Group) -> None:
        """A sample has finished, failed, got its reward or grown: cancel others, or complete the group."""
        for sample in self._planner.rule(group).to_cancel(group):
            self._work.cancel(sample, "cancelled", self._config.shaping.rule)
        for sample in self._planner.tail_to_prune(group):
            self._work.cancel(sample, "cancelled", "hazard")
        if not group.undecided:
            self._complete_group(group)

    def rejected(self, group: Group) -> None:
        """The engine cannot decode this prompt."""
        self._queue.rejected(group.prompt.prompt_id)

    def _complete_group(self, group: Group) -> None:
        kept = self._planner.weighed(group, self._planner.rule(group).select(group))
        if len(kept) < self._config.shaping.smallest_group:
            self._give_up(group, outcome="filtered", reason="too_few_rewards")
            return
        group.weights = {sample.sample_id: weight for sample, weight in kept}
        self._completed_now.append(group)
        self._statistics.completed(group, self._planner.tercile(group))
        self._planner.observe(group)
        if group.group_id not in self._spares:
            self._window.set_floor(group.group_id, group.kept_floor(self.feed.num_steps))
            self.feed.add(group)
        self._num_dropped_in_a_row = 0
        self._queue.completed(group.prompt.prompt_id)
        for sample in group.at(Stage.SCORED, Stage.UNSCORABLE):
            if sample.sample_id not in group.weights:
                self._work.end(sample, "filtered", sample.end_reason or "not_selected")

    def _give_up(self, group: Group, *, outcome: SampleOutcome, reason: str) -> None:
        """A group is given up; its prompt is asked again, but not forever."""
        if not self._spares.discard(group.group_id):
            self._window.drop(group.group_id)
        self._num_dropped_in_a_row += not any(s.end_reason == "reward_unavailable" for s in group.samples)
        if self._num_dropped_in_a_row > MAX_DROPPED_IN_A_ROW:
            raise DataError(
                f"{self._num_dropped_in_a_row} groups were given up one after another, the last because of "
                f"{reason!r}: no step can be filled; " + self._why_nothing_is_trained_on()
            )
        self._queue.retry(group.prompt, len(group.samples))
        self._drop(group, outcome=outcome, reason=reason)

    def _why_nothing_is_trained_on(self) -> str:
        rewards = self._work.totals.rewards
        if not rewards.num_failed:
            return "the logs of reward and generator say why"
        smallest = self._config.shaping.smallest_group
        return f"a group is trained on {smallest} samples at least (shaping.min_keep), but {rewards.describe()}"

    def _drop(self, group: Group, *, outcome: SampleOutcome, reason: str) -> None:
        """End a training group that is neither in the window nor a spare."""
        self._statistics.dropped(group, self._planner.tercile(group))
        if group.weights is None:
            self._planner.observe(group)
        self._outbox.record(GroupDropped(group.group_id, reason))
        group.weights = None
        self._work.end_group(group, outcome, reason, cancel_outcome=outcome)

    # --- what follows from time, from any event and from a step ----------------------------------------------

    def begin(self, now_s: float) -> None:
        """Training starts now."""
        self._learner_fed_s = now_s

    def tick(self, now_s: float) -> None:
        """Tails have grown; a group that alone keeps the learner waiting for too long is cut."""
        if self._config.shaping.pruning.mode == "hazard":
            for running in [g for g in self._work.groups.values() if g.purpose == "train" and g.undecided]:
                self.decide(running)
        # Where no generator decodes, or the learner takes steps again, it does not wait for a group.
        if self._work.generators.lowest_version is None or self.feed.committed.is_behind:
            self._learner_fed_s = now_s
        patience_s = self._patience.limit_s
        if now_s - self._learner_fed_s > patience_s:
            group = self._blocking_group()
            if group is not None and now_s - group.opened_s > patience_s:
                self._patience.cut(now_s - group.opened_s)
                self._give_up(group, outcome="stale", reason="kept_learner_waiting")
                self._learner_fed_s = now_s

    def _blocking_group(self) -> Group | None:
        """The slowest group, if it alone keeps the learner and others waiting."""
        groups = self._spares.waited_for()
        is_step_begun = self._window.num_shipped % self._config.learner.groups_per_step > 0
        others_wait = self.feed.complete or (len(groups) == 1 and is_step_begun)
        if not (groups and others_wait and self.feed.is_short):
            return None
        return min(groups, key=lambda group: self._window.urgency(group.group_id))

    def advance(self, now_s: float) -> None:
        """What follows from any event: replace, ship, cut."""
        while self._completed_now:
            self._patience.took(now_s - self._completed_now.pop().opened_s)
        for spare in self._spares.use(self.feed.num_steps):
            self.feed.add(spare)
        if self.feed.ship():
            self._learner_fed_s = now_s
        for spare in self._spares.cut():
            self._queue.ask_again(spare.prompt, len(spare.samples))
            self._drop(spare, outcome="cancelled", reason="overcommitted")

    def committed(self, message: GroupsCommitted, now_s: float) -> None:
        """The learner has taken a step, for the first time or again."""
        before, step = self.feed.committed.position, message.step
        groups = self.feed.commit(message)
        metrics = dict[str, float]()
        if groups:
            counts, labels = list(map(self._planner.counts, groups)), self._config.reward.labels
            metrics = self._statistics.close(step, groups, counts, labels)
        for group in groups:
            for sample, _ in group.kept:
                self._work.totals.trained(sample, step)
                self._work.end(sample, "trained", "committed", step=step)
        if self.feed.committed.position > before and self._config.learner.is_saved(step + 1):
            self._outbox.to_learner(ShaperSnapshot(step + 1, b""))  # `ReplayableState` fills it in after this event
        if groups:
            self._learner_fed_s = now_s
            totals = self._work.totals
            metrics |= self._planner.metrics()
            metrics |= {f"tokens/{outcome}": float(n) for outcome, n in totals.tokens_by_outcome.items()}
            metrics["run/failed_rewards"] = float(totals.rewards.num_failed)
            metrics["run/groups_not_shown"] = float(self._work.rollouts.num_given_up)
            if self._config.prompts.curriculum is not None:
                metrics["prompts/passed_over"] = float(self._queue.num_passed_over)
            self._outbox.to_launcher(StepCompleted(step, metrics))

    # --- the end of a process, of a run, and what comes after it -----------------------------------------------

    def restarted(self) -> None:
        """Groups are counted again from here: the reward function may have been repaired."""
        self._num_dropped_in_a_row = 0

    def stop(self, reason: str) -> None:
        """End every group but those of full steps, which are still committed."""
        self.feed.keep_back()
        self._spares.clear()
        for group in list(self._work.groups.values()):
            if group.step is None or group.step == self._window.next_step:
                self._owe(group)
                self.feed.withdraw(group.group_id)
                group.weights = None
                self._work.end_group(group, "filtered", reason, cancel_outcome="cancelled")

    def abandon(self) -> None:
        """Nothing more will be committed."""
        for group in self.feed.withdraw_all():
            self._queue.ask_again(group.prompt, len(group.samples))

    def give_up(self) -> None:
        """No open group continues: their prompts are to be asked again."""
        self.feed.keep_back()
        self.feed.withdraw_all()
        self._spares.clear()
        for group in self._work.groups.values():
            self._owe(group)

    def _owe(self, group: Group) -> None:
        """Have its prompt asked again, unless it was trained on or given up before: such groups are here until their
        last sample is cancelled."""
        is_trained_on = group.step is not None and group.step < self.feed.num_steps
        if group.purpose == "train" and not is_trained_on and not group.is_given_up:
            self._queue.ask_again(group.prompt, len(group.samples))

    def reopen(self) -> None:
        """After a stop: no group is open, and the next step is empty."""
        self._window.reopen(self.feed.num_steps)

    # --- codec, invariants -----------------------------------------------------------------------------------

    def to_state(self) -> TrainingState:
        return TrainingState(
            window=self._window.to_state(),
            feed=self.feed.to_state(),
            spares=self._spares.to_state(),
            queue=self._queue.to_state(),
            num_dropped_in_a_row=self._num_dropped_in_a_row,
            learner_fed_s=self._learner_fed_s,
            statistics=self._statistics,
            group_times_s=self._patience.to_state(),
        )

    def to_checkpoint(self, policy_version: int) -> TrainingState:
        """For `restore`, where the learner continues from a checkpoint of this version and no open group continues."""
        window = WindowState(self.feed.num_steps * self._config.learner.groups_per_step, {})
        return replace(self.to_state(), window=window, feed=self.feed.to_checkpoint(policy_version), spares=[])

    def restore(self, state: TrainingState) -> None:
        """Continue where `to_state` was taken, the open work before."""
        self._window.restore(state.window)
        self.feed.restore(state.feed, self._work.groups)
        self._spares.restore(state.spares, state.window.floors)
        self._queue.restore(state.queue)
        self._num_dropped_in_a_row = state.num_dropped_in_a_row
        self._learner_fed_s = state.learner_fed_s
        self._statistics = state.statistics
        self._patience.restore(state.group_times_s)

    def validate(self) -> None:
        """Every group is in one place, and all that are waited for meet their deadlines."""
        self._window.validate()
        self.feed.validate()
        self._spares.validate()
        num_open = len(self._spares.waited_for()) + len(self.feed.complete)
        assert num_open == self._window.num_open, (num_open, self._window.num_open)
        assert not any(group_id in self._spares for group_id in self.feed.complete), self.feed.complete
        assert not self._completed_now, self._completed_now
        for group in self._work.groups.values():
            assert not (group.undecided and group.weights), group.group_id
