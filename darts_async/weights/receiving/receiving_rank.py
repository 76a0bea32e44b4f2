"""One receiving rank of a broadcast group. A thread receives buckets into staging memory while decoding continues, or
as a stream of tensors that are loaded at once.

Invariants. Staging memory has at most one owner: a transfer, a complete update, or the code that took the update;
without an owner it is reused. A failed transfer's memory is not reused, because an operation that timed out may still
write to it. A group that was left sends no reports.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from darts_async.errors import ProtocolError
from darts_async.protocol import (
    EpochFormed,
    StoreValue,
    UpdateAborted,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
)
from darts_async.weights.broadcast.collective import GroupSpec, describe, device_of
from darts_async.weights.broadcast.group_slot import Group, Groups
from darts_async.weights.bucket_layout import layout_of
from darts_async.weights.receiving.member import Report
from darts_async.weights.receiving.staging import Staging, TensorStream, receive_buckets, receive_tensors

JOIN_BACKSTOP = 2.0
TRANSFER_BACKSTOP = 3.0
"""Deadlines of a rank, in deadlines of a phase (the second one spans two phases). The learner's deadline comes first,
because it knows which member has not answered. These are for a silent learner."""


@dataclass(slots=True, eq=False)
class _ReceivedUpdate:
    epoch: int
    policy_version: int
    staging: Staging | None = None  # once all buckets have arrived
    stream: TensorStream | None = None  # if they are not staged


class Rank:
    """A member of the current group. All methods are called on one event loop.

    Args:
        interface: local address that the collective's sockets bind to.
        report: called on the event loop.
        device: device of this rank under NCCL; by default the current device of the joining thread.
        load: receives the stream of each update, which is then not staged.
    """

    def __init__(
        self,
        interface: str,
        report: Callable[[Report], None],
        device: torch.device | None = None,
        load: Callable[[TensorStream], object] | None = None,
    ) -> None:
        self._interface = interface
        self._report = report
        self._device = device
        self._load = load
        self._groups = Groups()
        self._update: _ReceivedUpdate | None = None
        self._spare: Staging | None = None

    def handle(self, command: EpochFormed | StoreValue | UpdateOffered | UpdateAborted) -> None:
        match command:
            case EpochFormed():
                self._form(command)
            case StoreValue():
                self._put(command)
            case UpdateOffered(epoch):
                if (group := self._groups.in_epoch(epoch)) is not None:
                    self._receive(group, command)
            case UpdateAborted(reason=reason):
                self._leave(reason)

    def has_staged(self, command: UpdateCommitted) -> bool:
        """Whether this update has arrived completely, and the group was not left afterwards."""
        update, wanted = self._update, (command.epoch, command.policy_version)
        return update is not None and (update.epoch, update.policy_version) == wanted and update.staging is not None

    def take(self, command: UpdateCommitted) -> Staging:
        """Hand over a staged update. It must be given back."""
        assert self.has_staged(command)
        update, self._update = self._update, None
        assert update is not None
        assert update.staging is not None
        return update.staging

    def give_back(self, staging: Staging) -> None:
        """The memory of an update that was taken is not read any longer."""
        self._spare = staging

    async def close(self, deadline_s: float) -> None:
        """Leave the group, and release all threads, sockets and memory. Raises `DeadlineError` if a thread hangs."""
        self._leave("the generator closes")
        self._spare = None
        await self._groups.close(deadline_s)

    def _form(self, message: EpochFormed) -> None:
        self._leave(f"epoch {message.epoch} was formed")
        spec = GroupSpec(
            epoch=message.epoch,
            rank=message.first_rank,
            world_size=message.world_size,
            backend=message.backend,
            interface=self._interface,
            deadline_s=JOIN_BACKSTOP * message.deadline_s,
            device=self._device,
        )
        self._groups.join(spec, self._report, self._formed)

    def _formed(self, group: Group, outcome: Future[None]) -> None:
        if error := outcome.exception():
            self._fail(group.epoch, describe(error))

    def _put(self, message: StoreValue) -> None:
        if (group := self._groups.in_epoch(message.epoch)) is not None:
            try:
                group.store.put(message.key, message.value)
            except ProtocolError as error:
                self._fail(message.epoch, describe(error))

    def _receive(self, group: Group, message: UpdateOffered) -> None:
        update = _ReceivedUpdate(message.epoch, message.policy_version)
        self._update = update
        loop = asyncio.get_running_loop()
        spare, self._spare = self._spare, None
        deadline_at_s = time.monotonic() + TRANSFER_BACKSTOP * message.deadline_s
        if self._load is not None:
            update.stream = TensorStream(update.policy_version, deadline_at_s)
            self._load(update.stream)

        def posted() -> None:
            loop.call_soon_threadsafe(self._ready, update)

        def transfer() -> tuple[Staging | None, list[int]]:
            device = group.spec.device or device_of(group.spec.backend)
            if update.stream is not None:
                layout = layout_of(message.manifest)
                return None, receive_tensors(group.collective, layout, device, deadline_at_s, posted, update.stream)
            reusable = spare is not None and spare.fits(message.manifest, device)
            staging = spare if spare is not None and reusable else Staging.for_manifest(message.manifest, device)
            return staging, receive_buckets(group.collective, staging, deadline_at_s, posted)

        group.collective.submit(transfer, partial(self._received, group, update))

    def _ready(self, update: _ReceivedUpdate) -> None:
        if update is self._update:
            self._report(UpdateReady(update.epoch, update.policy_version))

    def _received(
        self, group: Group, update: _ReceivedUpdate, outcome: Future[tuple[Staging | None, list[int]]]
    ) -> None:
        if error := outcome.exception():
            if update.stream is not None:
                update.stream.fail(describe(error))
            self._fail(group.epoch, describe(error))
            return
        staging, checksums = outcome.result()
        if update is not self._update:
            self._spare = staging or self._spare  # the update was aborted just when it was complete
            return
        update.staging = staging
        self._report(UpdateStaged(update.epoch, update.policy_version, np.array(checksums, np.int64)))

    def _leave(self, reason: str) -> None:
        self._groups.leave(reason)
        if self._update is not None and self._update.staging is not None:
            self._spare = self._update.staging
        if self._update is not None and self._update.stream is not None:
            self._update.stream.fail(reason)
        self._update = None

    def _fail(self, epoch: int, error: str) -> None:
        if self._groups.in_epoch(epoch) is None:
            return  # it has left already
        version = self._update.policy_version if self._update is not None else -1
        self._leave(error)
        self._report(UpdateFailed(epoch, version, error))
