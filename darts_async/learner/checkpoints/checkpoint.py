"""Writes and reads checkpoints: complete or absent, bitwise resumable by any number of ranks, without pickle.

    ROOT/step-000050/
        config.json, model*.safetensors, tokenizer files   a Hugging Face model
        trainer-00001-of-00004.safetensors                 of each rank: what it trains, moments, random states
        shaper.state                                       the shaper's state at that step, for the shaper alone
        manifest.json                                      version, shapes, consumed groups, sums of all other files

Writing. A `Snapshot` is copied to the host between two steps; the rest may happen while training continues. Each rank
writes its part, rank 0 the other files, the manifest last; then the directory is flushed and renamed (see
`atomic_dir`), so a crash leaves the old checkpoints and no half of a new one. All ranks see the same ROOT, and one run
writes to it.

Reading. The rows of a rank follow from the shapes alone, so each rank of a new run of any size reads only its own rows
out of the parts that hold them. Before that, rank 0 reads every file once and compares its size and CRC-32 with the
manifest. If anything is damaged, the checkpoint before is used, and the damaged one is renamed to
`step-000050.damaged`, so that it does not count as kept. It is removed when training is past it.

Keeping. The newest `keep` checkpoints are kept. While there are fewer, the first model is also a point to come back to:
if all checkpoints are damaged, training begins again with it. With `keep = 1` damage to the one point is an error.

`torch.distributed.checkpoint` is not used: its metadata is a pickle, and its planner sends pickles between the ranks.
"""

import contextlib
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from darts_async.errors import CheckpointError
from darts_async.faults import present
from darts_async.learner.intake import Intervals
from darts_async.learner.ranks.rank_info import RankInfo, overlaps, rows_of
from darts_async.learner.step import Trainer
from darts_async.topology.run_files import SHAPER_STATE_FILE
from darts_async.wire.atomic_dir import FileSum, file_sum, open_staging, put_in_place, set_aside
from darts_async.wire.atomic_file import flush

FORMAT = 4
MANIFEST = "manifest.json"
_DAMAGED = ".damaged"
_READERS = 4
"""Files of a checkpoint that are read at a time: one thread takes in about 1 GB/s."""
_PER_ROW = ("weight", "exp_avg", "exp_avg_sq")

log = structlog.get_logger()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a complete checkpoint holds."""

    format: int
    policy_version: int
    num_ranks: int
    shapes: dict[str, tuple[int, ...]]
    """Of all that is trained, whole, in the order of the model."""
    consumed: Intervals
    """Groups in some gradient so far."""
    files: dict[str, FileSum]
    crc32: int = 0
    """Of the encoded manifest in which this is 0: a flipped bit may turn one number into another."""

    def sum(self) -> int:
        """What `crc32` is if nothing is damaged."""
        return zlib.crc32(msgspec.json.encode(replace(self, crc32=0)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A trainer between two steps, in memory that no later step changes."""

    policy_version: int
    rank_info: RankInfo
    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, Tensor]
    weights: Mapping[str, Tensor]
    """This rank's rows of every weight of the model, in its order, adapters merged."""

    @classmethod
    def of(cls, trainer: Trainer) -> "Snapshot":
        tensors = trainer.state_tensors() | _random_states()
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        rows = trainer.rows()
        weights = rows if trainer.has_adapters else {name: copies[f"weight.{name}"] for name in rows}
        return cls(trainer.policy_version, trainer.rank_info, trainer.shapes(), copies, weights)


# --- writing -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming_failures(root: Path) -> Iterator[None]:
    """Raise `CheckpointError` where the disk does not take a checkpoint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"a checkpoint cannot be written to {root}: {error}") from error


def directory_of(root: Path, policy_version: int) -> Path:
    """Where the checkpoint of a version lies."""
    return root / f"step-{policy_version:06d}"


def open_checkpoint(root: Path, policy_version: int) -> Path:
    """Rank 0, first: make the directory that all ranks write to. Returns it."""
    return open_staging(directory_of(root, policy_version))


def write_part(staging: Path, snapshot: Snapshot) -> FileSum:
    """Each rank: write its own state. Returns what the manifest says of the file."""
    path = part_path(staging, snapshot)
    save_file(snapshot.tensors, path)
    return file_sum(path)


def part_path(staging: Path, snapshot: Snapshot) -> Path:
    """Where a rank writes its own state."""
    return staging / _part_name(snapshot.rank_info.rank, snapshot.rank_info.num_ranks)


def remove_model(staging: Path) -> None:
    """Remove what `write_model` has left in the directory of a checkpoint."""
    for path in staging.iterdir():
        if path.is_file() and not path.name.startswith("trainer-"):
            path.unlink()


def complete(
    staging: Path, snapshot: Snapshot, parts: Sequence[FileSum], consumed: Intervals, shaper_state: bytes, keep: int
) -> Path:
    """Rank 0, when all `parts` are written: add the manifest, give the directory its name, keep the `keep` newest ones.
    Returns the directory, which is on the disk then."""
    (staging / SHAPER_STATE_FILE).write_bytes(shaper_state)
    num_ranks = snapshot.rank_info.num_ranks
    files = {_part_name(rank, num_ranks): part for rank, part in enumerate(parts)}
    rest = [file for file in staging.iterdir() if file.name not in files]
    manifest = Manifest(
        format=FORMAT,
        policy_version=snapshot.policy_version,
        num_ranks=num_ranks,
        shapes=snapshot.shapes,
        consumed=consumed,
        files=files | {file.name: file_sum(file) for file in rest},
    )
    present().reach("learner.before_manifest")
    (staging / MANIFEST).write_bytes(msgspec.json.encode(replace(manifest, crc32=manifest.sum())))
    present().reach("learner.before_place")
    path = put_in_place(staging)
    _remove_old(path.parent, path, keep)
    return path


def export(checkpoint: Path, out_dir: Path) -> None:
    """Copy the model and its tokenizer out of a checkpoint; replaces `out_dir` as a whole."""
    staging = open_staging(out_dir)
    manifest = read_manifest(checkpoint)
    for name in manifest.files:
        if not name.startswith("trainer-") and name != SHAPER_STATE_FILE:
            shutil.copyfile(checkpoint / name, staging / name)
    put_in_place(staging)


# --- reading -------------------------------------------------------------------------------------------------


def latest(root: Path, keep: int) -> Path | None:
    """The newest complete checkpoint in `root`, after reading all of its files; None to begin with the first model.
    Damaged ones are logged, passed over and renamed.

    Raises `CheckpointError`, and renames nothing, if all checkpoints are damaged and the first model is not a point to
    come back to: whether to start over is for the user to decide.
    """
    damage: dict[Path, str] = {}
    found = None
    for path in reversed(_checkpoints(root)):
        try:
            check_files(path, read_manifest(path))
        except CheckpointError as error:
            log.warning("checkpoint_passed_over", error=str(error))
            damage[path] = str(error)
        else:
            found = path
            break
    if damage and found is None and not _is_start_kept(root, keep):
        newest = next(iter(damage.values()))
        raise CheckpointError(f"no checkpoint in {root} is complete; remove them to start over. The newest: {newest}")
    for path in damage:
        _name_damaged(path)
    return found


def oldest_kept(root: Path, keep: int) -> int:
    """The oldest version that a learner may come back at: of the oldest checkpoint, or 0 for the first model."""
    versions = [_version_of(path) for path in _checkpoints(root)]
    return 0 if _is_start_kept(root, keep) else min(versions, default=0)


def restore(path: Path, trainer: Trainer) -> Manifest:
    """Make the trainer, and torch's random states, continue from `path`, whose files `latest` has checked. Raises
    `CheckpointError` if it is missing, torn, or of another model; the trainer is then as before."""
    manifest = read_manifest(path)
    _check_same_model(path, manifest.shapes, trainer.shapes())
    trainer.load_state_tensors(read_state(path, manifest, trainer.rank_info), manifest.policy_version)
    _set_random_states(_read_random_states(path, manifest, trainer.rank_info))
    return manifest


def shaper_state(path: Path) -> bytes:
    """The shaper's state in a checkpoint; empty if it did not come in time."""
    try:
        return (path / SHAPER_STATE_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / SHAPER_STATE_FILE} cannot be read: {error}") from error


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint. Raises `CheckpointError` if it is damaged, or a file is missing or too short."""
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {MANIFEST} cannot be read ({error})") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {MANIFEST} is damaged ({error})") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.format}, but this version reads format {FORMAT}")
    if manifest.crc32 != manifest.sum():
        raise CheckpointError(f"{path} is damaged: {MANIFEST} is not what was written")
    for name, expected in manifest.files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else "none"
        if found != expected.num_bytes:
            raise CheckpointError(f"{path} is torn: {name} should have {expected.num_bytes} bytes and has {found}")
    return manifest


def check_files(path: Path, manifest: Manifest) -> None:
    """Read every file. Raises `CheckpointError` if one is not what was written."""
    try:
        with ThreadPoolExecutor(_READERS) as readers:
            sums = list(readers.map(file_sum, [path / name for name in manifest.files]))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for (name, expected), found in zip(manifest.files.items(), sums, strict=True):
        if found != expected:
            raise CheckpointError(
                f"{path} is damaged: the CRC-32 of {name} is {found.crc32:08x}, but {expected.crc32:08x} was written"
            )


def _check_same_model(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        shapes = [shape.get(name, "absent") for shape in (found, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path} is of another model: {name} is {shapes[0]} there and {shapes[1]} in the model of this run"
            )


def read_state(path: Path, manifest: Manifest, rank_info: RankInfo) -> dict[str, Tensor]:
    """This rank's rows of all tensors."""
    parts = [_open_part(path, rank, manifest.num_ranks) for rank in range(manifest.num_ranks)]
    tensors = {"counts": parts[0].get_tensor("counts")}
    for name, shape in manifest.shapes.items():
        for kind in _PER_ROW:
            tensors[f"{kind}.{name}"] = _read_rows(parts, f"{kind}.{name}", shape, rank_info)
    return tensors


def _read_rows(parts: list[Any], name: str, shape: tuple[int, ...], rank_info: RankInfo) -> Tensor:
    if not shape:  # a number has no rows; only a model in one piece may have one
        number: Tensor = parts[0].get_tensor(name)
        return number
    start, stop = rows_of(shape[0], rank_info.rank, rank_info.num_ranks)
    pieces = [parts[k].get_slice(name)[first:last] for k, first, last in overlaps(start, stop, shape[0], len(parts))]
    return torch.cat(pieces) if pieces else torch.empty((0, *shape[1:]))


def _open_part(path: Path, rank: int, num_ranks: int) -> Any:
    file = path / _part_name(rank, num_ranks)
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _read_random_states(path: Path, manifest: Manifest, rank_info: RankInfo) -> dict[str, Tensor]:
    """Those of the same rank. With another number of ranks nothing can be bitwise equal, and any state will do."""
    part = _open_part(path, rank_info.rank % manifest.num_ranks, manifest.num_ranks)
    return {name: part.get_tensor(name) for name in part.keys() if name.startswith("random.")}  # noqa: SIM118


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random.cuda"])


# --- the directory -------------------------------------------------------------------------------------------


def _part_name(rank: int, num_ranks: int) -> str:
    return f"trainer-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"


def _checkpoints(root: Path, suffix: str = "") -> list[Path]:
    """Directories of checkpoints, oldest first; with the suffix `_DAMAGED` those that were renamed."""
    found = [path for path in root.glob(f"step-*{suffix}") if path.name[5:].removesuffix(suffix).isdigit()]
    return sorted(found, key=_version_of)


def _version_of(path: Path) -> int:
    return int(path.name[5:].removesuffix(_DAMAGED))


def _is_start_kept(root: Path, keep: int) -> bool:
    """Whether there have been fewer checkpoints than are kept."""
    return len(_checkpoints(root)) + len(_checkpoints(root, _DAMAGED)) < keep


def _name_damaged(path: Path) -> None:
    target = path.with_name(path.name + _DAMAGED)
    try:
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        flush(path.parent)  # else it may return after a power loss
    except OSError as error:
        raise CheckpointError(f"{path} is damaged and cannot be renamed to {target.name}: {error}") from error


def _remove_old(root: Path, newest: Path, keep: int) -> None:
    passed = [path for path in _checkpoints(root, _DAMAGED) if _version_of(path) <= _version_of(newest)]
    for path in (*_checkpoints(root)[:-keep], *passed):
        if path != newest:
            shutil.rmtree(set_aside(path))
