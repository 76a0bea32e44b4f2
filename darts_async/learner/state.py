"""All decisions of the learner: what it does next and what it tells. Without model, socket, clock or task.

    loaded -> generators have joined, the shaper has said where the run is -> publish
    for each step: train on its groups as they come -> take the step -> publish, save      -> write the model

The owner of the trainer asks for the `next_move`, makes it, reports the result, and asks again. Publishing and saving
continue during the next moves: a version is published while the groups of the next step are trained on.

The parameters are lent from the beginning of a step until every generator has its result, so that none reads half
changed parameters. The next step waits for their return.

Restarts. Groups that the checkpoint has consumed are not trained on again, however often the shaper sends them. The
steps since then are taken again with the same groups. No version older than one that generators may use already (the
floor) is published, because versions never go back. The floor itself is published again, because the repeated steps may
differ in the last bit.
"""

from typing import cast

import numpy as np

from darts_async.config import RunConfig
from darts_async.learner import moves
from darts_async.learner.boundary import Boundary
from darts_async.learner.intake import ConsumedGroups, Intake, Intervals
from darts_async.protocol import (
    CatchUp,
    GeneratorToLearner,
    Greet,
    GroupsCommitted,
    LearnerReady,
    LearnerToShaper,
    MemberJoined,
    ShaperSnapshot,
    ShaperToLearner,
    Shutdown,
    TrainGroup,
    VersionPublished,
    VersionSaved,
)
from darts_async.topology.links import LEARNER_LINK, WEIGHTS_LINK
from darts_async.transport import Event, PeerDown, PeerUp, Received
from darts_async.weights.sending.events import MemberLost, MemberMessage

MAX_TOGETHER = 256
"""Groups in a pass."""


class LearnerState:
    """It is made before the model is loaded, and knows no version until then. If it `is_first` of this run, the first
    version waits for all generators."""

    def __init__(self, config: RunConfig, boundary: Boundary, *, is_first: bool) -> None:
        self._config = config.learner
        self._tokens_per_pass = config.learner.tokens_per_micro_batch * config.roles.learner.replicas
        self._boundary = boundary
        self.intake = Intake()
        self.policy_version = -1  # of the parameters; -1 while they are loaded
        self._groups: list[TrainGroup] = []  # in the gradient of the step that is next
        self._is_stepping = False
        self._is_begun = False  # whether the first version was considered for publishing
        self._num_awaited = config.roles.generator.replicas if is_first else 0
        self.joined: set[str] = set()  # generators
        self.shaper: str | None = None
        self._taken_up = LearnerReady(0)  # what this incarnation began with
        self.shaper_states: dict[int, bytes] = {}  # what the shaper knew at a version; the newest two
        self._num_greetings = 0
        self.floor = -1  # nothing older is published
        self._newest_version = -1  # no generator can hold a later one
        self._is_told_floor = False
        self._early: dict[str, Received] = {}  # members that have joined before the floor was known, by name
        self._is_to_publish = self._is_to_save = self._is_saving = False
        self._is_lent = False
        self.newest_published = -1
        self._on_disk = 0
        self._saved = self._oldest_kept = 0  # as told to the shaper: the last version only with the model
        self.leaving: Shutdown | None = None
        self._is_trained = config.learner.steps == 0

    # --- events ----------------------------------------------------------------------------------------------

    def handle(self, event: Event, *, newest_epoch: int) -> list[moves.Action]:
        """Handle an event of the shaper or of a generator. `newest_epoch` of the broadcast group was formed."""
        match event:
            case Received(link=WEIGHTS_LINK.name, peer=peer, message=MemberJoined()) if not self._is_told_floor:
                self._early[peer] = event
            case Received(message=message) if (reason := self._refusal(event, newest_epoch)) is not None:
                return [moves.Refuse(event, f"{type(message).__name__}: {reason}")]
            case Received(link=LEARNER_LINK.name):
                return self._hear_shaper(event, newest_epoch)
            case Received(link=WEIGHTS_LINK.name, peer=peer, incarnation=incarnation, message=message):
                if isinstance(message, MemberJoined):
                    self.floor = max(self.floor, message.policy_version)
                    self.joined.add(peer)
                return [MemberMessage(peer, incarnation, cast(GeneratorToLearner, message))]
            case PeerUp(link=WEIGHTS_LINK.name, peer=peer):
                self._num_greetings += 1
                return [moves.Tell(WEIGHTS_LINK.name, peer, Greet(self._num_greetings))]
            case PeerDown(link=WEIGHTS_LINK.name, peer=peer):
                self._early.pop(peer, None)
                return [MemberLost(peer)]
        return []

    def leave(self, message: Shutdown) -> None:
        """End the run: see `Shutdown`."""
        self.leaving = message

    def timed_out(self, wait: moves.Wait) -> None:
        """A wait took long. A generator that does not start is not waited for any longer."""
        if wait == moves.FOR_GENERATORS:
            self._num_awaited = 0

    # --- results ---------------------------------------------------------------------------------------------

    def loaded(
        self,
        *,
        policy_version: int,
        consumed: Intervals = (),
        shaper_state: bytes = b"",
        oldest_kept: int = 0,
    ) -> list[moves.Action]:
        """There are parameters: those of the first model, or those of a checkpoint."""
        self.intake.consumed = ConsumedGroups(consumed)
        next_group_id = max((stop for _, stop in consumed), default=0)
        self._taken_up = LearnerReady(policy_version, shaper_state, next_group_id)
        self.policy_version = self._on_disk = policy_version
        self._is_to_publish = True
        self._oldest_kept = oldest_kept
        if policy_version < self._config.steps:
            self._saved = policy_version
        return self._announcement()

    def step_taken(self) -> list[moves.Action]:
        """The parameters are those of the next version."""
        step, group_ids = self.policy_version, [group.group_id for group in self._groups]
        self.intake.commit(step, group_ids)
        self.policy_version += 1
        self._groups.clear()
        self._is_stepping = False
        self._is_to_publish, self._is_to_save = True, self._config.is_saved(self.policy_version)
        return self._to_shaper(GroupsCommitted(step, np.array(group_ids, np.int64)))

    def published(self, version: int) -> list[moves.Action]:
        """Every generator has it, and reads the parameters no longer."""
        self._is_lent = False
        self.newest_published = version
        return self._to_shaper(VersionPublished(version))

    def saved(self, version: int, *, oldest_kept: int) -> list[moves.Action]:
        """A checkpoint of this version is on the disk. The shaper hears of the last one when the model is written."""
        self._is_saving = False
        self._on_disk, self._oldest_kept = version, oldest_kept
        if version == self._config.steps and not self._is_trained:
            return []
        self._saved = version
        return self._to_shaper(VersionSaved(version, oldest_kept))

    def model_written(self) -> list[moves.Action]:
        """The final model is on the disk. When the shaper hears of it, the run is complete."""
        self._is_trained = True
        return self.saved(self._config.steps, oldest_kept=self._oldest_kept)

    # --- decisions -------------------------------------------------------------------------------------------

    def next_move(self) -> moves.Move:
        """The next move of the trainer's owner. A `Wait` changes nothing; any other move must be made."""
        if self.policy_version < 0:
            return moves.Wait("the model")
        if not self._is_begun and (move := self._before_the_first()) is not None:
            return move
        if self._is_to_publish:
            self._is_begun, self._is_to_publish = True, False
            self._is_lent = self.policy_version >= self.floor
            if self._is_lent:
                return moves.Publish(self.policy_version)
        if self._is_saving and (self._is_to_save or self.policy_version == self._config.steps):
            return moves.Wait("a checkpoint")
        if self._is_to_save:
            return self._save(has_shaper=self.shaper is not None)
        if self.policy_version == self._config.steps:
            return moves.Leave() if self._is_trained else moves.WriteModel()
        return self._train()

    def farewell(self) -> moves.Save | None:
        """The checkpoint of the last step of a run that is stopped, whatever the trainer's owner is doing. There must
        be none of a step that the shaper has given up. To be called after every change."""
        is_free = not self._is_stepping and not self._is_saving
        if self.leaving is None or self.leaving.finished or not is_free or not self._owes_checkpoint:
            return None
        return self._save(has_shaper=self.policy_version in self.shaper_states)  # it is leaving: it says no more

    @property
    def is_done(self) -> bool:
        """A complete run ends when its model is written, one that is stopped when its checkpoint is, any other now."""
        if self.leaving is None or self._is_trained:
            return self.leaving is not None
        is_at_end = self._is_begun and self.policy_version == self._config.steps
        return not self.leaving.finished and not self._owes_checkpoint and not is_at_end

    def lend(self) -> bool:
        """Lend the parameters, until `give_back`, for generators that have joined after a version was published; False
        if that is not possible now."""
        if self._is_lent or self.newest_published != self.policy_version or self.policy_version < 0:
            return False
        self._is_lent = True
        return True

    def give_back(self) -> None:
        """The late generators have the version, or were given up."""
        self._is_lent = False

    @property
    def is_catching_up(self) -> bool:
        """Whether steps are repeated whose results generators already have."""
        return 0 <= self.policy_version < self.floor

    def validate(self) -> None:
        steps = self._config.steps
        assert len(self._groups) <= self._config.groups_per_step
        assert len({group.group_id for group in self._groups}) == len(self._groups)
        for group in self._groups:
            assert group.step == self.policy_version
            assert group.group_id not in self.intake.consumed, f"group {group.group_id} is trained twice"
        assert self._is_told_floor or (self.floor == -1 and not self._is_begun)
        assert not (self._is_told_floor and self._early)
        assert self.newest_published <= self.policy_version <= steps
        assert self._saved <= self._on_disk <= max(self.policy_version, 0)
        assert self._saved < steps or self._is_trained
        assert not self._is_stepping or (self._is_lent and len(self._groups) == self._config.groups_per_step)
        assert len(self.shaper_states) <= 2

    # --- inside ----------------------------------------------------------------------------------------------

    def _refusal(self, event: Received, newest_epoch: int) -> str | None:
        if event.link == LEARNER_LINK.name:
            return self._boundary.of_shaper(cast(ShaperToLearner, event.message))
        return self._boundary.of_generator(
            cast(GeneratorToLearner, event.message),
            newest_version=max(self._newest_version, self.policy_version),
            newest_epoch=newest_epoch,
        )

    def _hear_shaper(self, event: Received, newest_epoch: int) -> list[moves.Action]:
        match event:
            case Received(peer=peer, message=Greet()):
                self.shaper = peer
                return self._announcement()
            case Received(message=CatchUp(policy_version=version, newest_version=newest_version)):
                self.floor = max(self.floor, version)
                self._newest_version = max(self._newest_version, newest_version)
                self._is_told_floor = True
                early, self._early = self._early, {}
                return [act for joined in early.values() for act in self.handle(joined, newest_epoch=newest_epoch)]
            case Received(message=TrainGroup() as group):
                self.intake.take(group)
            case Received(message=ShaperSnapshot(policy_version=version, state=state)):
                self.shaper_states[version] = state
                for older in sorted(self.shaper_states)[:-2]:
                    del self.shaper_states[older]
        return []

    def _announcement(self) -> list[moves.Action]:
        """Where training is, for the shaper."""
        version = self.policy_version
        if version < 0:
            return []
        told = self._to_shaper(self._taken_up if self._taken_up.policy_version == version else LearnerReady(version))
        if self.newest_published >= 0:
            told += self._to_shaper(VersionPublished(self.newest_published))
        if self._saved:
            # Once the last checkpoint is written, and before the model is, the oldest may be later than what was said.
            told += self._to_shaper(VersionSaved(self._saved, min(self._oldest_kept, self._saved)))
        return told

    def _to_shaper(self, message: LearnerToShaper) -> list[moves.Action]:
        return [] if self.shaper is None else [moves.Tell(LEARNER_LINK.name, self.shaper, message)]

    def _before_the_first(self) -> moves.Move | None:
        """Nothing was published by this incarnation."""
        if len(self.joined) < self._num_awaited:
            return moves.FOR_GENERATORS
        if self._is_told_floor:
            return None
        if self.leaving is None:
            return moves.FOR_SHAPER
        is_trained = self.leaving.finished and self.policy_version == self._config.steps
        return moves.WriteModel() if is_trained and not self._is_trained else moves.Leave()

    def _train(self) -> moves.Move:
        num_free = self._config.groups_per_step - len(self._groups)
        if num_free:
            together = self.intake.together(self.policy_version, min(num_free, MAX_TOGETHER), self._tokens_per_pass)
            self._groups += together
            return moves.Train(tuple(together)) if together else moves.Wait("groups")
        if self.leaving is not None:
            return moves.Leave()
        if self._is_lent:
            return moves.Wait("publishing")
        self._is_lent = self._is_stepping = True
        return moves.TakeStep(tuple(self._groups))

    def _save(self, *, has_shaper: bool) -> moves.Save:
        self._is_to_save, self._is_saving = False, True
        return moves.Save(self.policy_version, has_shaper)

    @property
    def _owes_checkpoint(self) -> bool:
        is_theirs = self.leaving is not None and self.leaving.num_steps == self.policy_version
        return is_theirs and self.policy_version > self._on_disk
