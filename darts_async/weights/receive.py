"""A generator's side of a weight update: receive beside the running model, check, swap at a step boundary.

Buckets arrive in staging memory in a thread of the group while decoding goes on; the weights in use are touched
by `apply` alone, after the learner has seen that all checksums agree. Whatever fails before that costs nothing
but the update: the member reports it, leaves the group and asks to join the next one.

Invariants. Staging memory has one owner at a time: a transfer, a staged update, or nobody (then it is reused). A
transfer that failed keeps its memory, because an operation that timed out may still write to it. An update that
is being applied is finished, whatever arrives; an offer that arrives meanwhile waits.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from darts_async.errors import ProtocolError, WeightUpdateError
from darts_async.protocol import (
    EpochFormed,
    GeneratorToLearner,
    LearnerToGenerator,
    MemberJoined,
    StoreValue,
    UpdateAborted,
    UpdateApplied,
    UpdateCommitted,
    UpdateFailed,
    UpdateOffered,
    UpdateReady,
    UpdateStaged,
    WeightManifest,
)
from darts_async.weights.checksum import checksum
from darts_async.weights.collective import Collective, GroupSpec, describe, device_of
from darts_async.weights.groups import Group, Groups
from darts_async.weights.plan import Layout, layout_of, views_of

JOIN_BACKSTOP = 2.0
TRANSFER_BACKSTOP = 3.0
"""Deadlines here, in deadlines of a phase (the second one spans two phases). They are for a learner that has fallen
silent; while it lives it is the first to lose patience, because it knows which member has not answered."""

Apply = Callable[[dict[str, torch.Tensor], int], Awaitable[float]]


@dataclass(frozen=True, slots=True, eq=False)
class Staging:
    """Memory for one copy of the model, and the tensors in it."""

    manifest: WeightManifest
    layout: Layout
    flat: torch.Tensor  # uint8, [layout.total_bytes]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def for_manifest(cls, manifest: WeightManifest, device: torch.device) -> "Staging":
        """Allocate."""
        layout = layout_of(manifest)
        flat = torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)
        return cls(manifest, layout, flat, views_of(flat, layout))

    def fits(self, manifest: WeightManifest, device: torch.device) -> bool:
        """Whether it can be used again."""
        return self.manifest == manifest and self.flat.device == device


@dataclass(slots=True, eq=False)
class _Update:
    epoch: int
    version: int
    staging: Staging | None = None  # once all buckets have arrived


class Receiver:
    """Takes part in the learner's updates. All methods are called on one event loop.

    Args:
        interface: local address that the collective's sockets bind to.
        send: queues a message for the learner.
        apply: copies the tensors into the engine at a step boundary, stamps its tokens with the version from
            there on, and returns the time in seconds in which nothing was decoded. The tensors are only valid
            until it returns. A `WeightUpdateError` means that the weights in use are as they were.
    """

    def __init__(self, interface: str, send: Callable[[GeneratorToLearner], None], apply: Apply) -> None:
        self._interface = interface
        self._send = send
        self._apply = apply
        self._version = -1
        self._groups = Groups()
        self._last_epoch = -1
        self._update: _Update | None = None
        self._applying: _Update | None = None
        self._postponed: UpdateOffered | None = None
        self._spare: Staging | None = None
        self._committed = asyncio.Event()

    @property
    def policy_version(self) -> int:
        """The version in use, -1 before the first."""
        return self._version

    def join(self) -> None:
        """Ask to be a member. To be called whenever the link to the learner comes up."""
        self._leave("joins anew")
        self._last_epoch = -1  # it may be another learner, with a clock of its own
        self._send(MemberJoined(self._version))

    def learner_lost(self) -> None:
        """The link to the learner is down: whatever was under way ends."""
        self._leave("the link to the learner is down")

    def handle(self, message: LearnerToGenerator) -> None:
        """Take in a message of the learner. Messages of past epochs change nothing."""
        match message:
            case EpochFormed():
                self._form(message)
            case StoreValue(epoch, key, value):
                self._take_value(epoch, key, value)
            case UpdateOffered():
                self._consider(message)
            case UpdateCommitted(epoch, version):
                self._commit(epoch, version)
            case UpdateAborted(epoch, _, reason):
                if self._groups.in_epoch(epoch):
                    self._leave(reason)
                    self._send(MemberJoined(self._version))

    async def run(self) -> None:
        """Apply what is committed; runs until cancelled. Errors of the engine end it."""
        while True:
            await self._committed.wait()
            self._committed.clear()
            if (update := self._applying) is not None:
                await self._apply_update(update)

    async def close(self, deadline_s: float = 10.0) -> None:
        """Leave the group; no thread, socket or memory stays.

        Raises:
            DeadlineError: a thread hangs.
        """
        self._leave("the generator closes")
        self._spare = None
        await self._groups.close(deadline_s)

    # --- the group -------------------------------------------------------------------------------------------

    def _form(self, message: EpochFormed) -> None:
        if message.epoch <= self._last_epoch:
            return
        self._last_epoch = message.epoch
        self._leave(f"epoch {message.epoch} was formed")
        spec = GroupSpec(
            epoch=message.epoch,
            rank=message.rank,
            world_size=message.world_size,
            backend=message.backend,
            interface=self._interface,
            deadline_s=JOIN_BACKSTOP * message.deadline_s,
        )
        self._groups.join(spec, self._send, self._formed)

    def _formed(self, group: Group, outcome: Future[None]) -> None:
        if error := outcome.exception():
            self._fail(group.epoch, describe(error))

    def _take_value(self, epoch: int, key: str, value: bytes) -> None:
        group = self._groups.in_epoch(epoch)
        if group is None:
            return
        try:
            group.store.put(key, value)
        except ProtocolError as error:
            self._fail(epoch, describe(error))

    def _leave(self, reason: str) -> None:
        self._groups.leave(reason)
        if self._update is not None and self._update.staging is not None:
            self._spare = self._update.staging
        self._update = None
        self._postponed = None

    def _fail(self, epoch: int, error: str) -> None:
        """Report that this member cannot go on in an epoch, and ask for the next."""
        if self._groups.in_epoch(epoch) is None:
            return  # it has left already
        version = self._update.version if self._update is not None else self._version
        self._leave(error)
        self._send(UpdateFailed(epoch, version, error))
        self._send(MemberJoined(self._version))

    # --- an update -------------------------------------------------------------------------------------------

    def _consider(self, message: UpdateOffered) -> None:
        group = self._groups.in_epoch(message.epoch)
        if group is None:
            if message.epoch >= self._last_epoch:
                error = f"it is not in the group of epoch {message.epoch}"
                self._send(UpdateFailed(message.epoch, message.policy_version, error))
        elif self._applying is not None:
            self._postponed = message
        else:
            self._receive(group, message)

    def _receive(self, group: Group, message: UpdateOffered) -> None:
        update = _Update(message.epoch, message.policy_version)
        self._update = update
        loop = asyncio.get_running_loop()
        spare, self._spare = self._spare, None

        def transfer() -> tuple[Staging, list[int]]:
            device = device_of(group.spec.backend)
            reusable = spare is not None and spare.fits(message.manifest, device)
            staging = spare if spare is not None and reusable else Staging.for_manifest(message.manifest, device)
            deadline = time.monotonic() + TRANSFER_BACKSTOP * message.deadline_s
            return staging, receive_buckets(
                group.collective, staging, deadline, lambda: loop.call_soon_threadsafe(self._ready, update)
            )

        group.collective.submit(transfer, partial(self._received, group, update))

    def _ready(self, update: _Update) -> None:
        if update is self._update:
            self._send(UpdateReady(update.epoch, update.version))

    def _received(self, group: Group, update: _Update, outcome: Future[tuple[Staging, list[int]]]) -> None:
        if error := outcome.exception():
            self._fail(group.epoch, describe(error))
            return
        staging, checksums = outcome.result()
        if update is not self._update:
            self._spare = staging  # the update was given up just when it was complete
            return
        update.staging = staging
        self._send(UpdateStaged(update.epoch, update.version, np.array(checksums, np.int64)))

    def _commit(self, epoch: int, version: int) -> None:
        update = self._update
        if update is None or update.staging is None or (update.epoch, update.version) != (epoch, version):
            return
        self._update, self._applying = None, update
        self._committed.set()

    async def _apply_update(self, update: _Update) -> None:
        assert update.staging is not None
        try:
            stall_s = await self._apply(update.staging.tensors, update.version)
        except WeightUpdateError as error:
            self._fail(update.epoch, describe(error))
        else:
            self._version = update.version
            self._send(UpdateApplied(update.epoch, update.version, stall_s))
        self._spare = update.staging
        self._applying = None
        if self._postponed is not None:
            message, self._postponed = self._postponed, None
            self._consider(message)


def receive_buckets(
    collective: Collective, staging: Staging, deadline: float, posted: Callable[[], object]
) -> list[int]:
    """Receive all buckets in place; runs in the group's thread.

    Args:
        posted: called once the first receive is posted.

    Returns:
        The checksum of each tensor in staging, taken while later buckets are under way. [num_tensors]
    """
    layout = staging.layout
    tensors = list(staging.tensors.values())
    checksums = [0] * len(tensors)
    buckets = [staging.flat[slice(*layout.bucket_range(bucket))] for bucket in range(layout.num_buckets)]
    pending = collective.post(buckets[0], deadline) if buckets else None
    posted()
    for bucket in range(layout.num_buckets):
        assert pending is not None
        pending.wait()
        pending = collective.post(buckets[bucket + 1], deadline) if bucket + 1 < layout.num_buckets else None
        for index in layout.completed[bucket]:
            checksums[index] = checksum(tensors[index])
    for index in layout.empty:
        checksums[index] = checksum(tensors[index])
    return checksums
