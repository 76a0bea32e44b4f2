"""Looks for new rollouts during a run, for the live view: in a thread, for files may be large and disks slow."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from darts_async.rollouts import Rollout, best_and_worst, read_rollouts, rollout_files
from darts_async.topology.run_files import SAMPLES_DIR

LOOK_EVERY_S = 2.0

Take = Callable[[Sequence[Rollout]], None]
"""Is given two samples of a step."""


@contextlib.asynccontextmanager
async def watched_rollouts(run_dir: Path, take: Take) -> AsyncIterator[None]:
    """Inside the block, two samples of each new step are handed to `take`, on the event loop."""
    task = asyncio.create_task(_watch(run_dir / SAMPLES_DIR, take), name="rollouts")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _watch(directory: Path, take: Take) -> None:
    seen = -1
    while True:
        found = await asyncio.to_thread(newest_two, directory, seen)
        if found is not None:
            seen, rollouts = found
            take(rollouts)
        await asyncio.sleep(LOOK_EVERY_S)


def newest_two(directory: Path, seen: int) -> tuple[int, list[Rollout]] | None:
    """Of the newest step with samples that were trained on, two that show the range; None if it is `seen` already. A
    file that cannot be read is passed over: the one before may be better."""
    try:
        newest = sorted(rollout_files(directory, "train").items(), reverse=True)[:2]
    except OSError:
        return None
    for step, path in newest:
        if step == seen:
            return None
        try:
            trained = [rollout for rollout in read_rollouts(path) if rollout.outcome == "trained"]
        except (OSError, ValueError):
            continue
        if trained:
            return step, best_and_worst(trained)
    return None
