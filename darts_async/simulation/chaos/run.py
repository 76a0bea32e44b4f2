"""One simulated run: a launcher that restarts dead processes, and the final checks."""

import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts_async.accusations import Accusations
from darts_async.config import PromptsConfig, RunConfig
from darts_async.prompts.load import PromptSets, load_prompts
from darts_async.protocol import PeerRefused, ProcessEnded, RunFinished, TakeUpAgain
from darts_async.shaper.durable import journal
from darts_async.simulation.chaos.generator import GeneratorProcess
from darts_async.simulation.chaos.learner import Checkpoint, Disk, LearnerProcess
from darts_async.simulation.chaos.plan import Blow, ChaosPlan, config_of, process_names
from darts_async.simulation.chaos.power import DiskOfShaper
from darts_async.simulation.chaos.process import Process
from darts_async.simulation.chaos.reward import RewardProcess
from darts_async.simulation.chaos.shaper import ShaperProcess
from darts_async.simulation.chaos.world import World
from darts_async.topology.links import LINKS
from darts_async.topology.roles import (
    AGENT,
    GENERATOR,
    LAUNCHER,
    LEARNER,
    ROLES,
    SHAPER,
    may_accuse_each_other,
    role_of,
)
from darts_async.topology.run_files import CHECKPOINTS_DIR, SHAPER_STATE_FILE
from darts_async.transport import Event, Received

NOTICED_WITHIN_S = 0.1
"""Until the launcher sees that a process is gone."""
BACK_WITHIN_S = 0.5
"""Until it is started again."""
IMPORTS_WITHIN_S = 0.5
"""From the start of a process until it begins."""
DIES_WHILE_STARTING_WITHIN_S = 0.5
JOURNAL_BYTES = 4096
"""Of inputs; a real one takes many more."""
ENDS_WITHIN_S = 120.0
"""After the last fault: time enough for every step to be taken again, and for every deadline on the way."""


class ChaosError(AssertionError):
    """An invariant of a run is broken."""


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """The result of a run."""

    config: RunConfig
    is_stopped: bool
    finished: RunFinished
    model: Checkpoint | None
    """Of a run that was not stopped."""
    duration_s: float
    """Of the virtual clock."""
    kills: Counter[str]
    """By role."""
    faults: Counter[str]
    """Of every kind."""


class _Launcher(Process):
    """Hears that the run is over."""

    finished: RunFinished | None = None

    def __init__(self, world: World, incarnation: int, links: Any, refused: Callable[[str, str, int], None]) -> None:
        super().__init__(world, LAUNCHER, incarnation, links)
        self._take_accusation = refused

    def handle(self, event: Event) -> None:
        match event:
            case Received(message=RunFinished() as finished):
                if self.finished is not None and self.finished != finished:
                    raise ChaosError(f"the run has ended twice: {self.finished} and {finished}")
                self.finished = finished
            case Received(peer=accuser, message=PeerRefused(name=name, incarnation=incarnation)):
                self._take_accusation(accuser, name, incarnation)
            case Received(message=TakeUpAgain()):
                self.world.is_to_be_resumed = True


class _Run:
    """The processes of a run, and the faults that they suffer."""

    def __init__(self, plan: ChaosPlan, run_dir: Path) -> None:
        config = config_of(plan)
        self.world = World(plan, config)
        self.config = config
        self.disk = Disk()
        self.kills: Counter[str] = Counter()
        self.incarnations: Counter[str] = Counter()
        self.generators: dict[tuple[str, int], GeneratorProcess] = {}
        self._run_dir = run_dir
        self._files = DiskOfShaper(run_dir, self.world.rng, self.world.counts)
        self._sets = _prompts(config.prompts.model_dump_json(), config.seed)
        self.names = list(process_names(plan.sections))
        by_role = {role.name: tuple(n for n in self.names if role_of(n) is role) for role in (*ROLES, AGENT)}
        self.links = {
            link.name: (link.hub, [name for name in self.names if name in members])
            for link in LINKS
            if (members := link.members(by_role))
        }
        self._accusations = Accusations(self.links)
        self.launcher = _Launcher(self.world, 1, self.links, self._refused)
        self._alive: dict[str, Process] = {}
        self._life = 1
        self._last_moment = self.world.plan.hardship.last_moment
        """Empty after it has come."""
        self._deadline_s = self.world.plan.calm_after_s + ENDS_WITHIN_S
        self.world.moment_came = self._moment_came
        self.stop_reason: str | None = None
        self.outlived: set[tuple[str, int]] = set()
        """The processes that are up at the end, by name and incarnation."""

    def conduct(self) -> RunFinished:
        """Run to the end. Raises `ChaosError` if that does not come in time."""
        self._begin_life()
        for at_s in self.world.plan.hardship.outages_at_s:
            self.world.at(at_s, functools.partial(self._outage, "outages"))
        for full in self.world.plan.hardship.full_disks:
            self.world.at(full.at_s, functools.partial(self._fill_disk, full.lasts_s))
        for blow in self.world.plan.blows:
            self.world.at(blow.at_s, functools.partial(self._strike, blow))
        if self.world.plan.stop_at_s is not None:
            self.world.at(self.world.plan.stop_at_s, self._stop)
        while (finished := self.launcher.finished) is None:
            if self.world.now_s > self._deadline_s:
                raise ChaosError(f"the run has not ended {ENDS_WITHIN_S} s after the last fault: {self._where()}")
            self.world.advance()
            self._notice_deaths()
            if self.world.is_to_be_resumed:
                self.world.is_to_be_resumed = False
                self._resume("runs that were taken up again by themselves")
            finished = self.launcher.finished
            if finished is not None and finished.reason == "finished":
                self._moment_came("end told")
            if finished is not None and finished.reason != "finished" and self.world.plan.is_resumed:
                self._resume("stops that were resumed")
        self.outlived = {
            (name, self.incarnations[name]) for name, process in self._alive.items() if not process.is_dead
        }
        return finished

    def _kill_all(self) -> None:
        for process in [*self._alive.values(), self.launcher]:
            if not process.is_dead:
                process.kill()
        self._alive.clear()

    def _resume(self, why: str) -> None:
        """All is dead, and another launcher starts it again."""
        self.world.counts[why] += 1
        self._kill_all()
        self._life += 1
        self.stop_reason = None
        self._deadline_s = max(self._deadline_s, self.world.now_s + ENDS_WITHIN_S)
        self.lay_out_checkpoints()
        self.launcher = _Launcher(self.world, self._life, self.links, self._refused)
        self._begin_life()

    def _begin_life(self) -> None:
        world, hardship = self.world, self.world.plan.hardship
        self.launcher.begin()
        for name in self.names:
            imports_s = world.rng.uniform(0.0, IMPORTS_WITHIN_S) if hardship.starts_slowly else 0.0
            world.after(imports_s, functools.partial(self._start_again, self._life, name))
        if hardship.outage_while_starting and world.chance(hardship.outage_while_starting):
            dies_s = world.now_s + world.rng.uniform(0.0, DIES_WHILE_STARTING_WITHIN_S)
            world.at(dies_s, functools.partial(self._outage, "outages while processes start", self._life))

    def _outage(self, why: str, life: int | None = None) -> None:
        """All processes and the launcher die, files may lose what was not flushed, and the run is resumed."""
        if life not in (None, self._life):
            return
        self._kill_all()
        self._lose_checkpoints()
        match self.world.plan.hardship.loss:
            case "unflushed":
                self._files.lose_unflushed()
            case "anything":
                self._files.lose_anything()
        self._resume(why)

    def lay_out_checkpoints(self) -> None:
        """Write the learner's checkpoints to files, where the shaper finds them."""
        shutil.rmtree(self._run_dir / CHECKPOINTS_DIR, ignore_errors=True)
        for checkpoint in self.disk.checkpoints:
            path = self._run_dir / CHECKPOINTS_DIR / f"step-{checkpoint.policy_version:06d}" / SHAPER_STATE_FILE
            path.parent.mkdir(parents=True)
            path.write_bytes(checkpoint.shaper_state)

    def _fill_disk(self, for_s: float) -> None:
        self.world.counts["disks full"] += 1
        self.world.full_until_s = max(self.world.full_until_s, self.world.now_s + for_s)

    def _moment_came(self, moment: str) -> None:
        if moment != self._last_moment:
            return
        self._last_moment = ""
        dies_after_s = self.world.plan.hardship.dies_after_s
        if moment != "end told":
            why = f"outages after the moment: {moment}"
            self.world.after(dies_after_s, functools.partial(self._outage, why, self._life))
        else:  # it is noted soon
            self._outage("outages after the moment: end told, and not noted")

    def _refused(self, accuser: str, accused: str, incarnation: int) -> None:
        """A process was refused: the one that is held to be wrong is killed, and started again."""
        present = self.incarnations[accused]
        if incarnation < present:
            return
        members_of = {member for hub, members in self.links.values() if hub == accuser for member in members}
        is_believed = accused in members_of or may_accuse_each_other(accuser, accused)
        for name in (accused,) if is_believed else self._accusations.hear(accuser, accused, present):
            process = self._alive.get(name)
            if process is not None and not process.is_dead:
                self.world.counts[f"{role_of(name)}s killed for nonsense"] += 1
                process.kill()

    def _start(self, name: str) -> None:
        if self.world.is_full and role_of(name) is SHAPER:  # the launcher waits for space
            self.world.at(self.world.full_until_s, functools.partial(self._start_again, self._life, name))
            return
        self.incarnations[name] += 1
        process = self._make(name, self.incarnations[name])
        self._alive[name] = process
        process.guarded(process.begin)

    def _make(self, name: str, incarnation: int) -> Process:
        process = self.world, name, incarnation, self.links
        match role_of(name).name:
            case SHAPER.name:
                return ShaperProcess(*process, self._run_dir, self._sets, life=self._life, disk=self._files)
            case LEARNER.name:
                return LearnerProcess(*process, self.disk)
            case GENERATOR.name:
                generator = self.generators[name, incarnation] = GeneratorProcess(*process)
                return generator
            case _:
                return RewardProcess(*process)

    def _strike(self, blow: Blow) -> None:
        if blow.kind == "outage":
            self._outage("outages")
            return
        process = self._alive.get(blow.victim)
        if process is None or process.is_dead:
            return
        match blow.kind:
            case "kill":
                process.kill()
            case "freeze":
                process.freeze(blow.lasts_s)
            case _:
                self.world.cut(blow.victim, blow.other, blow.lasts_s)

    def _lose_checkpoints(self) -> None:
        """All, or the newest, are removed by hand: the others may be older than any group that is kept."""
        if self.disk.checkpoints and self.world.chance(self.world.plan.lost_checkpoints):
            self.world.counts["checkpoints removed"] += 1
            self.disk.damaged.clear()
            del self.disk.checkpoints[self.world.rng.choice((-1, 0)) :]

    def _stop(self) -> None:
        self.stop_reason = "stopped by the plan"
        shaper = self._alive.get(SHAPER.first)
        if isinstance(shaper, ShaperProcess) and not shaper.is_dead:
            shaper.stop(self.stop_reason)

    def _notice_deaths(self) -> None:
        for name in [name for name, process in self._alive.items() if process.is_dead]:
            del self._alive[name]
            self.kills[role_of(name).name] += 1
            noticed_s = self.world.rng.uniform(0.0, NOTICED_WITHIN_S)
            self.world.after(noticed_s, functools.partial(self._lost, self._life, name, self.incarnations[name]))

    def _lost(self, life: int, name: str, incarnation: int) -> None:
        if life != self._life:
            return  # its launcher is dead too
        for other in self._alive:
            self.launcher.send(LAUNCHER, other, ProcessEnded(name, incarnation))
        self.world.after(self.world.rng.uniform(0.0, BACK_WITHIN_S), functools.partial(self._start_again, life, name))

    def _start_again(self, life: int, name: str) -> None:
        if life != self._life:
            return
        if self.stop_reason is not None and role_of(name) is SHAPER:
            self._resume("shapers that died while the run was stopping")  # which ends the run
            return
        self._start(name)

    def _where(self) -> str:
        shaper = self._alive.get(SHAPER.first)
        gauges = shaper.actor.gauges() if isinstance(shaper, ShaperProcess) else None
        return f"{gauges}, checkpoints {[c.policy_version for c in self.disk.checkpoints]}"


def run_chaos(plan: ChaosPlan, run_dir: Path) -> ChaosReport:
    """Make the run of a plan; its journal and ledger are left in `run_dir`.

    Raises:
        AssertionError: an invariant is broken (`ChaosError` if it is about the complete run).
        DartsError: a process has failed.
    """
    run = _Run(plan, run_dir)
    with _short_journals():
        try:
            finished = run.conduct()
        finally:
            for process in list(run.world.living.values()):
                process.kill()
    run.lay_out_checkpoints()
    is_stopped = finished.reason != "finished"
    _check_sums(run, finished, is_stopped=is_stopped)
    return ChaosReport(
        config=run.config,
        is_stopped=is_stopped,
        finished=finished,
        model=run.disk.model,
        duration_s=run.world.now_s,
        kills=run.kills,
        faults=run.world.counts,
    )


@contextlib.contextmanager
def _short_journals() -> Iterator[None]:
    """Inside, journals are begun again as often as in runs of many hours."""
    before, journal.MIN_BYTES = journal.MIN_BYTES, JOURNAL_BYTES
    try:
        yield
    finally:
        journal.MIN_BYTES = before


def _check_sums(run: _Run, finished: RunFinished, *, is_stopped: bool) -> None:
    """Steps and tokens add up."""
    config = run.config
    for name, counts in finished.tokens_by_generator.items():
        for incarnation, count in counts.items():
            every = {number for each, number in run.generators if each == name}
            of_it = {incarnation} if incarnation else every - counts.keys()  # 0: of earlier lives
            decoded = sum(run.generators[name, each].engine.num_tokens_decoded for each in of_it)
            if count > decoded or (count < decoded and all((name, each) in run.outlived for each in of_it)):
                raise ChaosError(f"{name} decoded {decoded} tokens as incarnation {incarnation}, but {count} are known")
    if not is_stopped:
        if run.disk.model is None or run.disk.model.policy_version != config.learner.steps:
            raise ChaosError(f"the run has ended, but its model is {run.disk.model}")
        if finished.num_steps != config.learner.steps:
            raise ChaosError(f"the run has ended after {finished.num_steps} of {config.learner.steps} steps")


@functools.lru_cache(maxsize=64)
def _prompts(prompts: str, seed: int) -> PromptSets:
    """Read once for many runs, of the same settings as JSON."""
    return load_prompts(RunConfig(prompts=PromptsConfig.model_validate_json(prompts), seed=seed))
