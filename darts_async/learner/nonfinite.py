"""The batch of a step whose loss or gradient was not finite, saved for a later analysis."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import save_file

from darts_async.errors import TrainingError
from darts_async.protocol import TrainGroup


def stop_training(run_dir: Path, groups: Sequence[TrainGroup], num_skipped: int) -> TrainingError:
    """Save the groups of the last step; returns the error to raise, which names the file."""
    path = run_dir / f"nonfinite-step-{groups[0].step:06d}.safetensors"
    save_groups(path, groups)
    return TrainingError(
        f"the loss or the gradient was not finite in {num_skipped} steps in a row (learner.max_skipped_steps), the "
        f"last was step {groups[0].step}; its {len(groups)} groups are in {path}. Lower learner.learning_rate or "
        "learner.max_grad_norm, or look for log-probabilities and rewards out of bounds there"
    )


def save_groups(path: Path, groups: Sequence[TrainGroup]) -> None:
    """Write groups to a safetensors file: `GROUP_ID/FIELD` for each array."""
    arrays: dict[str, np.ndarray] = {}
    for group in groups:
        fields = msgspec.structs.asdict(group)
        fields["baseline"] = np.nan if group.baseline is None else group.baseline
        arrays |= {f"{group.group_id}/{name}": np.asarray(value) for name, value in fields.items()}
    save_file(arrays, path)
