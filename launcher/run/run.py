"""One run, from the first process to the last.

    bind the links -> start nodes and processes -> hear them until all have left, or had their time -> end the nodes

`RunLifecycle` decides about processes and `Fleet` about nodes, `RunView` keeps the data of the screen, and `Display`
shows it. This module only moves messages between them, the links and other terminals. All handlers are synchronous, so
they do not interleave. However a run ends, no process is left on a reachable node, and `state.json` says how it ended.

The first signal ends the run in order; the second kills every process at once. SIGHUP never counts as the second,
because both the kernel and the shell send one when a terminal is closed.
"""

import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from darts_async.config import RunConfig
from darts_async.errors import NO_SPACE_EXIT_CODE, NoSpaceError
from darts_async.faults import install, present
from darts_async.machine.full_disk import has_room, room_of
from darts_async.protocol import (
    EvaluationCompleted,
    LauncherToProcess,
    PeerRefused,
    ProcessEnded,
    ProcessStatus,
    ProcessToLauncher,
    RunFinished,
    ScoreFailed,
    Shutdown,
    StepCompleted,
    TakeUpAgain,
)
from darts_async.reward.worker_messages import failure_text
from darts_async.telemetry import logging_to
from darts_async.topology.links import AGENTS_LINK
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import LAUNCHER, SHAPER, agent_name
from darts_async.topology.run_files import EVENTS_FILE, LOGS_DIR, METRICS_FILE, log_path
from darts_async.trace import Trace, trace_path
from darts_async.transport import Event, PeerDown, PeerUp, Received, Unreadable
from launcher.analysis.earlier_lives import NO_PAST, Past
from launcher.control.control_socket import serving_requests
from launcher.control.metrics_server import serving_metrics
from launcher.control.requests import Done, GetStatus, Refused, Reply, Request, RestartProcess, StopRun
from launcher.display.prometheus import prometheus_text
from launcher.display.status import run_status
from launcher.display.summary import Summary, summarise
from launcher.display.view import Display
from launcher.lifecycle import lifecycle as of_run
from launcher.lifecycle.lifecycle import Limits, RestartRefused, RunLifecycle, RunOutcome
from launcher.lifecycle.restarts import Restarts
from launcher.nodes import fleet as on_nodes
from launcher.nodes.fleet import Fleet
from launcher.nodes.node_messages import Report
from launcher.nodes.nodes import Nodes, agent_command, make_backends
from launcher.nodes.supervisor import ProcessExit
from launcher.plan.plan import reports_per_step
from launcher.progress.evaluation import evaluation_text
from launcher.progress.run_view import RunView
from launcher.progress.step_merger import StepLine, StepMerger
from launcher.run.boundary import Boundary
from launcher.run.interrupts import CaughtSignals, reason_of
from launcher.run.links import Control, open_control
from launcher.run.rollout_watch import watched_rollouts
from launcher.run_dir.json_lines import flushed
from launcher.run_dir.logs import last_words
from launcher.run_dir.run_dir import final_model_path, write_summary
from launcher.sinks.followers import Followers
from launcher.sinks.recorder import Recorder, recorded

NODE_ENDS_WITHIN_S = 20.0
"""Time after the grace of the processes, to kill them and deliver the last reports."""
LEASE_MARGIN_S = 10.0
"""Time between the end of a node's lease and giving up the node: it ends its processes meanwhile, and clocks differ."""
LOOK_FOR_ROOM_S = 1.0
_TICK_S = 0.25


@dataclass(slots=True)
class Run:
    """The state of a run and the handlers of its events."""

    plan: RunPlan
    control: Control
    nodes: Nodes
    fleet: Fleet
    lifecycle: RunLifecycle
    view: RunView
    display: Display
    recorder: Recorder
    followers: Followers
    grace_s: float
    merger: StepMerger
    signals: CaughtSignals
    boundary: Boundary
    _num_orders: int = field(default=0, init=False)
    """Number of intended signals (not SIGHUP)."""
    _nodes_seen: set[str] = field(default_factory=set, init=False)
    _unwritten: str = field(default="", init=False)
    """Why metrics and events cannot be written, if they cannot."""
    _look_for_room_at_s: float = field(default=0.0, init=False)

    async def conduct(self) -> RunOutcome:
        """Start everything, and return when everything has ended."""
        self._do(self.fleet.begin(_now_s()))
        for spec in self.plan.processes:
            self._start(spec.name, self.lifecycle.incarnation(spec.name))
        self.signals.tell(self._interrupt)
        while not self.lifecycle.over(_now_s()):
            await self._turn(_TICK_S)
        await self._end()
        assert self.lifecycle.outcome is not None
        if not self.lifecycle.outcome.goes_on:  # else a signal still means that it is not to
            self.signals.ignore()
        return self.lifecycle.outcome

    def _start(self, name: str, incarnation: int) -> None:
        self.view.take_start(name, incarnation)
        self.lifecycle.ordered(name, _now_s())
        self._do(self.fleet.start(name, incarnation))

    async def _turn(self, timeout_s: float) -> None:
        for event in await self.control.receive(timeout_s):
            if event.link == AGENTS_LINK.name:
                self._hear_of_node(event)
            else:
                self._hear(event)
        for node, reason, was_started in self.nodes.take_news():
            take = self.fleet.keeper_ended if was_started else self.fleet.launch_failed
            self._do(take(node, reason, _now_s()))
        self._do(self.fleet.tick(_now_s()))
        self._act(self.lifecycle.tick(_now_s(), has_room=self._has_room()))
        self._settle()
        self.display.refresh(self.view, _now_s())

    def _has_room(self) -> bool:
        """Whether the disk has space. It is only checked if a process waits for space, once a second."""
        if not self.lifecycle.needs_room:
            return True
        if (now_s := _now_s()) < self._look_for_room_at_s:
            return False
        self._look_for_room_at_s = now_s + LOOK_FOR_ROOM_S
        return has_room(self.recorder.run_dir)

    def _settle(self) -> None:
        """Write what did not fit on the disk before, and show notices of other sinks."""
        before, self._unwritten = self._unwritten, self.recorder.settle()
        if self._unwritten and not before:
            self.note(f"{self._unwritten}: lines are kept until there is space")
        for text in self.followers.take_notices():
            self.note(text)

    async def _end(self) -> None:
        """End the nodes, and receive their last messages: a process that leaves in order waits for acknowledgement."""
        self.lifecycle.overdue()
        self._do(self.fleet.end(self.grace_s))
        deadline_s = _now_s() + self.grace_s + NODE_ENDS_WITHIN_S
        while not self.fleet.is_over and _now_s() < deadline_s:
            await self._turn(_TICK_S)
        await self.nodes.kill([node.name for node in self.fleet.nodes.values() if node.is_up])
        await self._turn(0.0)
        self._take_lines(self.merger.flush())
        self._settle()
        self.display.refresh(self.view, _now_s())

    # --- events ----------------------------------------------------------------------------------------------

    def _hear(self, event: Event) -> None:
        name, incarnation = event.peer, event.incarnation
        match event:
            case PeerDown(reason=reason):
                is_current = incarnation == self.view.rows[name].incarnation
                is_to_leave = self.lifecycle.ending or self.lifecycle.is_stopping(name)
                if is_current and name in self.fleet.running and not is_to_leave:
                    self.note(f"the connection to {name} is down: {reason}")
            case Unreadable(reason=reason):
                self._act(self.lifecycle.refused(name, incarnation, reason))
            case Received():
                message = cast(ProcessToLauncher, event.message)
                if (why := self.boundary.refusal(name, message)) is None:
                    self._take(name, incarnation, message)
                else:
                    self._act(self.lifecycle.refused(name, incarnation, f"{type(message).__name__}: {why}"))

    def _take(self, name: str, incarnation: int, message: ProcessToLauncher) -> None:
        match message:
            case ProcessStatus():
                if incarnation == self.view.rows[name].incarnation:
                    self._act(self.lifecycle.reported(name, message, _now_s()))
                    self.view.take_status(name, message)
            case StepCompleted(step=step, metrics=metrics):
                self._take_lines(self.merger.add(name, step, metrics))
            case EvaluationCompleted():
                self._take_evaluation(message)
            case ScoreFailed(sample_id=sample_id, kind=kind, error=error):
                said = failure_text(kind, error)
                self.note(
                    f"sample {sample_id} has no reward (which is not a reward of 0): {said}; see the log of reward"
                )
            case RunFinished(reason=reason):
                self.view.finished = message
                self._act(self.lifecycle.finished(reason, _now_s()))
            case TakeUpAgain(reason=reason):
                self._act(self.lifecycle.take_up_again(reason, _now_s()))
            case PeerRefused():
                self._take_accusation(name, incarnation, message)

    def _take_accusation(self, accuser: str, its_incarnation: int, refused: PeerRefused) -> None:
        """One process refuses all messages of another. Ignored for an incarnation that has been replaced."""
        accused, incarnation = refused.name, self.lifecycle.incarnation(refused.name)
        if refused.incarnation < incarnation:
            return
        for culprit in self.boundary.culprits(accuser, accused, incarnation):
            if culprit == accused:
                self._act(self.lifecycle.refused(accused, incarnation, f"{refused.reason} (says {accuser})"))
            else:
                alone = f"it refuses the messages of {accused}, and most others do not: {refused.reason}"
                self._act(self.lifecycle.refused(accuser, its_incarnation, alone))

    def _take_lines(self, lines: list[StepLine]) -> None:
        for line in lines:
            now_s = _now_s()
            self.lifecycle.progressed(now_s)
            is_new = self.view.take_step(line, now_s)
            self.recorder.step(line, now_s)
            if is_new:
                self.display.step(self.view, line, now_s)

    def _take_evaluation(self, message: EvaluationCompleted) -> None:
        now_s = _now_s()
        self.lifecycle.progressed(now_s)
        evaluation = self.view.take_evaluation(message)
        self.recorder.evaluation(evaluation, now_s)
        self.display.note(evaluation_text(evaluation.summary()))  # the view has a place for it: no notice

    def _hear_of_node(self, event: Event) -> None:
        node = event.peer.partition("/")[2]
        match event:
            case PeerUp():
                self.fleet.heard(node)
            case PeerDown(reason=reason):
                self._do(self.fleet.silent(node, reason, _now_s()))
            case Unreadable(reason=reason):  # the next agent begins with a complete report
                self.note(f"the agent of node {node} sends unreadable messages and is restarted: {reason}")
                self._do(self.fleet.restart_agent(node))
            case Received(incarnation=incarnation, message=report):
                self._do(self.fleet.reported(node, incarnation, cast(Report, report), _now_s()))

    def _do(self, steps: list[on_nodes.Step]) -> None:
        for step in steps:
            match step:
                case on_nodes.Tell(node=node, order=order):
                    present().reach("launcher.before_order")
                    self.control.order(node, order)
                case on_nodes.Launch(node=node):
                    self.nodes.launch(node)
                case on_nodes.Started(record=record):
                    self.recorder.started(record.name, record.incarnation, record.pid, _now_s())
                    self._act(self.lifecycle.started(record.name, _now_s()))
                case on_nodes.NotStarted(name=name, error=error):
                    self._act(self.lifecycle.failed_to_start(name, error, _now_s()))
                case on_nodes.Ended(exit=ended):
                    self._take_exit(ended)
                case on_nodes.NodeFailed(reason=reason, culprit=culprit):
                    self._act(self.lifecycle.node_failed(reason, _now_s(), culprit))
                case on_nodes.NodeCame() | on_nodes.NodeSilent() | on_nodes.NodeLost():
                    self._take_node(step)

    def _take_node(self, step: on_nodes.NodeCame | on_nodes.NodeSilent | on_nodes.NodeLost) -> None:
        self.recorder.node(step, _now_s())
        match step:
            case on_nodes.NodeCame(node=node, away_s=away_s) if away_s is not None:
                self.note(f"node {node} is back, {away_s:.1f} s after it was lost")
            case on_nodes.NodeCame(node=node, agent_incarnation=incarnation) if node in self._nodes_seen:
                self.note(f"node {node} has a new agent, its number {incarnation}")
            case on_nodes.NodeSilent(node=node, reason=reason):
                self.note(f"the connection to node {node} is down: {reason}")
            case on_nodes.NodeLost(node=node, reason=reason):
                self.control.forget_node(node)
                self.note(f"node {node} is lost: {reason}")
        self._nodes_seen.add(step.node)

    def _take_exit(self, ended: ProcessExit) -> None:
        self.control.forget(ended.name)
        text = "done" if ended.code == 0 else str(ended).removeprefix(f"{ended.name} ")
        self.view.take_exit(ended.name, text, left_cleanly=ended.code == 0 and self.lifecycle.ending)
        self._act(self.lifecycle.exited(ended, _now_s(), self._cause_of(ended)))

    def _cause_of(self, ended: ProcessExit) -> str:
        """Why a process has ended, if known; empty if it was killed or left in order."""
        run_dir = self.recorder.run_dir
        if ended.code == NO_SPACE_EXIT_CODE:
            return str(room_of(run_dir))
        return last_words(run_dir / LOGS_DIR, ended.name) if ended.code > 0 else ""

    def _act(self, actions: list[of_run.Action]) -> None:
        for action in actions:
            match action:
                case of_run.AskToStop(reason=reason):
                    self._tell(self.plan.names(SHAPER.name), Shutdown(reason, finished=False))
                case of_run.AskToLeave(finished=finished, reason=reason):
                    num_steps = self.view.finished.num_steps if self.view.finished is not None else None
                    self._tell(self.fleet.running, Shutdown(reason, finished, num_steps))
                case of_run.Notice(text=text):
                    self.note(text)
                case of_run.Start(name=name, incarnation=incarnation):
                    self._start(name, incarnation)
                case of_run.Stop(name=name):
                    self._do(self.fleet.stop(name, self.grace_s))
                case of_run.Kill(name=name):
                    self.recorder.killed(action, _now_s())
                    self._do(self.fleet.kill(name))
                case of_run.Drop(name=name):
                    self._do(self.fleet.kill(name))
                case of_run.Lost(ended=ended, restart_at_s=at_s, needs_room=needs_room):
                    self.recorder.lost(action, _now_s())
                    self.view.take_restart(ended.name, at_s, _now_s(), needs_room=needs_room)
                    self._tell(self.fleet.running, ProcessEnded(ended.name, ended.incarnation))
                case of_run.Serves(name=name, away_s=away_s):
                    self.recorder.serves(action, _now_s())
                    self.view.take_service(name)
                    self.note(f"{name} serves again, {away_s:.1f} s after it ended")

    def _tell(self, names: tuple[str, ...], message: LauncherToProcess) -> None:
        for name in names:
            self.control.send(name, message)

    def note(self, text: str) -> None:
        self.view.note(text)
        self.display.note(text)

    # --- from other terminals --------------------------------------------------------------------------------

    def answer(self, request: Request) -> Reply:
        """Carry out a request from another terminal, or say why not."""
        match request:
            case GetStatus():
                return run_status(self.view, self.fleet, _now_s(), ending=self.lifecycle.outcome)
            case StopRun(reason=reason):
                self._act(self.lifecycle.interrupted(reason, _now_s()))
                return Done("the run is stopping")
            case RestartProcess(process=process):
                return self._restart(process)

    def _restart(self, process: str) -> Reply:
        """One process, or all of a role, or the agent of a node."""
        for node in self.fleet.nodes:
            if process == agent_name(node):
                self._do(self.fleet.restart_agent(node))
                return Done(f"{process}: restarting")
        names = self.plan.names(process) or (process,)
        try:
            for name in names:
                self._act(self.lifecycle.restart(name, _now_s()))
                self.recorder.restarted(name, _now_s())
                self.note(f"{name} is restarted by the user")
        except RestartRefused as error:
            return Refused(str(error))
        return Done(f"{', '.join(names)}: restarting")

    # --- signals ---------------------------------------------------------------------------------------------

    def _interrupt(self, number: signal.Signals) -> None:
        self._act(self.lifecycle.interrupted(reason_of(number), _now_s()))
        self._num_orders += number != signal.SIGHUP
        if self._num_orders > 1:
            self.lifecycle.give_up(_now_s())
            for name in self.fleet.running:
                self._do(self.fleet.kill(name))


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """All that one life of a run needs, once its directory has been written."""

    config: RunConfig
    plan: RunPlan
    run_dir: Path
    display: Display
    limits: Limits
    signals: CaughtSignals
    past: Past = NO_PAST


async def run(prepared: PreparedRun) -> tuple[RunOutcome, Summary]:
    """Carry a run out, for the first time or, with a `past`, further. If the run continues in another life, signals
    that come later are kept for that one. Raises `TransportError` if the launcher's links cannot be opened."""
    life, telemetry = prepared.past.life, prepared.config.telemetry
    install(LAUNCHER, life)
    path = log_path(prepared.run_dir / LOGS_DIR, LAUNCHER)
    with logging_to(path, process=LAUNCHER, level=telemetry.log_level, max_mb=telemetry.log_max_mb):
        return await _carry_out(prepared)


async def _carry_out(prepared: PreparedRun) -> tuple[RunOutcome, Summary]:
    config, plan, run_dir, past = prepared.config, prepared.plan, prepared.run_dir, prepared.past
    display, limits = prepared.display, prepared.limits
    now_s = _now_s()
    began_s = now_s - past.elapsed_s
    view = RunView(plan, name=config.name, run_dir=str(run_dir), total_steps=config.learner.steps, now_s=began_s)
    view.recall(past.first_incarnations, past.lines, past.evaluations)
    trace = _open_trace(config, run_dir, past.life)
    recorder = Recorder(run_dir, began_s, trace)
    telemetry = config.telemetry
    followers = Followers(run_dir, config, telemetry.sinks)
    restarts = Restarts(plan, config.roles, config.seed, past.first_incarnations)
    with recorded(run_dir, past.life) as ending:
        if past.life > 1:
            recorder.resumed(past.life, past.changes, now_s)
        backends = make_backends(config, plan, run_dir)
        command_of = partial(agent_command, config, run_dir, life=past.life)
        control = open_control(plan, run_dir, config.transport, past.life)
        async with control as links, Nodes(backends, command_of) as nodes:
            it = Run(
                plan=plan,
                control=links,
                nodes=nodes,
                fleet=Fleet(plan, lost_after_s=config.network.lease_s + LEASE_MARGIN_S),
                lifecycle=RunLifecycle(plan, limits, restarts, now_s=now_s),
                view=view,
                display=display,
                recorder=recorder,
                followers=followers,
                grace_s=limits.grace_s,
                merger=StepMerger(reports_per_step()),
                signals=prepared.signals,
                boundary=Boundary(plan, config.learner.steps),
            )
            for text in (*past.notices, *(f"changed: {each}" for each in past.changes)):
                it.note(text)
            files = run_dir / METRICS_FILE, run_dir / EVENTS_FILE
            metrics = serving_metrics(telemetry.prometheus_port, lambda: prometheus_text(view, _now_s()), it.note)
            rollouts = watched_rollouts(run_dir, view.take_rollouts)
            async with serving_requests(run_dir, it.answer), metrics, flushed(*files), rollouts, followers:
                ending.outcome = await it.conduct()
        for text in followers.take_notices():
            display.note(text)
        if ending.outcome.goes_on:
            ending.outcome = it.lifecycle.outcome or ending.outcome  # a signal or `down` may have come since
            prepared.signals.keep()
        trace.close()
        # Written before `state.json`, so that every run that has ended has its summary.
        summary = summarise(view, ending.outcome, model_path=final_model_path(run_dir), now_s=_now_s())
        try:
            write_summary(run_dir, summary)
        except NoSpaceError as error:
            display.note(str(error))
    if ending.unsaid:
        display.note(f"{ending.unsaid}; `darts-launch resume {run_dir}` ends the run once there is space")
    return ending.outcome, summary


def _open_trace(config: RunConfig, run_dir: Path, life: int) -> Trace:
    if not config.telemetry.trace:
        return Trace()
    return Trace(trace_path(run_dir, LAUNCHER, life), LAUNCHER, life, int(config.telemetry.trace_max_mb * 1e6))


def _now_s() -> float:
    return time.monotonic()
