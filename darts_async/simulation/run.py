"""The simulated run: the real `ShaperState` and modelled peers on a virtual clock.

In one instant every message is delivered and answered before time advances: links take no time. The order of events
follows from the seed and the models alone, so a run repeats bit for bit.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np

from darts_async.config import RunConfig
from darts_async.prompts.source import Prompt, ShuffledPrompts
from darts_async.protocol import (
    Cancel,
    Generate,
    Greet,
    RewardReady,
    RunFinished,
    SampleScored,
    Score,
    ShaperToGenerator,
    TrainGroup,
    WeightsApplied,
    group_id_of,
    sample_id_of,
)
from darts_async.shaper.ledger import GroupOpened, SampleEnded
from darts_async.shaper.outbox import Output, SendTo
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.state import Incoming, ShaperState
from darts_async.simulation.clock import Clock
from darts_async.simulation.demand import Draw, Workload
from darts_async.simulation.engine import SimulatedEngine
from darts_async.simulation.learner import SimulatedLearner
from darts_async.simulation.models import Models
from darts_async.simulation.report import GroupStatistics, OpenGroup, SimulationResult
from darts_async.topology.roles import GENERATOR, LEARNER, REWARD

_MAX_QUIET_TICKS: Final = 4


def simulate(
    config: RunConfig, workload: Workload, models: Models | None = None, *, num_prompts: int = 4096
) -> SimulationResult:
    """Run to the last step of `config` and report.

    Read from `config`: seed, shaping, staleness, learner.steps and groups_per_step, roles.generator.replicas,
    generator.num_slots and max_queued, sampling.max_new_tokens. There is no evaluation.
    """
    simulation = Simulation(config, workload, models or Models(), num_prompts)
    simulation.run()
    return simulation.result()


def _prompts(count: int) -> tuple[Prompt, ...]:
    token_ids = np.zeros(1, np.int32)
    return tuple(Prompt(i, "", token_ids, "") for i in range(count))


class Simulation:
    """See the module."""

    def __init__(self, config: RunConfig, workload: Workload, models: Models, num_prompts: int) -> None:
        self.state = ShaperState(config, ShuffledPrompts(_prompts(num_prompts), seed=config.seed), ())
        self.clock = Clock()
        self._workload = workload
        self._engines = {
            name: SimulatedEngine(
                name,
                models.engine,
                self.clock,
                num_slots=config.generator.num_slots,
                max_context_tokens=config.generator.max_context_tokens,
            )
            for name in GENERATOR.processes(config.roles.generator.replicas)
        }
        self._learner = SimulatedLearner(
            models.learner, self.clock, groups_per_step=config.learner.groups_per_step, offer=self._offer
        )
        self._reward = _Reward(models.reward_s, self.clock)
        self._ticker = _Ticker(self, models.tick_every_s)
        self._groups: dict[int, OpenGroup] = {}
        self._visits: Counter[int] = Counter()
        self._statistics = GroupStatistics(config.shaping)
        self._num_applied = 0
        self._num_events = 0
        self._idle_until_step_s: list[float] = []
        self._touched: dict[str, SimulatedEngine] = {}
        """Engines that have got something in this instant."""

    def run(self, after_instant: Callable[[], None] | None = None) -> None:
        """Run from the greetings to the last step. `after_instant` is called whenever no message is left."""
        for peers in (self._engines, (REWARD.first, LEARNER.first)):  # so the first samples find every generator up
            for name in peers:
                self._absorb(self.state.peer_up(name, 1, self.clock.now_s))
            self._end_instant()
        self._ticker.wake(0)
        while self.state.phase is not RunPhase.FINISHED:
            actor = self.clock.advance()
            if isinstance(actor, SimulatedEngine):
                self._touched[actor.name] = actor
            self._end_instant()
            if len(self._learner.committed_at_s) > len(self._idle_until_step_s):
                self._idle_until_step_s.append(self._generator_s()["idle"])
            if after_instant is not None:
                after_instant()

    def tick(self) -> None:
        """Let the shaper see that time has passed."""
        self._absorb(self.state.tick(self.clock.now_s))

    def _end_instant(self) -> None:
        """Deliver and answer until no message is left, then let the affected engines continue."""
        while self.clock.outbox or self._touched:
            while self.clock.outbox:
                self._deliver(*self.clock.outbox.popleft())
            for engine in self._touched.values():
                engine.settle()
            if not self.clock.outbox:
                for engine in self._touched.values():
                    engine.plan()
                self._touched.clear()

    def _deliver(self, sender: str, message: Incoming) -> None:
        self._num_events += 1
        if isinstance(message, SampleScored):
            group = self._groups.get(group_id_of(message.sample_id))
            if group is not None:  # it may have been cut meanwhile
                group.last_scored_s = self.clock.now_s
        self._absorb(self.state.handle(sender, message, self.clock.now_s))
        if isinstance(message, WeightsApplied) and message.policy_version > 0:
            self._num_applied += 1
            if self._num_applied == len(self._engines):
                self._num_applied = 0
                self._learner.published()

    def _offer(self, version: int) -> None:
        for name, engine in self._engines.items():
            engine.offer(version)
            self._touched[name] = engine

    def _absorb(self, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case SendTo(peer=peer, message=message):
                    self._send(peer, message)
                case SampleEnded(sample_id=sample_id):
                    self._sample_ended(group_id_of(sample_id))
                case GroupOpened(group_id=group_id, prompt_id=prompt_id, num_samples=num_samples):
                    self._open(group_id, prompt_id, num_samples)

    def _send(self, peer: str, message: object) -> None:
        match message:
            case Generate(sample_id=sample_id):
                self._command(peer, message, self._draw(sample_id)[0])
            case Score(sample_id=sample_id):
                self._reward.score(sample_id, self._draw(sample_id)[1])
            case TrainGroup(group_id=group_id):
                self._statistics.shipped(message, self._groups[group_id])
                self._learner.take(message)
            case Cancel():
                self._command(peer, message)
            case RunFinished():
                self._statistics.finished = message
            case Greet() if peer in self._engines:
                self._command(peer, message)
            case Greet() if peer == LEARNER.first:
                self._learner.greet()
            case Greet():
                self.clock.send(peer, RewardReady(1))

    def _command(self, name: str, command: ShaperToGenerator, length: int = 0) -> None:
        engine = self._touched[name] = self._engines[name]
        engine.command(command, length)

    def _open(self, group_id: int, prompt_id: int, num_samples: int) -> None:
        visit = self._visits[prompt_id]
        self._visits[prompt_id] += 1
        draws = [self._workload.draw(prompt_id, index, visit) for index in range(num_samples)]
        self._groups[group_id] = OpenGroup(self.clock.now_s, draws, num_samples)
        self._statistics.launched[num_samples] += 1

    def _draw(self, sample_id: int) -> Draw:
        group_id = group_id_of(sample_id)
        return self._groups[group_id].draws[sample_id - sample_id_of(group_id, 0)]

    def _sample_ended(self, group_id: int) -> None:
        group = self._groups[group_id]
        group.num_left -= 1
        if not group.num_left:
            del self._groups[group_id]

    def _generator_s(self) -> Counter[str]:
        spent_s: Counter[str] = Counter()
        for engine in self._engines.values():
            spent_s.update(engine.meter.closed(self.clock.now_s))
        return spent_s

    def result(self) -> SimulationResult:
        """After `run`."""
        finished, statistics, engines = self._statistics.finished, self._statistics, list(self._engines.values())
        assert finished is not None
        makespan_s = self.clock.now_s
        commits_s = self._learner.committed_at_s
        return SimulationResult(
            makespan_s=makespan_s,
            step_s=tuple(np.diff(commits_s, prepend=0.0).tolist()),
            generator_s=dict(self._generator_s()),
            idle_until_step_s=tuple(self._idle_until_step_s),
            learner_s=self._learner.meter.closed(makespan_s),
            slot_use=sum(engine.slot_s for engine in engines) / (makespan_s * sum(e.num_slots for e in engines)),
            num_tokens_decoded=sum(engine.num_tokens for engine in engines),
            tokens_by_outcome=finished.tokens_by_outcome,
            samples_by_outcome=finished.samples_by_outcome,
            tokens_by_staleness=finished.tokens_by_staleness,
            group_s=tuple(statistics.group_s),
            launched=dict(statistics.launched),
            num_trained_groups=len(statistics.group_s),
            zero_advantage_share=statistics.zero_advantage_share,
            length_drift=statistics.length_drift,
            num_events=self._num_events,
        )


class _Reward:
    """Answers every item after the same time."""

    def __init__(self, latency_s: float, clock: Clock) -> None:
        self._latency_s = latency_s
        self._clock = clock
        self._rewards: dict[int, float] = {}

    def score(self, sample_id: int, reward: float) -> None:
        """Take an item."""
        if not self._latency_s:
            self._clock.send(REWARD.first, SampleScored(sample_id, reward))
            return
        self._rewards[sample_id] = reward
        self._clock.wake_at(self._clock.now_s + self._latency_s, self, sample_id)

    def wake(self, stamp: int) -> None:
        """An item is done; the stamp is its sample."""
        self._clock.send(REWARD.first, SampleScored(stamp, self._rewards.pop(stamp)))


class _Ticker:
    """Ticks the shaper, and fails when only ticks happen: every wait of a process has a wake-up."""

    def __init__(self, simulation: Simulation, interval_s: float) -> None:
        self._simulation = simulation
        self._interval_s = interval_s
        self._num_quiet = 0

    def wake(self, stamp: int) -> None:
        """Tick."""
        clock = self._simulation.clock
        self._num_quiet = 0 if clock.num_waiting else self._num_quiet + 1
        assert self._num_quiet < _MAX_QUIET_TICKS, f"deadlock at {clock.now_s} s in {self._simulation.state.phase}"
        self._simulation.tick()
        clock.wake_at(clock.now_s + self._interval_s, self, 0)
