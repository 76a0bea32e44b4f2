"""The shaper process: the only IO of the shaper. Events go into `ReplayableState`, its outputs go out.

What happened goes to the journal and what was decided to the ledger, once per batch of events: before any peer hears of
it, and before the events are acknowledged. A shaper that was killed continues where the journal ends: what it decided
after that no peer knows, and the events come again. The time of the state stops while there is no shaper, so that no
group is to blame for its absence, and does not run backwards when a machine starts again.

About once a second both files are flushed to the disk by a thread, the ledger first, and then a new journal that is due
takes its place: so a loss of power takes a second of both, and never a record that is older than the head of the
journal. A shaper that is started in another life of the run takes up what is left: see `recovery`.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import structlog

from darts_async.actor import TERMINATED, Gauges, Runtime, main
from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.models.location import load_tokenizer, resolve_model_path, stop_token_ids, vocab_size
from darts_async.prompts.load import PromptSets, load_prompts
from darts_async.protocol import Cancel, Message, SampleRejected, Shutdown
from darts_async.shaper.boundary import Boundary
from darts_async.shaper.durable.journal import FoundJournal, Journal, read_journal
from darts_async.shaper.durable.recovery import newest_checkpoint, take_up, take_up_again
from darts_async.shaper.durable.replayable_state import (
    Abandoned,
    AnyInput,
    CameUp,
    Confirmed,
    Heard,
    Reopened,
    ReplayableState,
    Restarted,
    RolloutsWritten,
    Stopped,
    Ticked,
    WentDown,
    is_report,
)
from darts_async.shaper.ledger import (
    GroupDropped,
    GroupShipped,
    LedgerWriter,
    SampleEnded,
    SamplePlaced,
    VersionSeen,
    scan_ledger,
)
from darts_async.shaper.outbox import Forget, Output, SendTo
from darts_async.shaper.phases import RunPhase
from darts_async.shaper.rollout_writer import RolloutWriter
from darts_async.shaper.state import Incoming, ShaperState, StateSnapshot
from darts_async.topology.links import LAUNCHER_LINK, link_between
from darts_async.topology.roles import LAUNCHER, SHAPER, role_of
from darts_async.topology.run_files import JOURNAL_FILE, LEDGER_FILE, SAMPLES_DIR
from darts_async.transport import Event, PeerDown, PeerUp, Received

FLUSH_EVERY_S = 1.0
"""What was written longer ago than this is on the disk, but for the time that the disk takes."""
SLOW_FLUSH_S = 10.0
"""A disk that takes longer is worth a warning: so much more would be lost with the power."""
STOP_WITHIN_S = 4.0
"""How long engines have to acknowledge what a stop cancels."""

log = structlog.get_logger()


class ShaperActor:
    """See the module."""

    def __init__(
        self,
        runtime: Runtime,
        sets: PromptSets,
        stop_token_ids: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
        boundary: Boundary | None = None,
        writer: RolloutWriter | None = None,
    ) -> None:
        """
        Args:
            sets: the prompts of the run.
            stop_token_ids: the tokens that end a response, where the engine's model names any.
            clock: seconds since some fixed moment.
            boundary: what is taken from peers, where the engine's model has a vocabulary.
            writer: of rollouts; without one they are given up.
        """
        self._writer = writer
        self._runtime = runtime
        self._boundary = boundary or Boundary(runtime.config, runtime.run_dir)
        self._clock = clock
        config = runtime.config
        self._journal = Journal(runtime.run_dir / JOURNAL_FILE)
        self._ledger = LedgerWriter(runtime.run_dir / LEDGER_FILE)

        def make_state(snapshot: StateSnapshot | None, config: RunConfig = config) -> ShaperState:
            return ShaperState(config, sets.in_order(config.seed), sets.held_out, stop_token_ids, snapshot)

        self._make_state = make_state
        self._flushes_new_journal = False
        self._inputs: list[AnyInput] = []
        self._outputs: list[Output] = []
        try:
            self._replayable = self._begin()
        except DataError:
            self._ledger.close()
            raise
        self._ahead_s = self._replayable.now_s - self._clock()
        runtime.heard = self._replayable.heard
        self._take(Restarted(self._now_s()))
        if self._state.phase in (RunPhase.STOPPING, RunPhase.FINISHED):  # no shaper is started in a run that ends
            self._take(Reopened(self._now_s(), runtime.plan.life))
        self._outputs = [*self._replayable.reports, *(output for output in self._outputs if not is_report(output))]
        self._stop_at_s: float | None = None
        self._leaving = self._terminated = False
        self._num_steps = self._state.num_steps
        """When files of rollouts were last compared with it."""
        if writer is not None:
            writer.void(self._state.work.rollouts.void_from(self._num_steps))

    def _begin(self) -> ReplayableState:
        """For the first time, in place of a process of this life of the run, or in place of those of another life."""
        path, life = self._runtime.run_dir / JOURNAL_FILE, self._runtime.plan.life
        found = read_journal(path)
        if life == 1 and found.head is None and not self._ledger.num_bytes:
            replayable = ReplayableState(self._make_state)
            replayable.now_s = self._clock()
            self._journal.begin(replayable.to_head(0))
            return replayable
        if life > 1 and (found.head is None or found.head.place.life != life):
            return self._begin_life(found)
        replayable = take_up(found, self._ledger, self._make_state)
        self._journal.resume(found.num_bytes)
        log.info("taken_up", journal_bytes=found.num_bytes, phase=replayable.state.phase.name)
        return replayable

    def _begin_life(self, found: FoundJournal) -> ReplayableState:
        """All processes are new, and the files may have lost what was not on the disk yet."""
        run_dir, plan = self._runtime.run_dir, self._runtime.plan
        ledger = scan_ledger(run_dir / LEDGER_FILE)
        if plan.from_checkpoint:
            found = FoundJournal(None, [], 0, "it is not to be used")
        before = self._runtime.config if found.head is None else RunConfig.model_validate_json(found.head.settings)
        taken_up = take_up_again(
            found,
            ledger,
            newest_checkpoint(run_dir),
            self._make_state,
            life=plan.life,
            now_s=self._clock(),
            make_before=partial(self._make_state, config=before),
        )
        log.info(
            "taken_up_again",
            source=taken_up.source,
            life=plan.life,
            journal=found.fault or "whole",
            ledger_damaged_at=ledger.damaged_at,
            num_records=ledger.counted.lineage.num_records,
            num_records_now=taken_up.replayable.lineage.num_records,
        )
        self._ledger.cut(ledger.num_bytes)
        self._ledger.append(taken_up.records)
        self._ledger.flusher()()
        self._journal.begin(taken_up.replayable.to_head(self._ledger.num_bytes))
        self._outputs = [output for output in taken_up.outputs if isinstance(output, SendTo | Forget)]
        return taken_up.replayable

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Nothing takes long."""
        tasks.create_task(self._keep_flushed(), name="flush")

    async def _keep_flushed(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            began_s = self._clock()
            await asyncio.to_thread(self.begin_flush())
            self.end_flush()
            took_s = self._clock() - began_s
            if took_s > SLOW_FLUSH_S:
                log.warning("slow_disk", flush_took_s=round(took_s, 1))

    def begin_flush(self) -> Callable[[], None]:
        """What has all files on the disk, to be called in any thread; `end_flush` comes after it."""
        self._flushes_new_journal = self._journal.is_prepared
        flush_ledger, flush_journal = self._ledger.flusher(), self._journal.flusher()

        def work() -> None:
            flush_ledger()
            flush_journal()

        return work

    def end_flush(self) -> None:
        """A new journal that was flushed takes the place of the old one."""
        if self._flushes_new_journal:
            self._runtime.faults.reach("shaper.before_new_journal")
            self._journal.replace()

    @property
    def has_new_journal(self) -> bool:
        """Whether one waits for being flushed."""
        return self._journal.is_prepared

    def handle(self, event: Event) -> None:
        """One event: decide."""
        now_s = self._now_s()
        match event:
            case Received(peer=peer, message=message) if reason := self._refusal(peer, message):
                self._runtime.refuse(event, f"{type(message).__name__}: {reason}")
            case Received(peer=peer, incarnation=incarnation, message=message, seq=seq):
                if isinstance(message, SampleRejected):
                    log.error("sample_rejected", sample_id=message.sample_id, error=message.error)
                self._take(Heard(now_s, peer, incarnation, seq, cast(Incoming, message)))
            case PeerUp(peer=peer, incarnation=incarnation):
                self._take(CameUp(now_s, peer, incarnation))
            case PeerDown(peer=peer, reason=reason, is_gone=is_gone):
                log.warning("peer_lost", peer=peer, reason=reason)
                self._take(WentDown(now_s, peer, is_gone))

    def tick(self, now_s: float) -> None:
        """Let the state see that time has passed; give up on a stop that takes too long. Then record and send."""
        self._take(Ticked(self._now_s()))
        if self._stop_at_s is not None and now_s > self._stop_at_s:
            self._stop_at_s = None
            self._take(Abandoned(self._now_s()))
        with self._runtime.clock.busy("record"):
            self._settle()

    def shutdown(self, message: Shutdown) -> None:
        """By a signal: leave, and another process takes this one's place. Early: cancel what runs, report once the
        engines have acknowledged, and leave. At the end: leave."""
        if message is TERMINATED:
            self._terminated = True
            return
        self._leaving = True
        if self._state.phase is not RunPhase.FINISHED and self._stop_at_s is None:
            self._stop_at_s = self._clock() + STOP_WITHIN_S
            self._take(Stopped(self._now_s(), message.reason))

    @property
    def done(self) -> bool:
        """Everything is accounted for and the launcher has said so, or another is to take this one's place."""
        return self._terminated or (self._leaving and self._state.phase is RunPhase.FINISHED)

    def gauges(self) -> Gauges:
        """For the status."""
        work = self._state.work
        return Gauges(
            state=self._state.phase.name.lower().replace("_", " "),
            policy_version=self._state.num_steps,
            num_tokens=work.totals.num_tokens_received,
            num_in_flight=sum(len(seat.sample_ids) for seat in work.generators.seats.values()),
        )

    async def close(self) -> None:
        """Flush the files to the disk and close them."""
        self._ledger.close()
        self._journal.close()
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close, self._state.work.rollouts.unwritten)

    def validate(self) -> None:
        """The invariants of the state."""
        self._state.validate()

    @property
    def _state(self) -> ShaperState:
        return self._replayable.state

    def _refusal(self, peer: str, message: Message) -> str | None:
        return self._boundary.refusal(self._state, peer, cast(Incoming, message))

    def _now_s(self) -> float:
        return self._clock() + self._ahead_s

    def _take(self, given: AnyInput) -> None:
        """Decide what follows from an input; `_settle` does it."""
        with self._runtime.clock.busy("decide"):
            self._outputs += self._replayable.take(given)
        self._inputs.append(given)

    def _settle(self) -> None:
        """Record what was taken, then do what follows."""
        faults = self._runtime.faults
        records = [output for output in self._outputs if not isinstance(output, SendTo | Forget)]
        if records:
            faults.reach("shaper.before_record")
        self._journal.append(self._inputs)
        if records:
            faults.reach("shaper.before_ledger")
            self._ledger.append(records)
            faults.reach("shaper.before_send")
        self._inputs = []
        self._carry_out()
        if self._journal.is_due:
            self._journal.prepare(self._replayable.to_head(self._ledger.num_bytes))
        for peer in {report.peer for report in self._replayable.reports}:
            if not self._runtime.links[_link_to(peer)].num_unacknowledged(peer):
                self._take(Confirmed(self._now_s(), peer))
        self._keep_rollouts()

    def _keep_rollouts(self) -> None:
        """Have rollouts written, and take what has become of earlier ones."""
        rollouts, writer = self._state.work.rollouts, self._writer
        before, self._num_steps = self._num_steps, self._state.num_steps
        if writer is not None and self._num_steps < before:  # the state has started over from a checkpoint
            writer.void(rollouts.void_from(self._num_steps))
        unwritten = rollouts.unwritten
        done = [(file.serial, True) for file in unwritten] if writer is None else writer.turn(unwritten)
        for serial, is_given_up in done:
            self._take(RolloutsWritten(self._now_s(), serial, is_given_up))

    def _carry_out(self) -> None:
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            match output:
                case SendTo(peer, message):
                    self._runtime.send(_link_to(peer), peer, message)
                    if isinstance(message, Cancel):
                        self._runtime.trace.sample("cancel", message.sample_id)
                case Forget(peer):
                    self._runtime.links[_link_to(peer)].forget(peer)
                case SamplePlaced(sample_id=sample_id):
                    self._runtime.trace.sample("placed", sample_id)
                case SampleEnded(sample_id=sample_id, outcome=outcome):
                    self._runtime.trace.count(outcome)
                    self._runtime.trace.sample(outcome, sample_id)
                case GroupShipped(group_id=group_id):
                    self._runtime.trace.instant("shipped", group=group_id)
                case GroupDropped(group_id=group_id, reason=reason):
                    self._runtime.trace.instant("group dropped", group_id=group_id, reason=reason)
                    log.warning("group_dropped", group_id=group_id, reason=reason)
                case VersionSeen(policy_version=version):
                    self._runtime.trace.instant("version published", policy_version=version)
                    log.info("version_published", policy_version=version)


def stop_tokens_of(config: RunConfig) -> frozenset[int]:
    """The tokens that end a response of the run's engine; the scripted one ends by length alone."""
    if not config.generator.capabilities.has_model:
        return frozenset()
    return stop_token_ids(resolve_model_path(config.model.path, with_weights=False))


def boundary_of(config: RunConfig, run_dir: Path) -> Boundary:
    """What is taken in this run; the tokens of the scripted engine are of no model."""
    if not config.generator.capabilities.has_model:
        return Boundary(config, run_dir)
    return Boundary(config, run_dir, vocab_size(resolve_model_path(config.model.path, with_weights=False)))


def rollout_writer_of(config: RunConfig, run_dir: Path) -> RolloutWriter | None:
    """What keeps rollouts, if any are to be kept."""
    if not config.telemetry.sample_groups:
        return None
    model_dir = resolve_model_path(config.model.path, with_weights=False)
    return RolloutWriter(run_dir / SAMPLES_DIR, config, lambda: load_tokenizer(model_dir))


def _link_to(peer: str) -> str:
    return LAUNCHER_LINK.name if peer == LAUNCHER else link_between(SHAPER.first, role_of(peer)).name


def make_actor(runtime: Runtime) -> ShaperActor:
    """The shaper of the run."""
    config = runtime.config
    sets = load_prompts(config)
    log.info("prompts_loaded", found=str(sets.counts))
    return ShaperActor(
        runtime,
        sets,
        stop_tokens_of(config),
        boundary=boundary_of(config, runtime.run_dir),
        writer=rollout_writer_of(config, runtime.run_dir),
    )


if __name__ == "__main__":
    main(make_actor)
