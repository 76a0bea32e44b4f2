"""Reads the rollouts of a run: which files there are, and the samples that someone asks for.

Example:
    >>> from launcher.analysis.rollouts import Query, RunRollouts
    >>> def worst_of_the_newest_step(run_dir: Path) -> list[str]:
    ...     return [rollout.text for rollout in RunRollouts(run_dir).find(Query(order="worst", limit=3))]
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from darts_async.errors import ConfigError
from darts_async.rollouts import Rollout, RolloutKind, read_rollouts, reward_and_length, rollout_files
from darts_async.topology.run_files import SAMPLES_DIR

Order = Literal["launch", "best", "worst"]


@dataclass(frozen=True, slots=True)
class Query:
    """Which samples are asked for, and in which order."""

    kind: RolloutKind = "train"
    number: int | None = None
    """The step, or the version that was evaluated. None: the newest, or with a filter all of them, newest first."""
    prompt_id: int | None = None
    pattern: re.Pattern[str] | None = None
    """Found in the response."""
    cancelled: bool = False
    """Cancelled samples; with `failed` both."""
    failed: bool = False
    """Samples whose reward failed, or which the engine rejected."""
    order: Order = "launch"
    """`best` and `worst` are by reward, and leave out samples without one."""
    limit: int | None = None

    @property
    def has_filter(self) -> bool:
        """Whether it asks for some samples only."""
        return self.prompt_id is not None or self.pattern is not None or self.cancelled or self.failed

    def takes(self, rollout: Rollout) -> bool:
        """Whether it asks for this sample."""
        is_of_kind = not (self.cancelled or self.failed) or (
            (self.cancelled and rollout.outcome == "cancelled") or (self.failed and rollout.has_failed)
        )
        return (
            is_of_kind
            and self.prompt_id in (None, rollout.prompt_id)
            and (self.pattern is None or self.pattern.search(rollout.text) is not None)
            and (self.order == "launch" or rollout.reward is not None)
        )


@dataclass(slots=True)
class RunRollouts:
    """The rollouts of a run, live or over. A file that cannot be read is left out, and named in `damaged`."""

    run_dir: Path
    damaged: dict[str, str] = field(default_factory=dict)
    """What is wrong with which file."""

    def numbers(self, kind: RolloutKind) -> list[int]:
        """The steps that have rollouts, or the versions that were evaluated, ascending. Raises `ConfigError`."""
        return list(self._files(kind))

    def of(self, kind: RolloutKind, number: int) -> list[Rollout]:
        """The rollouts of a step or of an evaluation, group by group.

        Raises:
            ConfigError: there are none.
        """
        files = self._files(kind)
        if number not in files:
            what = "step" if kind == "train" else "an evaluation of version"
            known = f"there are those of {_ranges(files)}" if files else "there are none at all"
            raise ConfigError(f"{self.run_dir} has no samples of {what} {number}; {known}")
        return self._read(files[number])

    def newest(self, kind: RolloutKind) -> int:
        """The newest step with a sample that was trained on, or else the newest; or the newest evaluation.

        Raises:
            ConfigError: there is none.
        """
        files = self._files(kind)
        if not files:
            raise ConfigError(self._why_none(kind))
        newest_first = sorted(files, reverse=True)
        if kind == "train":
            for number in newest_first[:2]:  # the next step may have groups that came to nothing
                if any(rollout.outcome == "trained" for rollout in self._read(files[number])):
                    return number
        return newest_first[0]

    def find(self, query: Query) -> list[Rollout]:
        """The samples that are asked for.

        Raises:
            ConfigError: the run has no samples, or none of this step.
        """
        if query.number is not None:
            found: Iterable[Rollout] = self.of(query.kind, query.number)
        elif query.has_filter:
            found = self._newest_first(query.kind)
        else:
            found = self.of(query.kind, self.newest(query.kind))
        wanted: Iterable[Rollout] = filter(query.takes, found)
        if query.order != "launch":
            wanted = sorted(wanted, key=reward_and_length, reverse=query.order == "best")
        return list(islice(wanted, query.limit))

    def _newest_first(self, kind: RolloutKind) -> Iterator[Rollout]:
        files = self._files(kind)
        if not files:
            raise ConfigError(self._why_none(kind))
        for number in sorted(files, reverse=True):
            yield from self._read(files[number])

    def _files(self, kind: RolloutKind) -> dict[int, Path]:
        directory = self.run_dir / SAMPLES_DIR
        try:
            return rollout_files(directory, kind)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be read: {error.strerror}") from error

    def _read(self, path: Path) -> list[Rollout]:
        try:
            return read_rollouts(path)
        except FileNotFoundError:  # removed meanwhile, to make room
            return []
        except (OSError, ValueError) as error:
            self.damaged[path.name] = str(error)
            return []

    def _why_none(self, kind: RolloutKind) -> str:
        event = "step is" if kind == "train" else "evaluation is"
        return (
            f"{self.run_dir / SAMPLES_DIR} has no samples of {'a step' if kind == 'train' else 'an evaluation'}: no "
            f"{event} complete yet, or telemetry.sample_groups is 0"
        )


def _ranges(numbers: Iterable[int]) -> str:
    """
    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0 to 2, 5, 7 to 8'
    """
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
