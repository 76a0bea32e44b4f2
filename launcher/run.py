"""One run, from the first process to the last.

    bind the link -> start processes -> hear them until all have left, or had their time -> stop the rest

`Course` decides, `RunView` remembers, `Display` shows; this module only moves messages between them, the
supervisor, the control link and whoever asks from another terminal. All handlers are synchronous, so nothing
interleaves inside one; what takes long (to start or stop a process) is a task. On every way out of here no process
is left, and `state.json` says how the run ended.

The first signal ends the run in order; the second kills every process at once.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from darts_async.config import RunConfig
from darts_async.protocol import (
    EvaluationCompleted,
    LauncherToProcess,
    ProcessEnded,
    ProcessStatus,
    RunFinished,
    Shutdown,
    StepCompleted,
)
from darts_async.topology import RunPlan
from launcher.control import Control, Heard, Silence
from launcher.course import (
    Action,
    AskToLeave,
    AskToStop,
    Course,
    Kill,
    Limits,
    Lost,
    Notice,
    Outcome,
    RestartRefused,
    Serves,
    Start,
    Stop,
)
from launcher.evaluation import evaluation_text
from launcher.plan import reports_per_step
from launcher.progress import RunView
from launcher.recorder import Recorder, recorded
from launcher.requests import Done, GetStatus, Refused, Reply, Request, RestartProcess, StopRun
from launcher.restarts import Restarts
from launcher.rundir import (
    LOGS_DIR,
    PROCESSES_FILE,
    final_model_path,
    write_summary,
)
from launcher.service import serving_requests
from launcher.status import run_status
from launcher.steps import StepLine, StepMerger
from launcher.summary import Summary, summarise
from launcher.supervisor import ProcessExit, Supervisor
from launcher.view import Display

_TICK_S = 0.25

OpenControl = Callable[[], contextlib.AbstractAsyncContextManager[Control]]


@dataclass(slots=True)
class Run:
    """The state of a run and the handlers of its events."""

    plan: RunPlan
    control: Control
    supervisor: Supervisor
    course: Course
    view: RunView
    display: Display
    recorder: Recorder
    grace_s: float
    merger: StepMerger
    tasks: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup, init=False)
    _num_signals: int = field(default=0, init=False)

    async def conduct(self) -> Outcome:
        """Start everything, and return when everything has ended."""
        async with self.tasks as tasks:
            watching = tasks.create_task(self._watch_exits(), name="watch exits")
            with self._signals():
                await self._start_all()
                while not self.course.over(_now_s()):
                    await self._turn(_TICK_S)
                await self._end(tasks)
            watching.cancel()
        assert self.course.outcome is not None
        return self.course.outcome

    async def _start_all(self) -> None:
        for spec in self.plan.processes:
            if self.course.ending:
                return
            await self._start(spec.name, 1)
            self.display.refresh(self.view, _now_s())

    async def _start(self, name: str, incarnation: int) -> None:
        """Start a process, as this incarnation."""
        self.view.take_start(name, incarnation)
        spec = next(spec for spec in self.plan.processes if spec.name == name)
        try:
            record = await self.supervisor.start(spec, incarnation)
        except OSError as error:
            self._act(self.course.failed_to_start(name, str(error), _now_s()))
            return
        self.recorder.started(name, incarnation, record.pid, _now_s())
        self.course.started(name, _now_s())
        if self.course.ending:  # all the others have been told to leave
            self.supervisor.kill(name)

    async def _turn(self, timeout_s: float) -> None:
        for heard in await self.control.receive(timeout_s):
            self._hear(heard)
        self._act(self.course.tick(_now_s()))
        self.display.refresh(self.view, _now_s())

    async def _end(self, tasks: asyncio.TaskGroup) -> None:
        """Stop who is left, and hear them out: who leaves in order waits for its last words to be acknowledged."""
        self.course.overdue()
        stopping = tasks.create_task(self.supervisor.stop_all(self.grace_s), name="stop all")
        while not stopping.done():
            await self._turn(_TICK_S)
        await self._turn(0.0)
        self._take_lines(self.merger.flush())
        self.display.refresh(self.view, _now_s())

    # --- events ----------------------------------------------------------------------------------------------

    def _hear(self, heard: Heard) -> None:
        name, now_s = heard.process, _now_s()
        is_current = heard.incarnation == self.view.rows[name].incarnation
        match heard.body:
            case ProcessStatus() if is_current:
                self._act(self.course.reported(name, heard.body, now_s))
                self.view.take_status(name, heard.body)
            case StepCompleted():
                self._take_lines(self.merger.add(name, heard.body.step, heard.body.metrics))
            case EvaluationCompleted():
                self._take_evaluation(heard.body)
            case RunFinished():
                self.view.finished = heard.body
                self._act(self.course.finished(heard.body.reason, now_s))
            case Silence() if is_current and name in self.supervisor.running and not self.course.ending:
                self._note(f"nothing is heard of {name}: {heard.body.reason}")

    def _take_lines(self, lines: list[StepLine]) -> None:
        for line in lines:
            now_s = _now_s()
            self.course.progressed(now_s)
            is_new = self.view.take_step(line, now_s)
            self.recorder.step(line, now_s)
            if is_new:
                self.display.step(self.view, line, now_s)

    def _take_evaluation(self, message: EvaluationCompleted) -> None:
        now_s = _now_s()
        self.course.progressed(now_s)
        evaluation = self.view.take_evaluation(message)
        self.recorder.evaluation(evaluation, now_s)
        self.display.note(evaluation_text(evaluation.summary()))  # the view has a place for it: no notice

    async def _watch_exits(self) -> None:
        async for ended in self.supervisor.exits():
            self._take_exit(ended)

    def _take_exit(self, ended: ProcessExit) -> None:
        self.control.forget(ended.name)
        text = "done" if ended.code == 0 else str(ended).removeprefix(f"{ended.name} ")
        self.view.take_exit(ended.name, text, left_cleanly=ended.code == 0 and self.course.ending)
        self._act(self.course.exited(ended, _now_s()))

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case AskToStop(reason=reason):
                    self._tell(self.plan.names("shaper"), Shutdown(reason, finished=False))
                case AskToLeave(finished=finished, reason=reason):
                    self._tell(self.supervisor.running, Shutdown(reason, finished))
                case Notice(text=text):
                    self._note(text)
                case Start(name=name, incarnation=incarnation):
                    self.tasks.create_task(self._start(name, incarnation), name=f"start {name}")
                case Stop(name=name):
                    self.tasks.create_task(self.supervisor.stop(name, self.grace_s), name=f"stop {name}")
                case Kill(name=name):
                    self.recorder.killed(action, _now_s())
                    self.supervisor.kill(name)
                case Lost(ended=ended, restart_at_s=at_s):
                    self.recorder.lost(action, _now_s())
                    self.view.take_restart(ended.name, at_s)
                    self._tell(self.supervisor.running, ProcessEnded(ended.name, ended.incarnation))
                case Serves(name=name, away_s=away_s):
                    self.recorder.serves(action, _now_s())
                    self._note(f"{name} serves again, {away_s:.1f} s after it ended")

    def _tell(self, names: tuple[str, ...], message: LauncherToProcess) -> None:
        for name in names:
            self.control.send(name, message)

    def _note(self, text: str) -> None:
        self.view.note(text)
        self.display.note(text)

    # --- from other terminals --------------------------------------------------------------------------------

    def answer(self, request: Request) -> Reply:
        """Do what somebody asks for, or say why not."""
        match request:
            case GetStatus():
                return run_status(self.view, self.supervisor.pids, _now_s(), ending=self.course.outcome)
            case StopRun(reason=reason):
                self._act(self.course.interrupted(reason, _now_s()))
                return Done("the run is stopping")
            case RestartProcess(process=process):
                return self._restart(process)

    def _restart(self, process: str) -> Reply:
        """One process, or all of a role."""
        names = self.plan.names(process) or (process,)
        try:
            for name in names:
                self._act(self.course.restart(name, _now_s()))
                self._note(f"{name} is restarted by hand")
        except RestartRefused as error:
            return Refused(str(error))
        return Done(f"{', '.join(names)}: restarting")

    # --- signals ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _interrupt(self, number: signal.Signals) -> None:
        self._num_signals += 1
        reason = "stopped by Ctrl-C" if number == signal.SIGINT else f"stopped by {number.name}"
        self._act(self.course.interrupted(reason, _now_s()))
        if self._num_signals > 1:
            self.course.give_up(_now_s())
            self.supervisor.kill_all()


async def run(
    config: RunConfig,
    plan: RunPlan,
    run_dir: Path,
    *,
    open_control: OpenControl,
    display: Display,
    limits: Limits,
) -> tuple[Outcome, Summary]:
    """Carry a run out in a prepared run directory."""
    now_s = _now_s()
    view = RunView(plan, name=config.name, run_dir=str(run_dir), total_steps=config.learner.steps, now_s=now_s)
    supervisor = Supervisor(logs_dir=run_dir / LOGS_DIR, records_path=run_dir / PROCESSES_FILE)
    with recorded(run_dir) as ending:
        async with open_control() as control, supervisor:
            it = Run(
                plan=plan,
                control=control,
                supervisor=supervisor,
                course=Course(plan, limits, Restarts(plan, config.roles, config.seed), now_s=now_s),
                view=view,
                display=display,
                recorder=Recorder(run_dir, now_s),
                grace_s=limits.grace_s,
                merger=StepMerger(reports_per_step(plan)),
            )
            async with serving_requests(run_dir, it.answer):
                ending.outcome = await it.conduct()
    summary = summarise(view, ending.outcome, model_path=final_model_path(run_dir), now_s=_now_s())
    write_summary(run_dir, summary)
    return ending.outcome, summary


def _now_s() -> float:
    return time.monotonic()
