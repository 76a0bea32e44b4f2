"""A modelled learner: groups in the order of arrival, steps in order, weights out."""

from collections import deque
from collections.abc import Callable

import numpy as np

from darts_async.protocol import GroupsCommitted, LearnerReady, TrainGroup, VersionPublished, VersionSaved
from darts_async.simulation.clock import Clock, Meter
from darts_async.simulation.models import LearnerModel
from darts_async.topology.roles import LEARNER

_WORK, _BROADCAST = 0, 1


class SimulatedLearner:
    """Trains and publishes; see `LearnerModel`."""

    def __init__(
        self, model: LearnerModel, clock: Clock, *, groups_per_step: int, offer: Callable[[int], None]
    ) -> None:
        """`offer(version)` is called when the weights are ready in every generator."""
        self.version = 0
        self.meter = Meter()
        self.committed_at_s: list[float] = []
        """When each step was taken."""
        self._model = model
        self._clock = clock
        self._groups_per_step = groups_per_step
        self._offer = offer
        self._arrived: deque[TrainGroup] = deque()
        self._in_step: list[int] = []
        self._working = False
        self._stepping = False
        self._publishing = False

    def greet(self) -> None:
        """The shaper asks who is there; the generators have the first weights already."""
        self._clock.send(LEARNER.first, LearnerReady(self.version))
        self._clock.send(LEARNER.first, VersionPublished(self.version))

    def take(self, group: TrainGroup) -> None:
        """A group to train on."""
        self._arrived.append(group)
        self._continue()

    def published(self) -> None:
        """Every generator has applied the version."""
        self._publishing = False
        self._clock.send(LEARNER.first, VersionPublished(self.version))
        self._continue()

    def wake(self, stamp: int) -> None:
        """A group is in the gradient, the step is taken, or the broadcast is through."""
        if stamp == _BROADCAST:
            self._offer(self.version)
            return
        self._working = False
        if self._stepping:
            self._commit()
        self._continue()

    def _continue(self) -> None:
        if self._working:
            return
        if len(self._in_step) == self._groups_per_step and not self._publishing:
            self._stepping = True
            self._work(self._model.step_s)
        elif len(self._in_step) < self._groups_per_step and self._arrived:
            group = self._arrived.popleft()
            assert group.step == self.version, (group.group_id, group.step, self.version)
            self._in_step.append(group.group_id)
            self._work(len(group.token_ids) * self._model.token_s)
        else:
            self.meter.switch("idle", self._clock.now_s)

    def _work(self, duration_s: float) -> None:
        self._working = True
        self.meter.switch("train", self._clock.now_s)
        self._clock.wake_at(self._clock.now_s + duration_s, self, _WORK)

    def _commit(self) -> None:
        self._clock.send(LEARNER.first, GroupsCommitted(self.version, np.array(self._in_step, np.int64)))
        self.committed_at_s.append(self._clock.now_s)
        self._in_step, self._stepping = [], False
        self.version += 1
        self._clock.send(LEARNER.first, VersionSaved(self.version, self.version))  # checkpoints cost no time
        self._publishing = True
        self._clock.wake_at(self._clock.now_s + self._model.broadcast_s, self, _BROADCAST)
