"""The learner's side of a weight update: carries out the coordinator's decisions.

`publish` packs the tensors of its source bucket by bucket, without a second copy of the model. It needs two bucket
buffers, one being sent while the other is filled, and the parameters with pieces in the second. If these must be
gathered from other ranks, each gather finishes before its bucket is sent. Gathering, packing, checksums and sending run
in the thread of the group; torch releases the interpreter lock there, so the learner may compute meanwhile. It must not
*change* a parameter before `publish` returns; forward and backward passes do not.

A generator that joins later is given the current version by `run`, while the learner lends the parameters of the
version that it published last.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from functools import partial

import structlog
import torch

from darts_async.config import WeightsConfig
from darts_async.errors import ProtocolError, WeightUpdateError
from darts_async.faults import present
from darts_async.protocol import GeneratorToLearner, LearnerToGenerator, StoreValue, UpdateAborted, WeightManifest
from darts_async.weights.broadcast.collective import CONNECT_LIMIT_S, Collective, GroupSpec, describe, device_of
from darts_async.weights.broadcast.group_slot import Group, Groups
from darts_async.weights.bucket_layout import Layout, layout_of
from darts_async.weights.sending.coordinator import Coordinator
from darts_async.weights.sending.events import (
    Broadcast,
    BroadcastDone,
    BroadcastFailed,
    CoordinatorAction,
    CoordinatorEvent,
    DropGroup,
    FormGroup,
    MemberDropped,
    MemberLost,
    MemberMessage,
    Published,
    PublishFailed,
    SendToMember,
    Superseded,
)
from darts_async.weights.sending.pack import Packer
from darts_async.weights.sending.source import WeightSource

_log = structlog.get_logger(__name__)

BACKSTOP = 2.0
"""The collective's own deadlines, in deadlines of a phase. The coordinator's deadline must come first, because it knows
which member has not answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport(Published):
    num_bytes: int
    """Payload of one broadcast, padding included: what each member received."""
    total_s: float
    """From the call to the last acknowledgement, including failed rounds."""


@dataclass(frozen=True, slots=True, eq=False)
class _PendingUpdate:
    source: WeightSource
    layout: Layout
    began: float
    outcome: "asyncio.Future[PublishReport]"


class Publisher:
    """Publishes versions to the generators. All methods are called on one event loop.

    Args:
        interface: local address that the collective's sockets bind to.
        send: queues a message for a generator.
        absence_s: how long to wait for a generator that is expected to return.
    """

    def __init__(
        self,
        config: WeightsConfig,
        interface: str,
        send: Callable[[str, LearnerToGenerator], None],
        absence_s: float | None = None,
    ) -> None:
        self._config = config
        self._interface = interface
        self._send = send
        self._coordinator = Coordinator(
            backend=config.backend,
            interface=interface,
            deadline_s=config.deadline_s,
            absence_s=absence_s,
            # Epochs ascend across restarts of the learner, so that late answers to an earlier one are recognised.
            first_epoch=time.time_ns() // 1_000_000,
        )
        self._groups = Groups()
        self._members_of_group: frozenset[str] = frozenset()
        self._updates: dict[int, _PendingUpdate] = {}
        self._version: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._someone_lags = asyncio.Event()

    @property
    def newest_epoch(self) -> int:
        return self._coordinator.newest_epoch

    def handle(self, peer: str, incarnation: int, message: GeneratorToLearner) -> None:
        if isinstance(message, StoreValue):
            self._relay(peer, message)
        else:
            self._feed(MemberMessage(peer, incarnation, message))

    def peer_lost(self, peer: str) -> None:
        self._feed(MemberLost(peer))

    async def publish(self, policy_version: int, source: WeightSource) -> PublishReport:
        """Send a version to the generators. Returns when all members use it; until then the parameters must not change.

        Raises:
            WeightUpdateError: no generator received it by the deadline, the broadcast failed repeatedly, or a newer
                version came in between. The message says which generators were dropped and why.
        """
        update = self._updates.get(policy_version) or self._prepare(policy_version, source)
        try:
            return await asyncio.shield(update.outcome)
        except asyncio.CancelledError:
            self._withdraw(f"publishing version {policy_version} was cancelled")
            raise

    async def run(
        self, source: Callable[[], WeightSource], lend: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        """Give the current version to generators that join after it was published; runs until cancelled.

        `source` returns the parameters. While `lend` is entered, the learner does not change them.
        """
        while True:
            await self._someone_lags.wait()
            async with lend():
                is_caught_up = await self._catch_up(source)
            if not is_caught_up:
                await asyncio.sleep(self._config.deadline_s)

    async def close(self) -> None:
        """Give up the current update, and release all threads, timers and sockets. Raises `DeadlineError` if a thread
        hangs."""
        self._withdraw("the learner closes")
        if self._timer is not None:
            self._timer.cancel()
        await self._groups.close(CONNECT_LIMIT_S + BACKSTOP * self._config.deadline_s)

    # --- decisions in, actions out ---------------------------------------------------------------------------

    def _prepare(self, policy_version: int, source: WeightSource) -> _PendingUpdate:
        manifest = WeightManifest(source.specs, self._config.bucket_bytes)
        loop = asyncio.get_running_loop()
        update = _PendingUpdate(source, layout_of(manifest), loop.time(), loop.create_future())
        self._updates[policy_version] = update
        self._version = policy_version
        self._execute(self._coordinator.offer(policy_version, manifest, loop.time()))
        return update

    async def _catch_up(self, source: Callable[[], WeightSource]) -> bool:
        if self._version is None or not self._coordinator.lagging(self._version):
            return True  # the lagging members have ended, or got an update meanwhile
        try:
            await self.publish(self._version, source())
        except WeightUpdateError as error:
            _log.warning("weights.catch_up_failed", error=str(error))
            return False
        return True

    def _withdraw(self, reason: str) -> None:
        self._execute(self._coordinator.withdraw(reason, asyncio.get_running_loop().time()))

    def _feed(self, event: CoordinatorEvent) -> None:
        self._execute(self._coordinator.handle(event, asyncio.get_running_loop().time()))

    def _tick(self) -> None:
        self._timer = None
        self._execute(self._coordinator.tick(asyncio.get_running_loop().time()))

    def _execute(self, actions: Sequence[CoordinatorAction]) -> None:
        for action in actions:
            self._perform(action)
        if self._timer is not None:
            self._timer.cancel()
        deadline = self._coordinator.deadline
        self._timer = None if deadline is None else asyncio.get_running_loop().call_at(deadline, self._tick)
        if self._version is not None and not self._coordinator.is_busy and self._coordinator.lagging(self._version):
            self._someone_lags.set()
        else:
            self._someone_lags.clear()

    def _perform(self, action: CoordinatorAction) -> None:
        match action:
            case SendToMember(name, message):
                if isinstance(message, UpdateAborted):
                    _log.warning("weights.round_aborted", member=name, epoch=message.epoch, reason=message.reason)
                self._send(name, message)
            case FormGroup(epoch, world_size, members):
                self._form(epoch, world_size, members)
            case Broadcast(epoch, version):
                self._broadcast(epoch, self._updates[version])
            case DropGroup():
                self._groups.leave("the epoch was given up")
            case MemberDropped(name, reason):
                _log.warning("weights.member_dropped", member=name, reason=reason)
            case Published():
                self._resolve(action)
            case PublishFailed(version, reason, dropped, members):
                self._reject(version, f"{reason}; members now: {list(members)}, dropped: {dict(dropped)}")
            case Superseded(version):
                self._reject(version, "a newer version was offered, or the update was withdrawn, before it began")

    def _resolve(self, published: Published) -> None:
        update = self._updates.pop(published.policy_version)
        total_s = asyncio.get_running_loop().time() - update.began
        num_bytes = update.layout.total_bytes
        update.outcome.set_result(PublishReport(**asdict(published), num_bytes=num_bytes, total_s=total_s))

    def _reject(self, policy_version: int, reason: str) -> None:
        outcome = self._updates.pop(policy_version).outcome
        outcome.set_exception(WeightUpdateError(f"version {policy_version} was not published: {reason}"))
        outcome.exception()  # marks it as retrieved: a cancelled publisher does not fetch it

    # --- the group -------------------------------------------------------------------------------------------

    def _form(self, epoch: int, world_size: int, members: tuple[str, ...]) -> None:
        def send_to_all(value: StoreValue) -> None:
            for name in members:
                self._send(name, value)

        config = self._config
        spec = GroupSpec(epoch, 0, world_size, config.backend, self._interface, BACKSTOP * config.deadline_s)
        self._members_of_group = frozenset(members)
        self._groups.join(spec, send_to_all, self._formed)

    def _relay(self, peer: str, message: StoreValue) -> None:
        group = self._groups.in_epoch(message.epoch)
        if group is None or peer not in self._members_of_group:
            return
        try:
            group.store.put(message.key, message.value)
        except ProtocolError as error:
            _log.warning("weights.store_value_refused", member=peer, error=str(error))
            return
        for name in self._members_of_group - {peer}:
            self._send(name, message)

    def _formed(self, group: Group, outcome: Future[None]) -> None:
        if error := outcome.exception():
            self._feed(BroadcastFailed(group.epoch, describe(error)))

    def _broadcast(self, epoch: int, update: _PendingUpdate) -> None:
        group = self._groups.in_epoch(epoch)
        assert group is not None, "the coordinator broadcasts in the epoch it formed"
        deadline = time.monotonic() + BACKSTOP * self._config.deadline_s
        device = device_of(self._config.backend)
        transfer = partial(send_buckets, group.collective, update.layout, update.source, device, deadline)
        group.collective.submit(transfer, partial(self._sent, group))

    def _sent(self, group: Group, outcome: Future[list[int]]) -> None:
        if error := outcome.exception():
            self._feed(BroadcastFailed(group.epoch, describe(error)))
        else:
            self._feed(BroadcastDone(group.epoch, outcome.result()))


def send_buckets(
    collective: Collective, layout: Layout, source: WeightSource, device: torch.device, deadline: float
) -> list[int]:
    """Broadcast all buckets from rank 0; runs in the group's thread. Returns the checksum of each tensor, computed
    while buckets are being sent. [num_tensors]"""
    buffers = [torch.zeros(min(layout.bucket_bytes, layout.total_bytes), dtype=torch.uint8, device=device)]
    buffers.append(torch.zeros_like(buffers[0]) if layout.num_buckets > 1 else buffers[0])
    with contextlib.closing(source.tensors()) as tensors:
        packer = Packer(layout, tensors)
        if layout.num_buckets:
            packer.pack(buffers[0], 0)
        for bucket in range(layout.num_buckets):
            start, stop = layout.bucket_range(bucket)
            present().in_thread("learner.bucket")
            pending = collective.post(buffers[bucket % 2][: stop - start], deadline)
            packer.digest(bucket)
            if bucket + 1 < layout.num_buckets:
                packer.pack(buffers[(bucket + 1) % 2], bucket + 1)
            pending.wait()
        return packer.checksums()
