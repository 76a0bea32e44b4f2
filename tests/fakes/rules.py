"""Shaping rules as users write them."""

from collections.abc import Iterable

from darts_async.config import ShapingConfig
from darts_async.shaper.rules.custom import GroupView


class Alternating:
    """After every second group that it has completed it stops a group as soon as `keep` have finished."""

    def __init__(self, config: ShapingConfig) -> None:
        self.keep = config.keep
        self.state = b""

    def to_cancel(self, group: GroupView) -> Iterable[int]:
        is_enough = self.state and len(group.at("finished", "scored")) >= self.keep
        return [sample.sample_id for sample in group.at("running")] if is_enough else []

    def select(self, group: GroupView) -> dict[int, float]:
        self.state = b"" if self.state else b"stop early"
        return {sample.sample_id: 1.0 for sample in group.at("scored")[-self.keep :]}


class Stranger(Alternating):
    """Cancels samples of others."""

    def to_cancel(self, group: GroupView) -> Iterable[int]:
        return [10**9]


class Early(Alternating):
    """Trains on what has no reward yet."""

    def select(self, group: GroupView) -> dict[int, float]:
        return {sample.sample_id: 1.0 for sample in group.at("gone", "running")[:1]} or {-1: 1.0}


class Greedy(Alternating):
    """Trains on more than it may."""

    def select(self, group: GroupView) -> dict[int, float]:
        return {sample.sample_id: 1.0 for sample in group.at("scored")}


class Weightless(Alternating):
    """Trains on samples that count for nothing."""

    def select(self, group: GroupView) -> dict[int, float]:
        return {sample.sample_id: 0.0 for sample in group.at("scored")[: self.keep]}


class Idle(Alternating):
    """Trains on nothing."""

    def select(self, group: GroupView) -> dict[int, float]:
        return {}


class Raises(Alternating):
    """Has a mistake."""

    def select(self, group: GroupView) -> dict[int, float]:
        return {1 // 0: 1.0}


class Forgetful(Alternating):
    """Remembers something that is not bytes."""

    def select(self, group: GroupView) -> dict[int, float]:
        selected = super().select(group)
        self.state = "stop early"  # type: ignore[assignment]
        return selected
