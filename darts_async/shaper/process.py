"""The shaper process: the only IO of the shaper. Events go into `ShaperState`, its outputs go out."""

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import structlog

from darts_async.actor import Gauges, Runtime, main
from darts_async.config import RunConfig
from darts_async.models import resolve_model_path, stop_token_ids
from darts_async.prompts.load import load_prompts
from darts_async.prompts.source import ShuffledPrompts
from darts_async.protocol import GroupsCommitted, SampleRejected, ShaperSnapshot, Shutdown
from darts_async.shaper.ledger import GroupDropped, LedgerWriter, VersionSeen
from darts_async.shaper.planner import Planner
from darts_async.shaper.state import Incoming, Phase, ShaperState
from darts_async.shaper.training import LEARNER
from darts_async.shaper.workload import Forget, Output, Send
from darts_async.transport import Event, PeerDown, PeerUp, Received

LEDGER_FILE = "ledger.msgpack"
LEARNT_FILE = "learnt.json"
"""What was learnt about the prompts, and where the split of the budget stands."""
STOP_WITHIN_S = 4.0
"""How long engines have to acknowledge what a stop cancels."""
_LINK_OF_ROLE = {"generator": "generators", "reward": "rewards", "learner": "learner", "launcher": "launcher"}

log = structlog.get_logger()


class ShaperActor:
    """See the module."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        sets = load_prompts(runtime.config)
        self._source = ShuffledPrompts(sets.train, seed=runtime.config.seed)
        self._learnt_path = runtime.run_dir / LEARNT_FILE
        learnt, stop_token_ids = load_learnt(self._learnt_path), stop_tokens_of(runtime.config)
        self._state = ShaperState(runtime.config, self._source, sets.held_out, learnt, stop_token_ids)
        self._ledger = LedgerWriter(runtime.run_dir / LEDGER_FILE)
        self._stop_at_s: float | None = None
        self._leaving = False

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Nothing takes long."""

    def handle(self, event: Event) -> None:
        """One event, completely: decide, record, send."""
        now_s = time.monotonic()
        with self._runtime.clock.busy("decide"):
            match event:
                case Received(peer=peer, message=message):
                    if isinstance(message, SampleRejected):
                        log.error("sample_rejected", sample_id=message.sample_id, error=message.error)
                    outputs = self._state.handle(peer, cast(Incoming, message), now_s)
                case PeerUp(peer=peer, incarnation=incarnation):
                    outputs = self._state.peer_up(peer, incarnation, now_s)
                case PeerDown(peer=peer, reason=reason):
                    log.warning("peer_lost", peer=peer, reason=reason)
                    outputs = self._state.peer_lost(peer, now_s)
            self._carry_out(outputs)
        if isinstance(event, Received) and isinstance(event.message, GroupsCommitted):
            self._add_to_checkpoint(event.message.step + 1)

    def tick(self, now_s: float) -> None:
        """Let the state see that time has passed; give up on a stop that takes too long."""
        self._carry_out(self._state.tick(now_s))
        if self._stop_at_s is not None and now_s > self._stop_at_s:
            self._stop_at_s = None
            self._carry_out(self._state.abandon(now_s))

    def shutdown(self, message: Shutdown) -> None:
        """Early: cancel what runs, report once the engines have acknowledged, and leave. At the end: leave."""
        self._leaving = True
        if self._state.phase is not Phase.FINISHED and self._stop_at_s is None:
            now_s = time.monotonic()
            self._stop_at_s = now_s + STOP_WITHIN_S
            self._carry_out(self._state.stop(message.reason, now_s))

    @property
    def done(self) -> bool:
        """Everything is accounted for and the launcher has said so."""
        return self._leaving and self._state.phase is Phase.FINISHED

    def gauges(self) -> Gauges:
        """For the status."""
        work = self._state.work
        return Gauges(
            state=self._state.phase.name.lower().replace("_", " "),
            policy_version=self._state.num_steps,
            num_tokens=work.totals.num_tokens_received,
            num_in_flight=work.generators.num_in_flight,
        )

    async def close(self) -> None:
        """Flush the ledger; save what was learnt about the prompts."""
        self._ledger.close()
        save_learnt(self._learnt_path, self._state.planner)

    def _add_to_checkpoint(self, policy_version: int) -> None:
        """Where a checkpoint is written, it holds what is known here at that step. The cursor runs ahead of training:
        the prompts under way were drawn, and are not trained yet."""
        if self._runtime.config.learner.is_saved(policy_version):
            under_way = self._state.prompts_under_way(policy_version)
            known = {"cursor": self._source.cursor, "under_way": sorted(under_way), **self._state.planner.to_state()}
            self._runtime.send("learner", LEARNER, ShaperSnapshot(policy_version, msgspec.json.encode(known)))

    def _carry_out(self, outputs: list[Output]) -> None:
        records = [output for output in outputs if not isinstance(output, Send | Forget)]
        if records:  # before anything leaves: what others act on is on record
            self._runtime.faults.reach("shaper.before_record")
            self._ledger.append(records)
            self._runtime.faults.reach("shaper.before_send")
        for output in outputs:
            match output:
                case Send(peer, message):
                    self._runtime.send(_link_to(peer), peer, message)
                case Forget(peer):
                    self._runtime.links[_link_to(peer)].forget(peer)
                case GroupDropped(group_id=group_id, reason=reason):
                    log.warning("group_dropped", group_id=group_id, reason=reason)
                case VersionSeen(policy_version=version):
                    log.info("version_published", policy_version=version)
                    if version % self._runtime.config.learner.checkpoint_every == 0:
                        save_learnt(self._learnt_path, self._state.planner)


def load_learnt(path: Path) -> dict[str, Any] | None:
    """What an earlier process of the run has saved, if there was one."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else None


def save_learnt(path: Path, planner: Planner) -> None:
    """Replace the file at once."""
    staging = path.with_suffix(".new")
    staging.write_bytes(msgspec.json.encode(planner.to_state()))
    staging.replace(path)


def stop_tokens_of(config: RunConfig) -> frozenset[int]:
    """The tokens that end a response of the run's engine; the scripted one ends by length alone."""
    if config.generator.engine == "scripted":
        return frozenset()
    return stop_token_ids(resolve_model_path(config.model.path, with_weights=False))


def _link_to(peer: str) -> str:
    return _LINK_OF_ROLE[peer.partition("/")[0]]


if __name__ == "__main__":
    main(ShaperActor)
