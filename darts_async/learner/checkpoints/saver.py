"""Rank 0 writes checkpoints: copied between two steps, written while training continues, one at a time.

If the disk is full, the writer waits for space. The shaper's own state comes as a message; if it does not come in time,
the checkpoint is written without it.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import torch
from torch import Tensor

from darts_async.errors import DeadlineError
from darts_async.learner.checkpoints import checkpoint
from darts_async.learner.checkpoints.export import write_model
from darts_async.learner.condition import Changes
from darts_async.learner.intake import Intervals
from darts_async.learner.rank_leader import Team
from darts_async.learner.ranks.gather import Shapes
from darts_async.learner.step import Trainer
from darts_async.machine.full_disk import Patience
from darts_async.protocol import GatherWeights, SaveCheckpoint
from darts_async.wire.atomic_dir import FileSum

SHAPER_PATIENCE_S = 10.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Saver:
    """Writes checkpoints of one trainer."""

    root: Path
    """The directory that holds them."""
    team: Team
    tokenizer_dir: Path
    dtype: torch.dtype
    """Of the weights in the Hugging Face files."""
    keep: int
    """How many of the newest are kept."""
    saved: Callable[[int, int], None]
    """Called on the event loop with each version that is on the disk, and the oldest one to come back to."""
    patience: Patience
    """For a full disk."""
    shaper_states: Mapping[int, bytes]
    """The shaper's state at each version, as it becomes known; `changes` tells when."""
    changes: Changes

    async def save(self, tasks: asyncio.TaskGroup, trainer: Trainer, consumed: Intervals, *, has_shaper: bool) -> None:
        """Begin to write a checkpoint of the trainer, which may continue when this returns."""
        with checkpoint.naming_failures(self.root):
            open_it = partial(checkpoint.open_checkpoint, self.root, trainer.policy_version)
            staging = await asyncio.to_thread(self.patience.write, self.root, open_it, _nothing)
        self.team.tell(SaveCheckpoint(trainer.policy_version))
        snapshot = await asyncio.to_thread(checkpoint.Snapshot.of, trainer)
        writing = self._write(staging, snapshot, trainer, consumed, has_shaper=has_shaper)
        tasks.create_task(writing, name="write a checkpoint")

    async def _write(
        self, staging: Path, snapshot: checkpoint.Snapshot, trainer: Trainer, consumed: Intervals, *, has_shaper: bool
    ) -> None:
        version = snapshot.policy_version
        with checkpoint.naming_failures(self.root):
            part = await write_part(self.patience, staging, snapshot)
            weights = await asyncio.to_thread(self._whole_weights, snapshot, trainer.row_shapes())
            write = partial(write_model, staging, trainer.model, weights, self.dtype, self.tokenizer_dir)
            await asyncio.to_thread(self.patience.write, staging, write, partial(checkpoint.remove_model, staging))
            parts = [part, *await self.team.saved(version)]
            shaper_state = await self._shaper_state(version) if has_shaper else b""
            complete = partial(checkpoint.complete, staging, snapshot, parts, consumed, shaper_state, self.keep)
            await asyncio.to_thread(self.patience.write, staging, complete, _nothing)
        log.info("checkpoint_saved", policy_version=version)
        self.saved(version, await asyncio.to_thread(checkpoint.oldest_kept, self.root, self.keep))

    def _whole_weights(self, snapshot: checkpoint.Snapshot, shapes: Shapes) -> Mapping[str, Tensor]:
        if self.team.rank_info.num_ranks == 1:
            return snapshot.weights
        order = GatherWeights(snapshot.policy_version, of_checkpoint=True)
        tensors = self.team.gathered(snapshot.weights, shapes, self.dtype, order).tensors()
        return dict(zip(snapshot.weights, tensors, strict=True))

    async def _shaper_state(self, version: int) -> bytes:
        try:
            await self.changes.until(
                lambda: version in self.shaper_states, SHAPER_PATIENCE_S, lambda: f"the shaper's state at {version}"
            )
        except DeadlineError as error:
            log.warning("checkpoint_without_shaper", policy_version=version, error=str(error))
            return b""
        return self.shaper_states[version]


async def write_part(patience: Patience, staging: Path, snapshot: checkpoint.Snapshot) -> FileSum:
    """Write the state of this rank, if the disk is full as soon as there is space."""
    path = checkpoint.part_path(staging, snapshot)
    write = partial(checkpoint.write_part, staging, snapshot)
    return await asyncio.to_thread(patience.write, staging, write, partial(path.unlink, missing_ok=True))


def _nothing() -> None:
    """A small file, or none, is left."""
