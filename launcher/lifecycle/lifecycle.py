"""The lifecycle of a run: pure decisions about when and why it ends, and about processes that end.

The states of a run (`RUN_LIFE`):

    running  -> stopping  a signal, a process that ends for good or never reports, no progress
             -> leaving   the shaper says `RunFinished`
             -> replaced  the shaper wants all processes to be new: another life of the run begins
    stopping -> leaving   the shaper has accounted for every sample, is gone, or is late

While the run is running, a process that ends or hangs is restarted (see `restarts` and `liveness`). A full disk may
delay steps until there is space, up to a time limit. In `stopping` only the shaper has been asked to stop. It cancels
samples that are decoded and accounts for them, for which it needs the other processes. Its `RunFinished`, its death or
a deadline leads to `leaving`, in which all processes are asked to leave. At the last deadline the supervisor stops the
rest. The first reason for the end is kept. After the shaper's `RunFinished` the model and the ledger are complete, so
the exits of processes no longer matter.
"""

from dataclasses import dataclass
from typing import Literal

from darts_async.protocol import ProcessStatus
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import LEARNER, SHAPER, role_of
from darts_async.transitions import Transitions
from launcher.lifecycle.liveness import Liveness
from launcher.lifecycle.progress_watch import ProgressWatch
from launcher.lifecycle.restarts import EndRun, LeaveDown, Restarts, StartAgain
from launcher.nodes.supervisor import ProcessExit

Status = Literal["finished", "stopped", "failed"]

RUN_LIFE = Transitions(
    {
        ("running", "stopping"): "a signal, a process that ends for good or never reports, no progress",
        ("running", "leaving"): "the shaper says `RunFinished`",
        ("running", "replaced"): "the shaper wants all processes to be new: another life of the run begins",
        ("stopping", "leaving"): "the shaper has accounted for every sample, is gone, or is late",
    }
)

NODE_COMES_UP_WITHIN_S = 60.0
"""How long a process may wait for its node, in addition to its start timeout."""

NOT_SERVING = ("starting", "loading", "waiting for weights", "catching up")
"""States in which a process reports, but does no work yet."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of the phases of a run."""

    finish_s: float = 600.0
    """For all processes to leave after the last step."""
    stop_s: float = 10.0
    """For all processes to leave when the run is cut short. The shaper has the first half."""
    save_s: float = 0.0
    """Additional time for the learner to write a checkpoint."""
    grace_s: float = 5.0
    """Between SIGTERM and SIGKILL."""
    no_progress_s: float = 1800.0
    """A run without a step or an evaluation for this long has failed."""
    no_space_s: float = 86400.0
    """A run that waits for space on the disk for this long has failed."""
    num_lives: int = 10
    """How many further lives a run may begin without the user."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended. `culprit` is the process whose log says more."""

    status: Status
    reason: str
    culprit: str | None = None
    goes_on: bool = False
    """Only this life has ended: the run is resumed at once."""


@dataclass(frozen=True, slots=True)
class AskToStop:
    """Send `Shutdown` to the shaper, which cancels running samples and reports."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskToLeave:
    """Send `Shutdown` to every process."""

    finished: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Tell the user something."""

    text: str


@dataclass(frozen=True, slots=True)
class Start:
    """Restart a process, as this incarnation."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask a process to end, and kill it if it does not."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a process that hangs or is refused."""

    name: str
    incarnation: int
    reason: str
    kind: Literal["hangs", "refused"] = "hangs"


@dataclass(frozen=True, slots=True)
class Drop:
    """Kill a process that depends on one that has ended, so that both restart together."""

    name: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The run continues without a process until `restart_at_s`, or, if that is None, until a user restarts it. The
    other processes are told that this incarnation is over."""

    ended: ProcessExit
    restart_at_s: float | None
    needs_room: bool = False


@dataclass(frozen=True, slots=True)
class Serves:
    """A restarted process works again."""

    name: str
    incarnation: int
    away_s: float


Action = AskToStop | AskToLeave | Notice | Start | Stop | Kill | Drop | Lost | Serves


class RestartRefused(ValueError):
    """A process cannot be restarted by hand."""


class RunLifecycle:
    """The state of a run. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self, plan: RunPlan, limits: Limits, restarts: Restarts, *, now_s: float) -> None:
        self._limits = limits
        self._restarts = restarts
        self._names = tuple(spec.name for spec in plan.processes)
        start_timeouts_s = {spec.name: spec.start_timeout_s for spec in plan.processes}
        self._liveness = Liveness(restarts.policies, start_timeouts_s)
        self._progress = ProgressWatch(no_progress_s=limits.no_progress_s, no_space_s=limits.no_space_s, now_s=now_s)
        self._away_since_s: dict[str, float] = {}
        self._running: set[str] = set()
        self._stopping: set[str] = set()  # asked to end: the supervisor has a deadline for that
        self._shapers = plan.names(SHAPER.name)
        self._deadline_s: float | None = None
        self._saved_by_s = 0.0
        """Until when to wait for the learner alone."""
        self._leave_by_s = 0.0  # while stopping
        self.phase = "running"
        """A state of `RUN_LIFE`."""
        self.outcome: RunOutcome | None = None
        """Set as soon as the run is ending."""

    @property
    def ending(self) -> bool:
        """The processes have been asked to leave."""
        return self.outcome is not None

    def over(self, now_s: float) -> bool:
        """Whether all processes have ended, or their time is up."""
        if self._deadline_s is None or not self._running:
            return self._deadline_s is not None
        learners = [name for name in self._running if role_of(name) is LEARNER]
        # One that has not reported has nothing to save; its node may be lost, and it never come.
        saves = now_s < self._saved_by_s and not self._liveness.unheard.issuperset(learners)
        return now_s >= self._deadline_s and not saves

    def incarnation(self, name: str) -> int:
        return self._restarts.incarnation(name)

    def ordered(self, name: str, now_s: float) -> None:
        """A process will be started on its node, which may have to come up first."""
        self._running.add(name)
        self._stopping.discard(name)
        self._liveness.expect(name, now_s + NODE_COMES_UP_WITHIN_S)

    def started(self, name: str, now_s: float) -> list[Action]:
        """A process was started, and must report in time. It is dropped if the run is ending."""
        self._liveness.expect(name, now_s)
        is_too_late = self.outcome is not None  # all other processes have been asked to leave
        return self._drop(name) if is_too_late or self._restarts.is_unwanted(name) else []

    def failed_to_start(self, name: str, error: str, now_s: float) -> list[Action]:
        self._has_left(name)
        reason = f"{name} cannot be started: {error}"
        if not self._restarts.is_first(name) and self.outcome is None:  # it could start before: treat as a death
            return self._lose(ProcessExit(name, 0, -1, self._restarts.incarnation(name)), reason, now_s)
        return self._cut_short(RunOutcome("failed", reason), now_s)

    def node_failed(self, reason: str, now_s: float, culprit: str | None = None) -> list[Action]:
        return self._cut_short(RunOutcome("failed", reason, culprit), now_s)

    def reported(self, name: str, status: ProcessStatus, now_s: float) -> list[Action]:
        news = self._progress.reported(name, status.hindrance)
        notices: list[Action] = [Notice(news)] if news else []
        if name not in self._stopping:
            self._liveness.heard(name, status, now_s)
        if status.state in NOT_SERVING:
            return notices
        self._restarts.served(name)
        since_s = self._away_since_s.pop(name, None)
        if since_s is None:
            return notices
        return [*notices, Serves(name, self._restarts.incarnation(name), now_s - since_s)]

    def refused(self, name: str, incarnation: int, reason: str) -> list[Action]:
        """This incarnation sends invalid messages: it is killed, and its restart policy applies."""
        if self.outcome is not None or name not in self._running or name in self._stopping:
            return []
        if incarnation < self._restarts.incarnation(name):
            return []
        self._expect_end(name)
        kill = Kill(name, self._restarts.incarnation(name), reason, "refused")
        return [kill, Notice(f"{name} is refused and killed: {reason}")]

    def restart(self, name: str, now_s: float) -> list[Action]:
        """A user asks for the restart of a process. Raises `RestartRefused`."""
        if self.outcome is not None:
            raise RestartRefused(f"the run is ending: {self.outcome.reason}")
        if name not in self._names:
            raise RestartRefused(f"there is no {name!r}; the run has {', '.join(sorted(self._names))}")
        is_being_started = self._restarts.is_up(name) and name not in self._running
        if is_being_started or not self._restarts.asked(name, now_s):
            return []
        self._expect_end(name)
        return [Stop(name)]

    def is_stopping(self, name: str) -> bool:
        """Whether the process has been asked to end, so that its exit is expected."""
        return name in self._stopping

    def progressed(self, now_s: float) -> None:
        self._progress.progressed(now_s)

    @property
    def needs_room(self) -> bool:
        """Whether a process waits for space on the disk to restart."""
        return self._restarts.needs_room

    def finished(self, reason: str, now_s: float) -> list[Action]:
        """The shaper has finished: all steps are done, or it was told to stop."""
        if self.outcome is not None:
            return self._leave()
        self._to("leaving")
        self.outcome, self._deadline_s = RunOutcome("finished", reason), now_s + self._limits.finish_s
        return [AskToLeave(True, reason), Notice(reason)]

    def take_up_again(self, reason: str, now_s: float) -> list[Action]:
        """The shaper needs new processes: all are ended at once, as by a kill, and another life of the run begins."""
        if self.outcome is not None:
            return []
        if not self._limits.num_lives:
            return self._cut_short(RunOutcome("failed", f"{reason}, again and again"), now_s)
        self._to("replaced")
        self.outcome, self._deadline_s = RunOutcome("failed", reason, goes_on=True), now_s
        return [Notice(f"{reason}: all processes are ended, and the run is resumed")]

    def interrupted(self, reason: str, now_s: float) -> list[Action]:
        """The user wants the run to stop."""
        if self.outcome is not None and self.outcome.goes_on:
            self.outcome = RunOutcome("stopped", reason)
            return []
        if self.outcome is not None and self.outcome.status == "finished":  # the user does not want to wait
            self.outcome, self._deadline_s = RunOutcome("stopped", reason), now_s + self._limits.stop_s
            return []
        return self._cut_short(RunOutcome("stopped", reason), now_s)

    def give_up(self, now_s: float) -> None:
        """Stop waiting for any process."""
        self._deadline_s = self._saved_by_s = now_s

    def exited(self, ended: ProcessExit, now_s: float, cause: str = "") -> list[Action]:
        """A process has ended, unexpectedly if the run is running. `cause`: its last log line, or the full disk."""
        self._has_left(ended.name)
        if self.outcome is None:
            return self._lose(ended, f"{ended}: {cause}" if cause else str(ended), now_s)
        return self._leave() if ended.name in self._shapers else []

    def overdue(self) -> None:
        if self.outcome is not None and self.outcome.status == "finished" and self._running:
            names = sorted(self._running)
            reason = f"{', '.join(names)} did not leave within {self._limits.finish_s:.0f} s after the last step"
            if self._progress.is_hindered:
                reason += ": there is no space on the disk"
            self.outcome = RunOutcome("failed", reason, names[0])

    def tick(self, now_s: float, *, has_room: bool = True) -> list[Action]:
        """Look at the clock: for missing reports and missing steps. `has_room`: whether the disk has space."""
        if self.outcome is not None:
            return self._leave() if now_s >= self._leave_by_s else []
        actions: list[Action] = []
        for name, reason in self._liveness.late(now_s):
            if self._restarts.is_first(name):
                return self._cut_short(RunOutcome("failed", f"{name} {reason}", name), now_s)
            actions += self._kill(name, f"it {reason}")
        for name, reason in self._liveness.hanging(now_s):
            actions += self._kill(name, reason)
        due = self._restarts.take_due(now_s, has_room=has_room)
        actions += [Start(name, self._restarts.incarnation(name)) for name in due]
        if failure := self._progress.failure(now_s, needs_space=self.needs_room):
            return actions + self._cut_short(RunOutcome("failed", failure), now_s)
        if not self._liveness.unheard and (warning := self._progress.warning(now_s)):
            actions.append(Notice(warning))
        return actions

    def _kill(self, name: str, reason: str) -> list[Action]:
        self._liveness.forget(name)
        return [Kill(name, self._restarts.incarnation(name), reason), Notice(f"{name} hangs and is killed: {reason}")]

    def _drop(self, name: str) -> list[Action]:
        self._expect_end(name)
        return [Drop(name)]

    def _expect_end(self, name: str) -> None:
        self._liveness.forget(name)
        self._stopping.add(name)

    def _has_left(self, name: str) -> None:
        self._liveness.forget(name)
        self._progress.ended(name)
        self._running.discard(name)
        self._stopping.discard(name)

    def _lose(self, ended: ProcessExit, reason: str, now_s: float) -> list[Action]:
        match self._restarts.ended(ended.name, ended.code, now_s):
            case StartAgain(delay_s=delay_s, to_end=to_end, needs_room=needs_room):
                self._away_since_s.setdefault(ended.name, now_s)
                when = "once there is space" if needs_room else f"in {delay_s:.1f} s" if delay_s else "at once"
                others = f" with {', '.join(to_end)}" if to_end else ""
                drops = [action for name in to_end for action in self._drop(name)]
                lost = Lost(ended, now_s + delay_s, needs_room)
                return [lost, *drops, Notice(f"{reason}; it restarts {when}{others}")]
            case LeaveDown(reason=why):
                self._away_since_s.setdefault(ended.name, now_s)
                return [Lost(ended, None), Notice(f"{reason}; the run continues without it: {why}")]
            case EndRun(reason=why):
                return self._cut_short(RunOutcome("failed", f"{reason}: {why}", ended.name), now_s)

    def _cut_short(self, outcome: RunOutcome, now_s: float) -> list[Action]:
        """End the run before its last step. No effect if it is ending already."""
        if self.outcome is not None:
            return []
        self._to("stopping")
        self.outcome = outcome
        self._deadline_s = now_s + self._limits.stop_s
        self._saved_by_s = self._deadline_s + self._limits.save_s
        self._leave_by_s = now_s + self._limits.stop_s / 2
        shaper_listens = any(name in self._running and name not in self._liveness.unheard for name in self._shapers)
        return [Notice(outcome.reason), *([AskToStop(outcome.reason)] if shaper_listens else self._leave())]

    def _leave(self) -> list[Action]:
        if self.outcome is None or self.phase != "stopping":
            return []
        self._to("leaving")
        return [AskToLeave(False, self.outcome.reason)]

    def _to(self, phase: str) -> None:
        RUN_LIFE.check(self.phase, phase, lambda: f"the run ({self.outcome or 'not ending'})")
        self.phase = phase
