"""What the page shows of rollouts: the groups of a step as rows of bars, and one sample with its tokens."""

from typing import Any

import msgspec
from msgspec import Struct

from darts_async.rollouts import Rollout, RolloutKind, groups_of
from darts_async.topology.outcomes import SampleOutcome
from launcher.analysis.rollouts import RunRollouts
from launcher.dashboard.access import RefusedError
from launcher.dashboard.plain import plain

_PROMPT_CHARS = 300
_MAX_DIGITS = 12
KINDS: dict[str, RolloutKind] = {"train": "train", "held-out": "held-out"}


def numbers_of(reader: RunRollouts) -> dict[str, list[int]]:
    """The steps that have rollouts, and the versions that were evaluated. Raises `ConfigError`."""
    return {name: reader.numbers(kind) for name, kind in KINDS.items()}


def group_rows(reader: RunRollouts, kind: str, number: str) -> list[dict[str, Any]]:
    """The groups of a step or evaluation, each with what its bars need: no response is in it.

    Raises:
        RefusedError: there is no such kind.
        ConfigError: there are no samples of this number.
    """
    return [plain(msgspec.to_builtins(_group_row(group))) for group in groups_of(_rollouts(reader, kind, number))]


class Bar(Struct, frozen=True):
    """One sample of a group, as its bar shows it."""

    sample: str
    length: int
    outcome: SampleOutcome
    why: str
    reward: float | None
    selected: bool


class GroupRow(Struct, frozen=True):
    """A group: the beginning of its prompt and answer, and a bar for each sample in launch order."""

    group_id: int
    prompt_id: int
    prompt: str
    answer: str
    samples: list[Bar]


def _group_row(group: list[Rollout]) -> GroupRow:
    bars = [Bar(each.sample, each.length, each.outcome, each.why, each.reward, each.selected) for each in group]
    first = group[0]
    prompt, answer = first.prompt[:_PROMPT_CHARS], first.answer[:_PROMPT_CHARS]
    return GroupRow(first.group_id, first.prompt_id, prompt, answer, bars)


def sample_view(reader: RunRollouts, kind: str, number: str, sample: str) -> dict[str, Any]:
    """Everything about one sample. Raises as `group_rows`, and `RefusedError` if there is no such sample."""
    for each in _rollouts(reader, kind, number):
        if each.sample == sample:
            found: dict[str, Any] = plain(msgspec.to_builtins(each))
            return found
    raise RefusedError(404, f"there is no sample {sample} in {kind} {number}")


def _rollouts(reader: RunRollouts, kind: str, number: str) -> list[Rollout]:
    if kind not in KINDS or not number.isdecimal() or len(number) > _MAX_DIGITS:
        raise RefusedError(400, f"kind is one of {', '.join(KINDS)} and number a whole number, not {kind} {number}")
    rollouts = reader.of(KINDS[kind], int(number))
    for name, why in reader.damaged.items():
        raise RefusedError(404, f"{name} cannot be read: {why}")
    return rollouts
