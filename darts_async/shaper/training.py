"""Training groups from admission to commit: what is opened, completed, shipped, replaced and given up.

The half of the shaper's decisions that the staleness window rules; pure like the rest. Groups wait in the window, are
`complete` until it lets them into a step, and `shipped` until the learner has committed them; after that they are kept
aside until a checkpoint holds them (see `committed_steps`). Spares are open groups
outside the window: one that completes takes the place of one that has not, which becomes a spare in its turn; spares
too old for any step are cut, and their prompts asked again, then with a place that nobody takes from them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from heapq import heappop, heappush

import msgspec
import numpy as np
from msgspec import Struct

from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.prompts.source import Prompt, PromptSource
from darts_async.protocol import CatchUp, GroupsCommitted
from darts_async.shaper.committed_steps import TakenGroup, TakenState, TakenSteps
from darts_async.shaper.estimates.patience import Patience
from darts_async.shaper.estimates.planner import Planner
from darts_async.shaper.group import Group, Stage, train_group
from darts_async.shaper.ledger import GroupDropped, GroupShipped, LearnerRewound, StepCommitted
from darts_async.shaper.prompt_queue import Launch, PromptQueue, QueueState
from darts_async.shaper.token_accounts import StatisticsState, StepStatistics
from darts_async.shaper.window import StalenessWindow, WindowState
from darts_async.shaper.workload import Send, Workload
from darts_async.topology.outcomes import Outcome
from darts_async.topology.roles import LEARNER

MAX_RETRIES_PER_PROMPT = 3
"""A prompt whose groups came to nothing this often is left until the source brings it again."""
MAX_DROPPED_IN_A_ROW = 200
"""Without a complete group in between: the run cannot go on."""


class TrainingState(Struct, frozen=True):
    """What `Training` knows between two events; groups by id."""

    window: WindowState
    complete: list[int]
    most_urgent: list[tuple[int, int]]
    shipped: list[int]
    spares: list[int]
    queue: QueueState
    retries: dict[int, int]
    num_dropped_in_a_row: int
    learner_fed_s: float
    statistics: StatisticsState
    learner_up: bool
    taken: TakenState
    taken_by_stop: list[tuple[Prompt, int]]
    group_times_s: list[float]
    has_begun: bool


class Training:
    """All training groups and the staleness window."""

    def __init__(self, config: RunConfig, prompts: PromptSource, work: Workload, planner: Planner) -> None:
        self._config = config
        self._work = work
        self._planner = planner
        self._num_train_groups = config.learner.steps * config.learner.groups_per_step
        self._window = StalenessWindow(
            groups_per_step=config.learner.groups_per_step, max_staleness=config.staleness.max_staleness
        )
        self._complete: dict[int, Group] = {}
        self._most_urgent: list[tuple[int, int]] = []
        """A heap of (deadline, group id) of the complete groups: a deadline is fixed once the group is complete."""
        self._shipped: dict[int, Group] = {}
        self._sent: dict[int, TakenGroup] = {}
        """The shipped groups as the learner was sent them."""
        self._spares: dict[int, Group] = {}
        self._rivals: dict[int, list[int]] = {}
        """By deadline, in the order of their ids: groups in the window that a spare may replace while they are waited
        for. Who is not any more is taken out when it is met."""
        self._used_at: tuple[int, int, list[int]] | None = None
        """How things stood when no spare could be used any more, see `_use_spares`."""
        self._cut_at_step = -1
        """The next step when no spare was to be cut any more."""
        self._max_spares = round((config.shaping.overcommit - 1) * config.max_open_groups)
        self._queue = PromptQueue(prompts, planner.num_samples, planner.batch)
        self._retries: Counter[int] = Counter()
        self._num_dropped_in_a_row = 0
        self._learner_fed_s = 0.0
        self._patience = Patience(config.staleness.cut_after_s)
        self._completed_now: list[Group] = []
        """By the present event."""
        self._statistics = StepStatistics()
        self._taken_by_stop: list[tuple[Prompt, int]] = []
        """Prompts, with the number of their samples, whose groups came to nothing because the run was stopped."""
        self.taken = TakenSteps()
        self.learner_up = False
        self.has_begun = False
        """A learner of this life of the run was told to go on: generators may have any version that follows."""

    # --- one group -------------------------------------------------------------------------------------------

    def decide(self, group: Group) -> None:
        """A sample has finished, failed, got its reward or grown old: whom to cancel, and is the group complete?"""
        for sample in self._planner.rule(group).to_cancel(group):
            self._work.cancel(sample, "cancelled", self._config.shaping.rule)
        for sample in self._planner.tail_to_prune(group):
            self._work.cancel(sample, "cancelled", "hazard")
        if not group.undecided:
            self._complete_group(group)

    def rejected(self, group: Group) -> None:
        """The engine cannot decode this prompt: it would be rejected again."""
        self._retries[group.prompt.prompt_id] = MAX_RETRIES_PER_PROMPT

    def _complete_group(self, group: Group) -> None:
        kept = self._planner.weighed(group, self._planner.rule(group).select(group))
        if len(kept) < self._config.shaping.smallest_group:
            self._give_up(group, fate="filtered", reason="too_few_rewards")
            return
        group.kept = kept
        self._completed_now.append(group)
        self._statistics.completed(group, self._planner.tercile(group), self._planner.counts(group))
        self._planner.observe(group)
        if group.group_id not in self._spares:
            self._window.set_floor(group.group_id, self._floor_of(group))
            self._add_complete(group)
        self._num_dropped_in_a_row = 0
        self._retries.pop(group.prompt.prompt_id, None)
        chosen = {sample.sample_id for sample, _ in kept}
        for sample in group.at(Stage.SCORED, Stage.UNSCORABLE):
            if sample.sample_id not in chosen:
                self._work.end(sample, "filtered", sample.end_reason or "not_selected")

    def _give_up(self, group: Group, *, fate: Outcome, reason: str) -> None:
        """A group comes to nothing; its prompt is asked again, but not for ever."""
        if self._spares.pop(group.group_id, None) is None:
            self._window.drop(group.group_id)
        self._num_dropped_in_a_row += 1
        if self._num_dropped_in_a_row > MAX_DROPPED_IN_A_ROW:
            raise DataError(
                f"{self._num_dropped_in_a_row} groups came to nothing one after another, the last because of "
                f"{reason!r}: no step can be filled; " + self._why_nothing_is_trained()
            )
        if self._retries[group.prompt.prompt_id] < MAX_RETRIES_PER_PROMPT:
            self._retries[group.prompt.prompt_id] += 1
            self._queue.ask_again(group.prompt, len(group.samples))
        self._drop(group, fate=fate, reason=reason)

    def _why_nothing_is_trained(self) -> str:
        rewards = self._work.totals.rewards
        if not rewards.num_failed:
            return "the logs of reward and generator say why"
        smallest = self._config.shaping.smallest_group
        return f"a group is trained on {smallest} samples at least (shaping.min_keep), but {rewards.describe()}"

    def _drop(self, group: Group, *, fate: Outcome, reason: str) -> None:
        """End a training group that is neither in the window nor a spare any more."""
        self._statistics.dropped(group.group_id, self._planner.tercile(group))
        if group.kept is None:
            self._planner.observe(group)
        self._work.out.append(GroupDropped(group.group_id, reason))
        self._end(group, fate, reason, cancel_fate=fate)

    def _end(self, group: Group, fate: Outcome, reason: str, *, cancel_fate: Outcome) -> None:
        """It comes to nothing, also where it was complete."""
        group.kept = None
        end_all(self._work, group, fate, reason, cancel_fate=cancel_fate)

    def _is_owed(self, group: Group) -> bool:
        """Whether its prompt has to be asked again if the group comes to nothing now: it was not trained, and it has
        not come to nothing before, when that was seen to. Both may be here until their last sample is cancelled."""
        is_trained = group.step is not None and group.step < self.num_steps
        return group.purpose == "train" and not is_trained and not group.is_given_up

    # --- time, the learner, the end --------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Tails have grown; a group that alone keeps the learner waiting for too long is cut."""
        if self._config.shaping.pruning.mode == "hazard":
            for running in [g for g in self._work.groups.values() if g.purpose == "train" and g.undecided]:
                self.decide(running)
        # Nobody decodes, or the learner is busy with what it has had before: no group is to blame.
        if self._work.generators.lowest_version is None or self.taken.is_behind:
            self._learner_fed_s = now_s
        patience_s = self._patience.limit_s
        if now_s - self._learner_fed_s > patience_s:
            group = self._blocking_group()
            if group is not None and now_s - group.opened_s > patience_s:
                self._patience.cut(now_s - group.opened_s)
                self._give_up(group, fate="stale", reason="kept_learner_waiting")
                self._learner_fed_s = now_s

    def restarted(self) -> None:
        """The run goes on, perhaps with a reward function that has been mended: groups are counted from here."""
        self._num_dropped_in_a_row = 0

    def begin(self, now_s: float) -> None:
        """Training starts now."""
        self._learner_fed_s = now_s

    def advance(self, now_s: float) -> None:
        """What follows from any event: replace, ship, cut."""
        while self._completed_now:
            self._patience.took(now_s - self._completed_now.pop().opened_s)
        if self._spares:
            self._use_spares()
        if self.learner_up:
            self._ship(now_s)
        if self._spares:
            self._cut_spares()

    @property
    def num_steps(self) -> int:
        """Steps that were taken, whether or not the present learner takes some of them again."""
        return self.taken.num_steps

    @property
    def num_filled_steps(self) -> int:
        """Steps for which every group was shipped: no learner can have taken more, nor made a later version."""
        return self._window.next_step

    def groups_of(self, step: int) -> list[int]:
        """The groups that the learner is to take this step with, as far as they were shipped."""
        if self.taken.is_behind:
            return self.taken.group_ids(step)
        return [group_id for group_id, group in self._shipped.items() if group.step == step]

    @property
    def cursor(self) -> int:
        """Prompts of the source that have been asked."""
        return self._queue.cursor

    def next_launch(self, floor: int) -> Launch | None:
        """A group that may be opened now, and is."""
        num_unfinished = self._window.num_shipped + self._window.num_open
        if num_unfinished < self._num_train_groups and self._window.may_admit(floor):
            return self._queue.next()
        if len(self._spares) < self._max_spares and not self._is_too_late(floor):
            return replace(self._queue.fresh(), as_spare=True)
        return None

    def opened(self, group: Group, launch: Launch) -> None:
        """The group of `next_launch` was opened."""
        group.baseline = self._planner.baseline(group.prompt.prompt_id)
        group.asked_again = launch.asked_again
        if launch.as_spare:
            self._spares[group.group_id] = group
        else:
            self._window.admit(group.group_id, group.floor)
            self._add_rival(group)

    def _add_rival(self, group: Group) -> None:
        if self._max_spares and not group.asked_again:
            self._rivals.setdefault(self._window.deadline(group.group_id), []).append(group.group_id)

    def unheard(self, policy_version: int) -> list[GroupsCommitted]:
        """The steps that a learner at this version has taken, and whose commit was lost with the learner before it.

        Raises:
            DataError: it cannot have got there from here.
        """
        ids = self._groups_until(policy_version)
        for step, group_ids in ids.items():
            if len(group_ids) != self._config.learner.groups_per_step:
                raise DataError(
                    f"the learner has a checkpoint of version {policy_version}, but only {len(group_ids)} groups were "
                    f"shipped for step {step}: its checkpoints are of another run, or the journal has lost its end"
                )
        return [GroupsCommitted(step, np.array(group_ids, np.int64)) for step, group_ids in ids.items()]

    def explains(self, policy_version: int) -> bool:
        """Whether a learner at this version can have got there from here, and can be told all that follows."""
        size = self._config.learner.groups_per_step
        is_whole = all(len(group_ids) == size for group_ids in self._groups_until(policy_version).values())
        return self.taken.can_rewind(policy_version) and is_whole

    def _groups_until(self, policy_version: int) -> dict[int, list[int]]:
        """The groups that are known of each step from the learner's position to this version."""
        ids = {step: self.taken.group_ids(step) for step in range(self.taken.position, policy_version)}
        for group in self._shipped.values():
            if group.step in ids:
                ids[group.step].append(group.group_id)
        return ids

    def learner_ready(self, policy_version: int) -> None:
        """A learner at this version is up: send it what is shipped, and before that what it has to take again. What it
        already has it drops by group id."""
        self.learner_up = self.has_begun = True
        if self.taken.rewind(policy_version):
            self._work.out.append(LearnerRewound(policy_version))
        floor = max(self.num_steps, self._work.generators.newest_version)
        self._work.out.append(Send(LEARNER.first, CatchUp(floor, max(floor, self.num_filled_steps))))
        self._replay()
        self._work.out += [Send(LEARNER.first, group.message) for group in self._sent.values()]

    def _replay(self) -> None:
        self._work.out += [Send(LEARNER.first, group) for group in self.taken.to_send()]

    def committed(self, message: GroupsCommitted, now_s: float) -> dict[str, float] | None:
        """The learner has taken a step; its metrics, or None if it was taken before."""
        step, group_ids = message.step, message.group_ids.tolist()
        if step < self.taken.position:
            return None
        if self.taken.is_behind:
            self.taken.took_again(step, group_ids)
            self._work.out.append(StepCommitted(step, tuple(group_ids)))
            self._replay()
            return None
        groups = [self._shipped.pop(g) for g in group_ids if g in self._shipped]
        if not groups:  # they were given up at the end of a stop
            return None
        self.taken.took(step, [self._sent.pop(group.group_id) for group in groups])
        self._work.out.append(StepCommitted(step, tuple(group_ids)))
        metrics = self._statistics.close(step, groups)
        for group in groups:
            for sample, _ in group.kept or []:
                self._work.totals.trained(sample, step)
                self._work.end(sample, "trained", "committed", step=step)
        self._learner_fed_s = now_s
        return metrics

    def stop(self, reason: str) -> None:
        """End every group but those of full steps, which are still committed."""
        self._complete.clear()
        self._most_urgent.clear()
        self._spares.clear()
        for group in list(self._work.groups.values()):
            if group.step is None or group.step == self._window.next_step:
                if self._is_owed(group):
                    self._taken_by_stop.append((group.prompt, len(group.samples)))
                self._shipped.pop(group.group_id, None)
                self._sent.pop(group.group_id, None)
                self._end(group, "filtered", reason, cancel_fate="cancelled")

    def abandon(self) -> None:
        """Nothing more will be committed."""
        self._taken_by_stop += [(group.prompt, len(group.samples)) for group in self._shipped.values()]
        self._shipped.clear()
        self._sent.clear()

    def give_up(self) -> None:
        """Nothing that is open goes on: its prompts are to be asked again, see `reopen`."""
        self._complete.clear()
        self._most_urgent.clear()
        self._spares.clear()
        self._shipped.clear()
        self._sent.clear()
        for group in self._work.groups.values():
            if self._is_owed(group):
                self._taken_by_stop.append((group.prompt, len(group.samples)))

    def reopen(self) -> None:
        """After a stop: no group is open, the next step is empty, and what the stop took is asked again first."""
        for prompt, num_samples in self._taken_by_stop:
            self._queue.ask_again(prompt, num_samples)
        self._taken_by_stop.clear()
        self._window.reopen(self.num_steps)
        self._statistics.reopened()

    # --- the window ------------------------------------------------------------------------------------------

    def _ship(self, now_s: float) -> None:
        """Complete groups go to the learner, the most urgent first, while the window allows."""
        # If the most urgent one may not be shipped nor may any other, which would leave this one waiting as well.
        while self._most_urgent and self._window.may_ship(self._most_urgent[0][1]):
            group = self._complete.pop(heappop(self._most_urgent)[1])
            group.step = self._window.ship(group.group_id)
            self._shipped[group.group_id] = group
            self._work.out.append(GroupShipped(group.group_id, group.step))
            self._sent[group.group_id] = taken = _as_sent(group)
            self._work.out.append(Send(LEARNER.first, taken.message))
            self._learner_fed_s = now_s

    def _is_too_late(self, floor: int) -> bool:
        """Whether no step may take a group whose oldest token is of version `floor`."""
        step = self._window.next_step
        return step >= self._config.learner.steps or floor + self._config.staleness.max_staleness < step

    def _use_spares(self) -> None:
        """Complete spares take places in the window: free ones, or those of groups that are still waited for.

        With every event it is asked anew, and hardly ever is the answer another one. It follows from the window, whose
        undecided groups change when it does, the steps taken and who is complete; while these are as they were when the
        last spare had been tried, nothing comes of it.
        """
        if self._used_at == self._standing_of_spares():
            return
        hopeless: set[int] = set()
        """Floors for which there is no place until another spare has found one."""
        for spare in [g for g in self._spares.values() if g.kept is not None]:
            floor = self._floor_of(spare)
            if floor in hopeless:
                continue
            if self._find_place(spare, floor):
                hopeless.clear()
            else:
                hopeless.add(floor)
        self._used_at = self._standing_of_spares()

    def _find_place(self, spare: Group, floor: int) -> bool:
        """Whether the spare is in the window now."""
        if self._window.num_shipped + self._window.num_open < self._num_train_groups and self._enter(spare, floor):
            return True
        return any(self._replace(rival, spare, floor) for rival in self._latest_rivals())

    def _latest_rivals(self) -> Iterator[Group]:
        """Whom a spare could replace, the latest deadline first. Of the groups with one deadline all could be replaced
        or none, so of each the last one."""
        for deadline in sorted(self._rivals, reverse=True):
            group_ids = self._rivals[deadline]
            while group_ids and not self._is_waited_for(group_ids[-1]):
                group_ids.pop()  # for good: nobody is waited for again
            if group_ids:
                yield self._work.groups[group_ids[-1]]
            else:
                del self._rivals[deadline]

    def _is_waited_for(self, group_id: int) -> bool:
        group = self._work.groups.get(group_id)
        return group is not None and group.undecided and group_id not in self._spares

    def _standing_of_spares(self) -> tuple[int, int, list[int]]:
        complete = [group_id for group_id, group in self._spares.items() if group.kept is not None]
        return self._window.num_changes, self.num_steps, complete

    def _floor_of(self, group: Group) -> int:
        """The oldest version in what is kept of a complete group. Generators may tell of a version before the learner
        tells of its step; the window knows of no version before that."""
        return min(group.oldest_kept_version, self.num_steps)

    def _enter(self, spare: Group, floor: int) -> bool:
        """The spare joins the window, if that has a place for it."""
        if not self._window.may_admit(floor):
            return False
        self._window.admit(spare.group_id, floor)
        self._add_complete(self._spares.pop(spare.group_id))
        return True

    def _add_complete(self, group: Group) -> None:
        self._complete[group.group_id] = group
        heappush(self._most_urgent, self._urgency(group))

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
        """Spares that no step may take any more, and all when the last step is filled. Nobody comes among the spares,
        nor completes there, that the next step could not take: it is enough to look when that is another one."""
        if self._cut_at_step == self._window.next_step:
            return
        self._cut_at_step = self._window.next_step
        for spare in list(self._spares.values()):
            if self._is_too_late(self._oldest_version(spare)):
                del self._spares[spare.group_id]
                self._queue.ask_again(spare.prompt, len(spare.samples))
                self._drop(spare, fate="cancelled", reason="overcommitted")

    def _oldest_version(self, group: Group) -> int:
        """That it trains on, or can be asked to."""
        return group.floor if group.kept is None else group.oldest_kept_version

    def _blocking_group(self) -> Group | None:
        """The slowest group, if it alone keeps the learner and others waiting."""
        size = self._config.learner.groups_per_step
        groups = self._undecided()
        learner_waits = self.learner_up and len(self._shipped) < size
        others_wait = bool(self._complete) or (len(groups) == 1 and self._window.num_shipped % size > 0)
        return min(groups, key=self._urgency) if groups and learner_waits and others_wait else None

    def _undecided(self) -> list[Group]:
        """Groups in the window that are still waited for."""
        return [g for g in self._work.groups.values() if g.purpose == "train" and self._is_waited_for(g.group_id)]

    def _urgency(self, group: Group) -> tuple[int, int]:
        return self._window.deadline(group.group_id), group.group_id

    def to_state(self) -> TrainingState:
        """For `restore`."""
        return TrainingState(
            self._window.to_state(),
            list(self._complete),
            self._most_urgent,
            list(self._shipped),
            list(self._spares),
            self._queue.to_state(),
            self._retries,
            self._num_dropped_in_a_row,
            self._learner_fed_s,
            self._statistics.to_state(),
            self.learner_up,
            self.taken.to_state(),
            self._taken_by_stop,
            self._patience.to_state(),
            self.has_begun,
        )

    def to_checkpoint(self, policy_version: int) -> TrainingState:
        """For `restore`, where the learner goes on from a checkpoint of this version and no open group goes on."""
        return msgspec.structs.replace(
            self.to_state(),
            window=WindowState(self.num_steps * self._config.learner.groups_per_step, {}),
            complete=[],
            most_urgent=[],
            shipped=[],
            spares=[],
            learner_up=False,
            taken=self.taken.since(policy_version),
            has_begun=False,
        )

    def restore(self, state: TrainingState) -> None:
        """Go on where `to_state` was taken, the workload before."""
        groups = self._work.groups
        self._window.restore(state.window)
        self._complete = {group_id: groups[group_id] for group_id in state.complete}
        self._most_urgent = state.most_urgent
        self._shipped = {group_id: groups[group_id] for group_id in state.shipped}
        self._sent = {group_id: _as_sent(group) for group_id, group in self._shipped.items()}
        self._spares = {group_id: groups[group_id] for group_id in state.spares}
        self._queue.restore(state.queue)
        self._retries.update(state.retries)
        self._num_dropped_in_a_row = state.num_dropped_in_a_row
        self._learner_fed_s = state.learner_fed_s
        self._statistics.restore(state.statistics)
        self.learner_up = state.learner_up
        self.taken.restore(state.taken)
        self._taken_by_stop = state.taken_by_stop
        self._patience.restore(state.group_times_s)
        self.has_begun = state.has_begun
        for group in self._undecided():
            if group.group_id in state.window.floors:  # of a checkpoint no open group goes on
                self._add_rival(group)

    def validate(self) -> None:
        """Every group is where it says, and everyone who is waited for meets its deadline."""
        self._window.validate()
        self.taken.validate()
        num_open = len(self._undecided()) + len(self._complete)
        assert num_open == self._window.num_open, (num_open, self._window.num_open)
        assert len(self._spares) <= self._max_spares, len(self._spares)
        assert not self._spares.keys() & self._complete.keys()
        rivals = {group_id for ids in self._rivals.values() for group_id in ids if self._is_waited_for(group_id)}
        assert not self._max_spares or rivals == {g.group_id for g in self._undecided() if not g.asked_again}
        assert all(ids == sorted(ids) for ids in self._rivals.values()), self._rivals
        for group_id, spare in self._spares.items():
            assert not self._is_too_late(self._oldest_version(spare)), group_id
        assert sorted(self._most_urgent) == sorted(map(self._urgency, self._complete.values()))
        assert self._window.num_open + len(self._shipped) <= self._config.max_open_groups
        assert list(self._sent) == list(self._shipped)
        assert not self._completed_now, self._completed_now
        for group in self._work.groups.values():
            assert not (group.undecided and group.kept), group.group_id
        for group in [*self._complete.values(), *self._shipped.values()]:
            self._validate_kept(group)
        for group in self._shipped.values():
            assert group.step is not None
            assert group.step - group.oldest_kept_version <= self._config.staleness.max_staleness, group.group_id

    def _validate_kept(self, group: Group) -> None:
        """As many as there should be; fewer only where a sample was lost."""
        shaping, num_kept = self._config.shaping, len(group.kept or [])
        assert shaping.smallest_group <= num_kept <= shaping.keep, group.group_id
        is_short = num_kept < shaping.keep
        assert not is_short or group.num_unscorable, group.group_id
        assert all(sample.reward is not None for sample, _ in group.kept or []), group.group_id


def _as_sent(group: Group) -> TakenGroup:
    return TakenGroup(group.prompt.prompt_id, train_group(group))


def end_all(work: Workload, group: Group, fate: Outcome, reason: str, *, cancel_fate: Outcome) -> None:
    """End every sample of a group, the running ones by cancelling them. One that was lost before keeps its own end."""
    for sample in group.samples:
        if sample.stage in (Stage.WAITING, Stage.DECODING):
            work.cancel(sample, cancel_fate, reason)
        elif sample.stage not in (Stage.CANCELLING, Stage.ENDED):
            work.end(sample, "filtered" if sample.is_lost else fate, sample.end_reason or reason)
