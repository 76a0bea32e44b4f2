"""When and how rank 0 writes checkpoints: copied between two steps, written while training goes on.

At most one is to be written at a time. Where the disk is full, the one that is being written waits for room. The
shaper's own state comes as a message; a shaper that does not send it in time does not keep the weights from the disk.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import structlog
import torch
from torch import Tensor

from darts_async.errors import DeadlineError
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.checkpoints.export import write_model
from darts_async.learner.condition import Changes
from darts_async.learner.rank_leader import Team
from darts_async.learner.ranks.gather import Shapes
from darts_async.learner.step import Trainer
from darts_async.machine.full_disk import Patience
from darts_async.protocol import GatherWeights, SaveCheckpoint
from darts_async.wire.atomic_dir import FileSum

SHAPER_PATIENCE_S = 10.0

log = structlog.get_logger()


class Saver:
    """Writes checkpoints of one trainer.

    Args:
        root: the directory that holds them.
        dtype: of the weights in the Hugging Face files.
        keep: how many of the newest stay.
        saved: called on the event loop with each version that is on the disk, and the oldest one to come back to.
        patience: for a disk that is full.
        shaper_states: what the shaper knew at a version, as it becomes known; `changes` tells when.
    """

    def __init__(
        self,
        root: Path,
        team: Team,
        *,
        tokenizer_dir: Path,
        dtype: torch.dtype,
        keep: int,
        saved: Callable[[int, int], None],
        patience: Patience,
        shaper_states: Mapping[int, bytes],
        changes: Changes,
    ) -> None:
        self._root = root
        self._team = team
        self._tokenizer_dir = tokenizer_dir
        self._dtype = dtype
        self._keep = keep
        self._saved = saved
        self._patience = patience
        self._shaper_states = shaper_states
        self._changes = changes

    async def save(
        self, tasks: asyncio.TaskGroup, trainer: Trainer, consumed: tuple[tuple[int, int], ...], *, has_shaper: bool
    ) -> None:
        """Begin to write a checkpoint of the trainer, which may continue when this returns."""
        with checkpoint.naming_failures(self._root):
            open_it = partial(checkpoint.open_checkpoint, self._root, trainer.policy_version)
            staging = await asyncio.to_thread(self._patience.write, self._root, open_it, _nothing)
        self._team.tell(SaveCheckpoint(trainer.policy_version))
        snapshot = await asyncio.to_thread(checkpoint.Snapshot.of, trainer)
        writing = self._write(staging, snapshot, trainer, consumed, has_shaper=has_shaper)
        tasks.create_task(writing, name="write a checkpoint")

    async def _write(
        self,
        staging: Path,
        snapshot: checkpoint.Snapshot,
        trainer: Trainer,
        consumed: tuple[tuple[int, int], ...],
        *,
        has_shaper: bool,
    ) -> None:
        version = snapshot.policy_version
        with checkpoint.naming_failures(self._root):
            part = await write_part(self._patience, staging, snapshot)
            weights = await asyncio.to_thread(self._whole_weights, snapshot, trainer.row_shapes())
            write = partial(write_model, staging, trainer.model, weights, self._dtype, self._tokenizer_dir)
            await asyncio.to_thread(self._patience.write, staging, write, partial(checkpoint.remove_model, staging))
            parts = [part, *await self._team.saved(version)]
            shaper_state = await self._shaper_state(version) if has_shaper else b""
            complete = partial(
                checkpoint.complete,
                staging,
                snapshot,
                parts,
                consumed=consumed,
                shaper_state=shaper_state,
                keep=self._keep,
            )
            await asyncio.to_thread(self._patience.write, staging, complete, _nothing)
        log.info("checkpoint_saved", policy_version=version)
        self._saved(version, await asyncio.to_thread(checkpoint.oldest_kept, self._root, self._keep))

    def _whole_weights(self, snapshot: checkpoint.Snapshot, shapes: Shapes) -> Mapping[str, Tensor]:
        if self._team.rank_info.num_ranks == 1:
            return snapshot.weights
        order = GatherWeights(snapshot.policy_version, of_checkpoint=True)
        tensors = self._team.gathered(snapshot.weights, shapes, self._dtype, order).tensors()
        return dict(zip(snapshot.weights, tensors, strict=True))

    async def _shaper_state(self, version: int) -> bytes:
        try:
            await self._changes.until(
                lambda: version in self._shaper_states, SHAPER_PATIENCE_S, lambda: f"the shaper's state at {version}"
            )
        except DeadlineError as error:
            log.warning("checkpoint_without_shaper", policy_version=version, error=str(error))
            return b""
        return self._shaper_states[version]


async def write_part(patience: Patience, staging: Path, snapshot: checkpoint.Snapshot) -> FileSum:
    """Write the state of this rank; where the disk is full, as soon as there is room."""
    path = checkpoint.part_path(staging, snapshot)
    write = partial(checkpoint.write_part, staging, snapshot)
    return await asyncio.to_thread(patience.write, staging, write, partial(path.unlink, missing_ok=True))


def _nothing() -> None:
    """A small file, or none, is left."""
