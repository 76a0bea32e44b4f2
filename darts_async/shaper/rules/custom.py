"""Shaping rules of the user's: what such a rule sees and decides, and how it takes part in the shaper's decisions.

A rule sees a read-only copy of the group, and answers with sample ids. Its decisions follow from that group and from
its `state` alone: no clock, no randomness but that of `group.seed`. So a shaper that died decides the same again when
it replays its journal, whose head has the state."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from darts_async.config import RunConfig, ShapingConfig
from darts_async.errors import ExtensionError
from darts_async.extensions import RULE, load
from darts_async.prompts.source import Prompt
from darts_async.protocol import FinishReason
from darts_async.shaper.group import Group, Sample, Stage

Status = Literal["running", "finished", "scored", "gone"]
MAX_STATE_BYTES = 1 << 20
"""Of a rule: the state is written with every head of the journal and every checkpoint."""
_STATUS: dict[Stage, Status] = {
    Stage.WAITING: "running",
    Stage.DECODING: "running",
    Stage.FINISHED: "finished",
    Stage.SCORED: "scored",
}


@dataclass(frozen=True, slots=True)
class SampleView:
    """One response, as a rule sees it."""

    sample_id: int
    status: Status
    """`running`: waits or is decoded. `finished`: its reward has not come yet. `gone`: cancelled, or without a reward
    for good."""
    num_tokens: int
    """Of the response, so far."""
    finish_reason: FinishReason | None
    """`stop`, or `length` where it was cut at the cap; None while it runs."""
    finish_rank: int | None
    """How many of its group had finished before it."""
    reward: float | None


@dataclass(frozen=True, slots=True)
class GroupView:
    """The samples of one visit to one prompt, in the order in which they were launched."""

    group_id: int
    prompt_id: int
    """The same at each visit."""
    seed: int
    """For draws: another one for each group, and the same when a decision is made again."""
    samples: tuple[SampleView, ...]

    def at(self, *statuses: Status) -> list[SampleView]:
        """The samples of these statuses."""
        return [sample for sample in self.samples if sample.status in statuses]


class ShapingRule(Protocol):
    """A rule, made as `NAME(config=ShapingConfig)`.

    Example, a rule that trains on the latest finishers, and cancels nothing:
        >>> class Latest:
        ...     state = b""
        ...     def __init__(self, config: ShapingConfig) -> None:
        ...         self.keep = config.keep
        ...     def to_cancel(self, group: GroupView) -> list[int]:
        ...         return []
        ...     def select(self, group: GroupView) -> dict[int, float]:
        ...         line = sorted(group.at("scored"), key=lambda sample: sample.finish_rank or 0)
        ...         return {sample.sample_id: 1.0 for sample in line[-self.keep :]}
    """

    state: bytes
    """What it remembers from one call to the next, `MAX_STATE_BYTES` at most; `b""` at first. It is read when the
    shaper writes its journal, and set when a new shaper takes over."""

    def to_cancel(self, group: GroupView) -> Iterable[int]:
        """Running samples that will not be needed. Called after each finish and each reward."""

    def select(self, group: GroupView) -> Mapping[int, float]:
        """The scored samples to train on, `config.keep` at most, with their weights. Called once, when nothing runs and
        every reward has come."""


class UserRule:
    """A `ShapingRule` as one of the shaper's own rules. Raises `ExtensionError` where it cannot be loaded, raises, or
    decides on what is not there."""

    def __init__(self, config: ShapingConfig, seed: int) -> None:
        self._where = f"shaping.rule {config.rule!r}"
        self._keep, self._seed = config.keep, seed
        make = load(RULE, config.rule)
        self._rule: ShapingRule = self._call("being made", lambda: make(config=config))

    @property
    def state(self) -> bytes:
        """What the rule remembers."""
        state = self._call("state", lambda: self._rule.state)
        if not isinstance(state, bytes) or len(state) > MAX_STATE_BYTES:
            found = f"{len(state):,} bytes" if isinstance(state, bytes) else type(state).__name__
            raise ExtensionError(f"{self._where}: state is {found}; it must be bytes, {MAX_STATE_BYTES:,} at most")
        return state

    @state.setter
    def state(self, state: bytes) -> None:
        self._call("state", lambda: setattr(self._rule, "state", state))

    def to_cancel(self, group: Group) -> list[Sample]:
        """The samples that the rule names."""
        view = self._view(group)
        ids = self._call("to_cancel", lambda: list(self._rule.to_cancel(view)))
        self._check("to_cancel", ids, view, "running")
        return [sample for sample in group.samples if sample.sample_id in ids]

    def select(self, group: Group) -> list[tuple[Sample, float]]:
        """The samples that the rule names, in launch order."""
        view = self._view(group)
        weights = self._call("select", lambda: dict(self._rule.select(view)))
        self._check("select", list(weights), view, "scored")
        bad = [
            weight for weight in weights.values() if not (isinstance(weight, (int, float)) and 0 < weight < math.inf)
        ]
        if bad or len(weights) > self._keep:
            fault = f"a weight of {bad[0]!r}" if bad else f"{len(weights)} samples of shaping.keep {self._keep}"
            raise ExtensionError(
                f"{self._where}: select of group {group.group_id} gave {fault}; give positive numbers, and as many as "
                "shaping.keep at most"
            )
        return [(each, float(weights[each.sample_id])) for each in group.samples if each.sample_id in weights]

    def _view(self, group: Group) -> GroupView:
        same = "sample_id", "num_tokens", "finish_reason", "finish_rank", "reward"
        samples = tuple(
            SampleView(status=_STATUS.get(each.stage, "gone"), **{name: getattr(each, name) for name in same})
            for each in group.samples
        )
        return GroupView(group.group_id, group.prompt.prompt_id, (self._seed << 32) + group.group_id, samples)

    def _check(self, method: str, ids: list[int], view: GroupView, status: Status) -> None:
        known = [sample.sample_id for sample in view.at(status)]
        if unknown := [each for each in ids if each not in known]:
            raise ExtensionError(
                f"{self._where}: {method} of group {view.group_id} named sample {unknown[0]!r}, but the samples that "
                f"are {status} are {known}"
            )

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever the user's code raises
            raise ExtensionError(f"{self._where}: {what} raised {type(error).__name__}: {error}") from error


def try_rule(config: RunConfig) -> None:
    """Have the rule of the configuration decide on a made-up group.

    Raises:
        ExtensionError: it cannot be loaded, raises, or decides what it may not.
    """
    rule, shaping = UserRule(config.shaping, config.seed), config.shaping
    prompt = Prompt(0, "", np.zeros(1, np.int32), "")
    group = Group(0, prompt, "train", [Sample(number) for number in range(shaping.launch)])
    for number, sample in enumerate(group.samples):
        if sample.stage is Stage.CANCELLING:
            continue
        sample.num_tokens = number + 1
        group.finish(sample, "stop")
        for cancelled in rule.to_cancel(group):
            cancelled.stage = Stage.CANCELLING
        sample.stage, sample.reward = Stage.SCORED, float(number % 2)
    kept = rule.select(group)
    if len(kept) < shaping.smallest_group:
        raise ExtensionError(
            f"shaping.rule {shaping.rule!r} selects {len(kept)} of {len(group.at(Stage.SCORED))} scored samples, but a "
            f"group is trained on {shaping.smallest_group} at least (shaping.min_keep)"
        )
    UserRule(shaping, config.seed).state = rule.state
