"""Rank 0's side of the link between ranks: sends orders to the others and receives their results.

All ranks do the same in the same order, because messages of the link arrive in order and each is sent to all. A learner
of one rank is a team without others: nothing is sent, nothing is waited for, no group is formed.
"""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor

from darts_async.errors import ProcessDiedError
from darts_async.learner.condition import Changes
from darts_async.learner.metric_sums import Tally
from darts_async.learner.ranks.gather import GatheredTensors, Shapes
from darts_async.learner.ranks.rank_group import RankGroup
from darts_async.learner.ranks.rank_info import ALONE, RankInfo
from darts_async.protocol import (
    Dismiss,
    GatherWeights,
    LeaderToRank,
    PartSaved,
    Prepare,
    RankReady,
    RankToLeader,
    StepTallied,
    StoreValue,
)
from darts_async.wire.atomic_dir import FileSum


class Team:
    """The other ranks. All methods are called on the event loop.

    Args:
        names: of the other ranks, by rank.
        epoch: of the rendezvous, another one for each incarnation of rank 0.
        interface: local address of the group's sockets.
        send: queues a message for one of the others.
        deadline_s: of every wait.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        epoch: int,
        interface: str,
        send: Callable[[str, LeaderToRank], None],
        deadline_s: float,
    ) -> None:
        self._names = tuple(names)
        self._epoch = epoch
        self._send = send
        self._deadline_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._changes = Changes()
        self._ready: set[str] = set()
        self._tallies: defaultdict[int, dict[str, Tally]] = defaultdict(dict)
        self._saved: defaultdict[int, dict[str, FileSum]] = defaultdict(dict)
        self._gather_lock = threading.Lock()
        self._is_dismissed = False
        self.ranks: RankGroup | None = None
        if names:
            rank_info = RankInfo(0, 1 + len(names))
            self.ranks = RankGroup(rank_info, interface=interface, epoch=epoch, send=self.tell, deadline_s=deadline_s)

    @property
    def rank_info(self) -> RankInfo:
        return self.ranks.rank_info if self.ranks is not None else ALONE

    # --- messages --------------------------------------------------------------------------------------------

    def tell(self, message: LeaderToRank) -> None:
        """Send to all others."""
        for name in self._names:
            self._send(name, message)

    def handle(self, peer: str, message: RankToLeader) -> None:
        match message:
            case StoreValue():
                assert self.ranks is not None
                self.ranks.put(message)
                for name in self._names:
                    if name != peer:
                        self._send(name, message)
            case RankReady():
                self._ready.add(peer)
            case StepTallied(step=step):
                self._tallies[step][peer] = Tally.of(message)
            case PartSaved(policy_version=version, num_bytes=num_bytes, crc32=crc32):
                self._saved[version][peer] = FileSum(num_bytes, crc32)
        self._changes.notify()

    def lost(self, peer: str, reason: str) -> None:
        """A rank's link is down. Raises `ProcessDiedError`, unless it was told to go."""
        if not self._is_dismissed:
            raise ProcessDiedError(f"{peer}, a rank of the learner, is gone ({reason}); its logs say why")

    # --- what all ranks do -----------------------------------------------------------------------------------

    def prepare(self, checkpoint: str) -> None:
        """Have the others load the model and meet."""
        self.tell(Prepare(self._epoch, checkpoint))

    async def ready(self) -> None:
        """Wait until all have loaded the model. Raises `DeadlineError`."""
        await self._until(lambda: self._ready, "to load the model")

    async def tallies(self, step: int) -> list[Tally]:
        """What the others counted in a step. Raises `DeadlineError`."""
        await self._until(lambda: self._tallies[step], f"to train the groups of step {step}")
        return list(self._tallies.pop(step, {}).values())

    async def saved(self, policy_version: int) -> list[FileSum]:
        """The others' parts of a checkpoint, by rank, when all are written. Raises `DeadlineError`."""
        await self._until(lambda: self._saved[policy_version], f"to write their parts of checkpoint {policy_version}")
        parts = self._saved.pop(policy_version, {})
        return [parts[name] for name in self._names]

    def gathered(
        self, rows: Mapping[str, Tensor], shapes: Shapes, dtype: torch.dtype, order: GatherWeights
    ) -> GatheredTensors:
        """The complete parameters, of which `rows` are rank 0's; `order` has the others send theirs."""
        assert self.ranks is not None

        def request() -> None:
            self._loop.call_soon_threadsafe(self.tell, order)

        return GatheredTensors(self.ranks, rows, shapes, dtype, self._gather_lock, request)

    def dismiss(self) -> None:
        """Have the others end. Idempotent."""
        if not self._is_dismissed:
            self._is_dismissed = True
            self.tell(Dismiss())

    def abort(self, reason: str) -> None:
        """Free every thread that waits for another rank."""
        if self.ranks is not None:
            self.ranks.abort(reason)

    async def _until(self, those: Callable[[], Container[str]], what: str) -> None:
        def missing() -> list[str]:
            return [name for name in self._names if name not in those()]

        await self._changes.until(lambda: not missing(), self._deadline_s, lambda: f"{', '.join(missing())} {what}")
