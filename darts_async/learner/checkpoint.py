"""Checkpoints: complete or absent, loadable by transformers, bitwise to resume from; no pickle.

    ROOT/step-000050/
        config.json, model.safetensors, tokenizer files    a Hugging Face model, for anybody
        trainer.safetensors                                float32 weights, AdamW moments, random states
        manifest.json                                      version, sizes of all other files, the caller's state

A checkpoint is written to a hidden directory, the manifest last, flushed to the disk and then renamed, so a crash at
any point leaves the old checkpoints and no half of a new one. The sizes in the manifest find what a broken disk or
copy did. A single process writes to ROOT.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from darts_async.errors import CheckpointError
from darts_async.learner.step import Trainer

FORMAT = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer.safetensors"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a complete checkpoint holds."""

    format: int
    policy_version: int
    file_bytes: dict[str, int]
    extra: dict[str, Any]


def save(root: Path, trainer: Trainer, *, tokenizer_dir: Path, keep: int, extra: dict[str, Any]) -> Path:
    """Write `step-NNNNNN` of the trainer's version, between two steps, and keep the `keep` newest ones.

    `extra` is the caller's own state (consumed group ids, say), anything JSON can hold. When this returns, the
    checkpoint is on the disk. Returns its directory.
    """
    staging = _staging(root / f"step-{trainer.policy_version:06d}")
    _write_model(trainer.model, tokenizer_dir, staging)
    save_file(trainer.state_tensors() | _random_states(), staging / TRAINER_STATE)
    file_bytes = {file.name: file.stat().st_size for file in staging.iterdir()}
    manifest = Manifest(FORMAT, trainer.policy_version, file_bytes, extra)
    (staging / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    path = _put_in_place(staging)
    _remove_old(root, path, keep)
    return path


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint in `root`; None if there is none at all.

    Raises `CheckpointError` if there are checkpoints, but all of them are damaged: starting over is not ours to decide.
    """
    damage = ""
    for path in reversed(_checkpoints(root)):
        try:
            _read_manifest(path)
        except CheckpointError as error:
            damage = damage or str(error)
        else:
            return path
    if damage:
        raise CheckpointError(f"no checkpoint in {root} is complete; remove them to start over. The newest: {damage}")
    return None


def restore(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Make the trainer, and torch's random states, continue from `path`. Returns `extra`.

    Raises `CheckpointError` if the checkpoint is missing, damaged, or of another model; the trainer is then as before.
    """
    manifest = _read_manifest(path)
    try:
        tensors = load_file(path / TRAINER_STATE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / TRAINER_STATE} cannot be read: {error}") from error
    random_states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("random.")}
    _check_same_model(path, tensors, trainer.state_tensors())
    trainer.load_state_tensors(tensors, manifest.policy_version)
    _set_random_states(random_states)
    return manifest.extra


def export(model: PreTrainedModel, tokenizer_dir: Path, out_dir: Path) -> None:
    """Write the model and its tokenizer in Hugging Face format; replaces `out_dir` as a whole."""
    staging = _staging(out_dir)
    _write_model(model, tokenizer_dir, staging)
    _put_in_place(staging)


def _write_model(model: PreTrainedModel, tokenizer_dir: Path, out_dir: Path) -> None:
    model.save_pretrained(out_dir)
    for pattern in TOKENIZER_FILES:
        for file in tokenizer_dir.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out_dir / file.name)


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random.cuda"])


def _check_same_model(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "absent" for tensors in (found, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path} is of another model: {name} is {shapes[0]} there and {shapes[1]} in the model of this run"
            )


def _checkpoints(root: Path) -> list[Path]:
    """Directories of checkpoints, complete or not, oldest first."""
    found = [path for path in root.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _read_manifest(path: Path) -> Manifest:
    """The manifest of a complete checkpoint; raises `CheckpointError` that says what is wrong with it."""
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {MANIFEST} cannot be read ({error})") from error
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {MANIFEST} is damaged ({error})") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.format}, but this version reads format {FORMAT}")
    for name, num_bytes in manifest.file_bytes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else "none"
        if found != num_bytes:
            raise CheckpointError(f"{path} is torn: {name} should have {num_bytes} bytes and has {found}")
    return manifest


def _staging(target: Path) -> Path:
    """An empty hidden directory beside `target`; what a crashed run left there is removed."""
    staging = target.parent / f".writing-{target.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _put_in_place(staging: Path) -> Path:
    """Flush a staged directory to the disk and give it its name, replacing what has that name."""
    for path in (*staging.iterdir(), staging):
        _flush(path)
    target = staging.parent / staging.name.removeprefix(".writing-")
    replaced = _set_aside(target) if target.exists() else None
    staging.rename(target)
    _flush(target.parent)
    if replaced:
        shutil.rmtree(replaced)
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(root: Path, newest: Path, keep: int) -> None:
    for path in _checkpoints(root)[:-keep]:
        if path != newest:
            shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Hide a directory that is to be removed, so that it is never seen half removed."""
    doomed = path.parent / f".removing-{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    return path.rename(doomed)
