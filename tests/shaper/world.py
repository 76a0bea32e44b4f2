"""A small adversarial world around the real `ShaperState`: generators, a reward process and a learner whose every
move is chosen by the test. Links are first-in first-out; nothing else is promised."""

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from darts_async.config import RunConfig
from darts_async.prompts.source import Prompt, ShuffledPrompts
from darts_async.protocol import (
    Cancel,
    CatchUp,
    FailureKind,
    Generate,
    GeneratorReady,
    Greet,
    GroupsCommitted,
    LearnerReady,
    RewardReady,
    RunFinished,
    SampleCancelled,
    SampleFinished,
    SampleScored,
    Score,
    ScoreFailed,
    ShaperSnapshot,
    TokensDecoded,
    TrainGroup,
    VersionPublished,
    VersionSaved,
    WeightsApplied,
)
from darts_async.shaper.boundary import Boundary
from darts_async.shaper.group import Purpose
from darts_async.shaper.ledger import AnyRecord, GroupDropped, GroupOpened, SampleEnded
from darts_async.shaper.outbox import Forget, Output, SendTo
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.state import Incoming, ShaperState
from darts_async.topology.roles import LAUNCHER, LEARNER


def prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(i, f"p{i}", np.array([i % 50 + 1], np.int32), "0") for i in range(count))


def world_config(**sections: dict) -> RunConfig:
    base = {
        "learner": {"steps": 4, "groups_per_step": 3},
        "shaping": {"rule": "dual_end", "keep": 4, "launch": 6, "shortest": 3, "longest": 1},
        "generator": {"num_slots": 8, "max_queued": 2},
        "staleness": {"max_staleness": 1},
        "evaluation": {"samples_per_prompt": 2},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return RunConfig.model_validate(base)


@dataclass
class FakeGenerator:
    incarnation: int = 1
    version: int = -1
    lineage: int = 0
    """The learner that the version is of: another incarnation of it makes its own."""
    running: dict[int, int] = field(default_factory=dict)  # sample id -> tokens so far
    inbox: deque = field(default_factory=deque)


class World:
    """Moves are methods; `moves` lists what could happen now, so a test can choose any interleaving."""

    def __init__(self, config: RunConfig, num_generators: int = 2, num_held_out: int = 2) -> None:
        self.config = config
        self.num_held_out = num_held_out
        self.state = self.make_state()
        self.boundary = Boundary(config, Path("runs/it"))
        self.generators = {f"generator/{i}": FakeGenerator() for i in range(num_generators)}
        self.to_score: deque[Score] = deque()
        self.scored: set[int] = set()
        self.step_groups: list[TrainGroup] = []
        self.version = 0
        self.learner = 1
        self.floor = 0
        self.seen_groups: set[int] = set()
        self.history: list[list[int]] = []
        """The groups of each step that no death of the learner has undone."""
        self.kept: list[int] = []
        """Versions of the checkpoints on the disk."""
        self.damaged: list[int] = []
        """Of those that are not whole, until training is past them."""
        self.ledger: list[AnyRecord] = []
        self.ended: Counter[int] = Counter()
        self.outcomes: dict[int, SampleEnded] = {}
        self.dropped: list[GroupDropped] = []
        self.prompt_of: dict[int, int] = {}
        self.purpose_of: dict[int, Purpose] = {}
        self.opened: list[GroupOpened] = []
        self.to_launcher: list = []
        self.max_staleness_seen = 0
        self.num_decoded = 0
        self.now_s = 0.0
        for name in (*self.generators, "reward/0", LEARNER.first):
            self.absorb(self.state.peer_up(name, 1, self.now_s))
        for name in self.generators:
            self.receive(name)
            self.apply(name)

    def make_state(self) -> ShaperState:
        """The shaper."""
        return ShaperState(self.config, ShuffledPrompts(prompts(20), seed=1), prompts(self.num_held_out))

    # --- moves

    def feed(self, peer: str, message: Incoming) -> None:
        self.now_s += 0.01
        reason = self.boundary.refusal(self.state, peer, message)
        assert reason is None, f"{peer} is honest, and refused: {message}: {reason}"
        self.absorb(self.state.handle(peer, message, self.now_s))

    def die(self, name: str) -> None:
        """The generator is replaced by a new incarnation that knows nothing."""
        old = self.generators[name]
        self.generators[name] = FakeGenerator(incarnation=old.incarnation + 1)
        self.absorb(self.state.peer_lost(name, self.now_s, is_gone=True))
        self.absorb(self.state.peer_up(name, old.incarnation + 1, self.now_s))

    def fall_silent(self, name: str) -> None:
        """The shaper hears nothing of a generator, which goes on, and then hears of it again."""
        self.absorb(self.state.peer_lost(name, self.now_s, is_gone=False))
        self.absorb(self.state.peer_up(name, self.generators[name].incarnation, self.now_s))

    def receive(self, name: str) -> None:
        """The generator takes its next command."""
        generator = self.generators[name]
        command = generator.inbox.popleft()
        if isinstance(command, Greet):
            generator.running.clear()
            self.feed(name, GeneratorReady(command.number, self.config.generator.num_slots, 1024))
            if generator.version >= 0:  # a new one gets its weights in its own time, see `apply`
                self.feed(name, WeightsApplied(generator.version, 0.0))
        elif isinstance(command, Generate):
            assert command.sample_id not in generator.running
            generator.running[command.sample_id] = len(command.prefix_tokens)
        elif isinstance(command, Cancel) and command.sample_id in generator.running:
            tokens = generator.running.pop(command.sample_id)
            self.feed(name, SampleCancelled(command.sample_id, tokens))

    def decode(self, name: str, sample_ids: list[int], num_tokens: int = 1) -> None:
        generator = self.generators[name]
        for sample_id in sample_ids:
            generator.running[sample_id] += num_tokens
        total = num_tokens * len(sample_ids)
        self.num_decoded += total
        counts = np.full(len(sample_ids), num_tokens, np.int32)
        flat = np.zeros(total, np.int32), np.zeros(total, np.float32)
        self.feed(name, TokensDecoded(generator.version, np.array(sample_ids, np.int64), counts, *flat))

    def finish(self, name: str, sample_id: int) -> None:
        self.decode(name, [sample_id])
        tokens = self.generators[name].running.pop(sample_id)
        self.feed(name, SampleFinished(sample_id, "stop", tokens))

    def score(self, *, fails: bool = False, kind: FailureKind = "raised") -> None:
        score = self.to_score.popleft()
        if fails:
            self.feed("reward/0", ScoreFailed(score.sample_id, kind, "no"))
        else:
            self.feed("reward/0", SampleScored(score.sample_id, float(score.sample_id % 2)))

    def learn(self, *, tells: bool = True) -> None:
        """The learner takes its step and offers the new version. It may die before the shaper hears of it."""
        groups = self.groups_of_step()
        assert len(groups) == self.config.learner.groups_per_step
        self.step_groups = [g for g in self.step_groups if g.step > self.version]
        step, self.version = self.version, self.version + 1
        self.history.append([g.group_id for g in groups])
        if tells:
            self.feed(LEARNER.first, GroupsCommitted(step, np.array(self.history[step], np.int64)))
            if step + 1 == self.config.learner.steps:
                self.save()

    def groups_of_step(self) -> list[TrainGroup]:
        return [g for g in self.step_groups if g.step == self.version]

    def save(self, *, tells: bool = True) -> None:
        """The learner writes a checkpoint. It may die before the shaper hears of it."""
        earlier = [version for version in self.kept if version < self.version]
        self.kept = [*earlier, self.version][-self.config.learner.keep_checkpoints :]
        self.damaged = [version for version in self.damaged if version > self.version]
        if tells:
            self.feed(LEARNER.first, VersionSaved(self.saved, self.oldest_kept))

    @property
    def saved(self) -> int:
        """The newest version that is in a checkpoint."""
        return self.kept[-1] if self.kept else 0

    @property
    def oldest_kept(self) -> int:
        """The oldest version that a learner may come back at."""
        return 0 if self.first_model_is_kept else self.kept[0]

    @property
    def first_model_is_kept(self) -> bool:
        """Whether there are fewer checkpoints than are to be kept."""
        return len(self.kept) + len(self.damaged) < self.config.learner.keep_checkpoints

    def learner_dies(self, num_damaged: int = 0) -> None:
        """The next incarnation goes on from the last checkpoint that is not damaged."""
        whole = len(self.kept) - num_damaged
        self.kept, self.damaged = self.kept[:whole], self.damaged + self.kept[whole:]
        self.learner += 1
        self.version = self.floor = self.saved
        self.step_groups = []
        del self.history[self.version :]
        self.seen_groups = {group_id for groups in self.history for group_id in groups}
        self.absorb(self.state.peer_lost(LEARNER.first, self.now_s, is_gone=True))
        self.absorb(self.state.peer_up(LEARNER.first, self.learner, self.now_s))

    def lags(self, generator: FakeGenerator) -> bool:
        return (generator.version, generator.lineage) != (self.version, self.learner)

    def apply(self, name: str) -> None:
        generator = self.generators[name]
        assert generator.version <= self.version, "no version is older than what a generator has"
        generator.version, generator.lineage = self.version, self.learner
        self.feed(name, WeightsApplied(self.version, 0.0))
        if not any(map(self.lags, self.generators.values())):
            self.feed(LEARNER.first, VersionPublished(self.version))

    def moves(self) -> list[tuple]:
        moves: list[tuple] = []
        for name, generator in self.generators.items():
            if generator.inbox:
                moves.append((self.receive, name))
            moves += [(self.finish, name, sample_id) for sample_id in generator.running]
            longest = self.config.sampling.max_new_tokens
            goes_on = sorted(sample_id for sample_id, num in generator.running.items() if num + 1 < longest)
            if goes_on:
                moves.append((self.decode, name, goes_on))
            if self.version >= self.floor and self.lags(generator):
                moves.append((self.apply, name))
        if self.to_score:
            moves.append((self.score,))
        full = len(self.groups_of_step()) == self.config.learner.groups_per_step
        if full and (self.version < self.floor or not any(map(self.lags, self.generators.values()))):
            moves.append((self.learn,))
        return moves

    def run(self, rng: random.Random, max_moves: int = 20_000) -> None:
        """Any fair interleaving must end."""
        for _ in range(max_moves):
            if self.state.phase is RunPhase.FINISHED:
                return
            moves = self.moves()
            assert moves, f"deadlock in {self.state.phase}: {self.describe()}"
            move, *arguments = rng.choice(moves)
            move(*arguments)
            self.state.validate()
        raise AssertionError(f"no end after {max_moves} moves: {self.describe()}")

    # --- consequences

    def absorb(self, outputs: list[Output]) -> None:
        self.ledger += [output for output in outputs if not isinstance(output, SendTo | Forget)]
        for output in outputs:
            match output:
                case SendTo(peer, message) if peer in self.generators:
                    self.generators[peer].inbox.append(message)
                case SendTo("reward/0", Greet()):
                    self.feed("reward/0", RewardReady(1))
                case SendTo("reward/0", message):
                    self.to_score.append(message)
                    self.scored.add(message.sample_id)
                case SendTo(peer, message) if peer == LEARNER.first:
                    self._tell_learner(message)
                case SendTo(peer, message) if peer == LAUNCHER:
                    self.to_launcher.append(message)
                case Forget(peer):
                    if peer in self.generators:
                        self.generators[peer].inbox.clear()
                case SampleEnded():
                    self.ended[output.sample_id] += 1
                    self.outcomes[output.sample_id] = output
                case GroupOpened():
                    self.prompt_of[output.group_id] = output.prompt_id
                    self.purpose_of[output.group_id] = output.purpose
                    self.opened.append(output)
                case GroupDropped():
                    self.dropped.append(output)

    def _tell_learner(self, message: Greet | CatchUp | TrainGroup | ShaperSnapshot) -> None:
        match message:
            case Greet():
                self.feed(LEARNER.first, LearnerReady(self.version))
                if self.saved:
                    self.feed(LEARNER.first, VersionSaved(self.saved, self.oldest_kept))
            case CatchUp(policy_version=floor):
                self.floor = floor
            case TrainGroup():
                self._train(message)

    def _train(self, group: TrainGroup) -> None:
        if group.group_id in self.seen_groups:
            return
        self.seen_groups.add(group.group_id)
        assert group.step >= self.version
        self.max_staleness_seen = max(self.max_staleness_seen, group.step - int(group.versions.min()))
        self.step_groups.append(group)

    @property
    def finished(self) -> RunFinished:
        return next(m for m in self.to_launcher if isinstance(m, RunFinished))

    def describe(self) -> str:
        inboxes = {n: (len(g.inbox), len(g.running), g.version) for n, g in self.generators.items()}
        return f"{inboxes=} score={len(self.to_score)} step={len(self.step_groups)} version={self.version}"
