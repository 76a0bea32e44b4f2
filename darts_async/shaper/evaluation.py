"""Held-out prompts: every sample is decoded to the end, scored and reported, and none is trained on.

One evaluation is under way at a time. Before the first and after the last step its prompts have the generators for
themselves. In between it runs beside training: a prompt is opened when its samples fit into the share of the slots that
evaluations may take. One that comes due meanwhile is skipped.

An evaluation of version v has no token of an older one: its groups are opened where v or a later version is in use,
and no sample goes back to older weights. Weights are updated in flight, so there may be tokens of later versions; the
report has the newest.
"""

from collections import deque

import numpy as np
from msgspec import Struct

from darts_async.config import EvaluationConfig
from darts_async.config.prompts import REST
from darts_async.prompts.source import Prompt
from darts_async.protocol import EvaluationCompleted
from darts_async.shaper.group import RUNNING, Group, Sample, Stage
from darts_async.shaper.open_work import OpenWork
from darts_async.shaper.token_accounts import part_metrics


class EvaluationState(Struct, frozen=True):
    """What `Evaluation` knows between two events; open groups by id."""

    policy_version: int | None
    unopened: list[Prompt]
    open: list[int]
    evaluated: list[tuple[int, Sample]]
    newest_due: int
    num_skipped: int


class Evaluation:
    """The evaluations of a run, one after the other."""

    def __init__(
        self, config: EvaluationConfig, work: OpenWork, held_out: tuple[Prompt, ...], labels: tuple[str, ...] = ()
    ) -> None:
        """`labels`: the names of several reward functions."""
        self._config = config
        self._labels = labels
        self._work = work
        self._held_out = held_out if config.samples_per_prompt else ()
        self._policy_version: int | None = None  # of the one that is under way
        self._unopened: deque[Prompt] = deque()
        self._open: dict[int, Group] = {}
        self._evaluated: list[tuple[int, Sample]] = []
        self._newest_due = 0
        self._num_skipped = 0

    @property
    def under_way(self) -> bool:
        """Whether there is something to wait for."""
        return self._policy_version is not None

    def begin(self, policy_version: int) -> None:
        """Start an evaluation, which is over at once if nothing is held out."""
        assert not self.under_way, self._policy_version
        if self._held_out:
            self._policy_version = policy_version
            self._unopened.extend(self._held_out)
            self._work.rollouts.begin_evaluation()

    def published(self, policy_version: int) -> None:
        """Training continues with this version: an evaluation may be due."""
        every = self._config.every_steps
        if not every or policy_version % every or policy_version <= self._newest_due:
            return
        self._newest_due = policy_version
        if self.under_way:
            self._num_skipped += 1
        else:
            self.begin(policy_version)

    def open_group(self, *, alone: bool, floor: int, cursor: int, now_s: float) -> bool:
        """Open the group of the next prompt, if one waits and has a place; `alone`: without regard to training."""
        if not self._unopened or not (alone or self._has_slots()):
            return False
        assert self._policy_version is not None
        assert floor >= self._policy_version, (floor, self._policy_version)
        prompt, num_samples = self._unopened.popleft(), self._config.samples_per_prompt
        group = self._work.open(prompt, "evaluate", num_samples, floor=floor, cursor=cursor, now_s=now_s)
        self._open[group.group_id] = group
        return True

    def decide(self, group: Group) -> None:
        """A sample of a held-out group has finished, failed or got its reward."""
        if group.undecided:
            return
        del self._open[group.group_id]
        for sample in group.samples:
            if sample.stage is Stage.SCORED:
                self._evaluated.append((group.prompt.prompt_id, sample))
                self._work.end(sample, "evaluated", "held_out")
            else:
                self._work.end(sample, "filtered", sample.end_reason)

    def close(self) -> EvaluationCompleted | None:
        """The report on the evaluation under way if that is over, and if it has any rewards."""
        if self._policy_version is None or self._unopened or self._open:
            return None
        report = self._report(self._policy_version) if self._evaluated else None
        self._work.rollouts.close_evaluation(self._policy_version)
        self.abandon()
        return report

    def abandon(self) -> None:
        """Nothing more of it is to be opened or reported."""
        self._policy_version, self._num_skipped, self._evaluated = None, 0, []
        self._unopened.clear()
        self._open.clear()

    def _report(self, policy_version: int) -> EvaluationCompleted:
        evaluated = sorted(self._evaluated, key=lambda pair: pair[1].sample_id)
        return EvaluationCompleted(
            policy_version=policy_version,
            prompt_ids=np.array([prompt_id for prompt_id, _ in evaluated], np.int64),
            rewards=np.array([s.reward for _, s in evaluated], np.float32),
            num_tokens=np.array([s.num_tokens for _, s in evaluated], np.int32),
            newest_version=max(s.newest_version for _, s in evaluated if s.newest_version is not None),
            num_skipped=self._num_skipped,
            pass_above=self._config.pass_above,
            prompts_by_set=self.prompts_by_set,
            part_metrics=part_metrics(self._labels, [s.reward_parts for _, s in evaluated]),
        )

    @property
    def prompts_by_set(self) -> dict[str, list[int]]:
        """Parts of a mixture, families of tasks and further sets; empty if there is nothing to tell apart."""
        found: dict[str, list[int]] = {}
        for prompt in self._held_out:
            found.setdefault(prompt.part or REST, []).append(prompt.prompt_id)
        return found if len(found) > 1 else {}

    def to_state(self) -> EvaluationState:
        return EvaluationState(
            policy_version=self._policy_version,
            unopened=list(self._unopened),
            open=list(self._open),
            evaluated=self._evaluated,
            newest_due=self._newest_due,
            num_skipped=self._num_skipped,
        )

    def restore(self, state: EvaluationState) -> None:
        """Continue where `to_state` was taken, the open work before."""
        self._policy_version = state.policy_version
        self._unopened.extend(state.unopened)
        self._open = {group_id: self._work.groups[group_id] for group_id in state.open}
        self._evaluated = state.evaluated
        self._newest_due, self._num_skipped = state.newest_due, state.num_skipped

    def _has_slots(self) -> bool:
        """Whether one more group fits into the share, or would be the only one that decodes."""
        running = sum(sample.stage in RUNNING for group in self._open.values() for sample in group.samples)
        num_slots = sum(seat.num_slots for seat in self._work.generators.seats.values())
        return not running or running + self._config.samples_per_prompt <= self._config.max_slot_share * num_slots

    def validate(self) -> None:
        """Each held-out prompt is in one place: unopened, open, or evaluated."""
        of_work = {group.group_id for group in self._work.groups.values() if group.purpose == "evaluate"}
        assert of_work == self._open.keys(), of_work ^ self._open.keys()
        unopened = {prompt.prompt_id for prompt in self._unopened}
        waited_for = unopened | {group.prompt.prompt_id for group in self._open.values()}
        done = {prompt_id for prompt_id, _ in self._evaluated}
        assert len(waited_for) == len(self._unopened) + len(self._open)
        assert not waited_for & done, waited_for & done
        assert self.under_way == bool(waited_for), (self._policy_version, waited_for)
