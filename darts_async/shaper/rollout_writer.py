"""Writes the files of rollouts, in a thread of its own: no event waits for a text, a compression or a disk.

Rollouts are never worth a run. Where the thread falls too far back, the disk is full or a text cannot be made, the
groups of a file are given up and counted, and the first reason is logged. `samples/` stays within its limit: the oldest
training steps are removed first, then the oldest evaluations.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from darts_async.advantage import Decoded, trained_advantages
from darts_async.config import RunConfig
from darts_async.errors import DataError
from darts_async.protocol import group_id_of, sample_id_of
from darts_async.rollouts import FileName, Rollout, encode_rollouts, parse_name
from darts_async.shaper.group import Group, Sample, train_group
from darts_async.shaper.rollouts import RolloutFile
from darts_async.wire.atomic_file import replace_file

MAX_WAITING: Final = 8
"""Files that wait for the thread. The oldest of more are given up."""
CLOSE_WITHIN_S: Final = 5.0
"""How long the end of the process waits for the last files."""
_QUEUED: Final = 2

log = structlog.get_logger()


class RolloutWriter:
    """Hands files to the thread and hears of them, without waiting. All methods are called by one thread.

    Args:
        directory: where the files go. It need not exist.
        config: of the run.
        load_tokenizer: called in the thread, before the first file.
    """

    def __init__(self, directory: Path, config: RunConfig, load_tokenizer: Callable[[], Tokenizer]) -> None:
        self._folder = _Folder(directory, int(config.telemetry.samples_max_mb * 1e6))
        self._config = config
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._queue: queue.Queue[tuple[int, RolloutFile] | FileName | None] = queue.Queue(_QUEUED)
        self._finished: queue.SimpleQueue[tuple[int, int, bool]] = queue.SimpleQueue()
        self._offered: set[int] = set()
        self._void_from: FileName | None = None
        self._timeline = 0
        """How often files became void. What was offered before that is not heard of again."""
        self._has_warned = False
        self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
        self._thread.start()

    def turn(self, unwritten: Sequence[RolloutFile]) -> list[tuple[int, bool]]:
        """Offer the files that are to be written. Returns, of earlier ones, the serial of each that is done with, and
        whether it was given up."""
        if self._void_from is not None and self._put(self._void_from):
            self._void_from = None
        done = list(self._heard())
        known = self._offered | {serial for serial, _ in done}
        waiting = [file for file in unwritten if file.serial not in known]
        for file in waiting[: max(0, len(waiting) - MAX_WAITING)]:
            self._warn("more files wait than the thread can write in time")
            done.append((file.serial, True))
        for file in waiting[-MAX_WAITING:]:
            if self._void_from is not None or not self._put((self._timeline, file)):
                break
            self._offered.add(file.serial)
        return done

    def void(self, num_steps: int) -> None:
        """The files of training steps from this one on, and of evaluations of later versions, are of what was undone or
        never happened."""
        self._void_from = FileName("train", num_steps)
        self._timeline += 1
        self._offered.clear()

    def close(self, unwritten: Sequence[RolloutFile] = ()) -> None:
        """Write the rest, for a few seconds at most. Blocks."""
        deadline_s = time.monotonic() + CLOSE_WITHIN_S
        rest = [(self._timeline, file) for file in unwritten if file.serial not in self._offered]
        try:
            for item in (*([self._void_from] if self._void_from is not None else []), *rest, None):
                self._queue.put(item, timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Full:
            log.warning("rollouts_not_written", error="the process ends, and the thread is still writing earlier ones")
        self._thread.join(max(0.0, deadline_s - time.monotonic()))

    def _put(self, item: tuple[int, RolloutFile] | FileName) -> bool:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            return False
        return True

    def _heard(self) -> Iterator[tuple[int, bool]]:
        while not self._finished.empty():
            timeline, serial, is_given_up = self._finished.get()
            if timeline == self._timeline:
                self._offered.discard(serial)
                yield serial, is_given_up

    def _warn(self, error: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("rollouts_not_written", error=error, then="others that fail are counted: run/groups_not_shown")

    # --- in the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, FileName):
                    self._folder.remove_from(item.number)
                    continue
                self._write(item[1])
            except Exception as error:  # noqa: BLE001 - the edge of the thread: rollouts are never worth a run
                self._warn(f"{type(error).__name__}: {error}")
                is_given_up = True
            else:
                is_given_up = False
            if not isinstance(item, FileName):
                self._finished.put((item[0], item[1].serial, is_given_up))

    def _write(self, file: RolloutFile) -> None:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        self._folder.write(file.name, encode_rollouts(rollouts_of(file, self._config, self._tokenizer)))


class _Folder:
    """The files and their sizes."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._sizes: dict[FileName, int] | None = None

    def write(self, name: FileName, data: bytes) -> None:
        """Put a file on its place, after making room for it within the limit."""
        if len(data) > self._max_bytes:
            raise DataError(f"{name} has {len(data):,} bytes: telemetry.samples_max_mb allows {self._max_bytes:,}")
        sizes = self._known()
        others = {other: size for other, size in sizes.items() if other != name}
        too_many = len(data) + sum(others.values()) - self._max_bytes
        for other in sorted(others, key=lambda each: (each.kind != "train", each.number)):
            if too_many <= 0:
                break
            too_many -= others[other]
            self._remove(other)
        replace_file(self._directory / str(name), data)
        sizes[name] = len(data)

    def remove_from(self, num_steps: int) -> None:
        """Remove what is of training steps from this one on, and of evaluations of versions after it."""
        for name in list(self._known()):
            if name.number >= num_steps + (name.kind == "held-out"):
                self._remove(name)

    def _remove(self, name: FileName) -> None:
        (self._directory / str(name)).unlink(missing_ok=True)
        self._known().pop(name, None)

    def _known(self) -> dict[FileName, int]:
        """Looked up once. What a killed process has begun to write is removed."""
        if self._sizes is None:
            self._directory.mkdir(exist_ok=True)
            for path in self._directory.glob("*.new"):
                path.unlink(missing_ok=True)
            found = [(parse_name(path.name), path.stat().st_size) for path in self._directory.iterdir()]
            self._sizes = {name: size for name, size in found if name is not None}
        return self._sizes


def rollouts_of(file: RolloutFile, config: RunConfig, tokenizer: Tokenizer) -> Iterator[Rollout]:
    """The records of a file, one after another."""
    for group in file.groups:
        yield from _of_group(file.name, group, config, tokenizer)


def _of_group(name: FileName, group: Group, config: RunConfig, tokenizer: Tokenizer) -> Iterator[Rollout]:
    prompt = group.prompt
    model_input = tokenizer.decode(prompt.token_ids.tolist(), skip_special_tokens=False)
    metadata = msgspec.json.decode(prompt.metadata_json)
    weights, advantages = _of_gradient(group, config)
    for index, sample in enumerate(group.samples):
        assert sample.sample_id == sample_id_of(group.group_id, index)
        token_ids = sample.token_ids().tolist()
        yield Rollout(
            kind=name.kind,
            step=name.number,
            sample=f"{group_id_of(sample.sample_id)}/{index}",
            group_id=group.group_id,
            sample_index=index,
            prompt_id=prompt.prompt_id,
            prompt=prompt.text,
            model_input=model_input,
            answer=prompt.answer,
            metadata=metadata,
            text=tokenizer.decode(token_ids, skip_special_tokens=True),
            tokens=token_texts(token_ids, tokenizer),
            token_ids=token_ids,
            logprobs=_rounded(_all_logprobs(sample)),
            versions=[version for version, chunk, _ in sample.chunks for _ in range(len(chunk))],
            length=sample.num_tokens,
            finish_reason=sample.finish_reason,
            outcome=sample.end_outcome,
            why=sample.end_reason,
            selected=sample.sample_id in weights,
            reward=sample.reward,
            reward_parts=dict(zip(config.reward.labels, sample.reward_parts, strict=False)),  # none of a failed reward
            weight=weights.get(sample.sample_id),
            baseline=group.baseline,
            advantage=advantages.get(sample.sample_id),
            generators=sample.decoded_by,
            oldest_version=sample.oldest_version,
            newest_version=sample.newest_version,
        )


def _of_gradient(group: Group, config: RunConfig) -> tuple[dict[int, float], dict[int, float]]:
    """Weights and advantages of the selected samples, by their ids; nothing of a group that was not shipped."""
    kept = group.kept
    if not kept or group.step is None:
        return {}, {}
    advantages = trained_advantages(
        train_group(group),
        config.learner.loss,
        config.sampling.max_new_tokens,
        baseline=config.shaping.baseline,
        decoded=Decoded.of(config.shaping),
    )
    ids = [sample.sample_id for sample, _ in kept]
    return dict(zip(ids, (weight for _, weight in kept), strict=True)), dict(
        zip(ids, _rounded(advantages), strict=True)
    )


_MAX_PENDING_TOKENS = 16
"""No character has more tokens than this."""


def token_texts(token_ids: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token: joined they are the whole text. Where a character takes several tokens, it comes with the
    last of them. Longer runs of tokens that are no text are decoded one by one: a stream decodes all of them again with
    each."""
    texts: list[str] = []
    stream, num_pending = DecodeStream(skip_special_tokens=False), 0
    for token_id in token_ids:
        text = stream.step(tokenizer, token_id) or ""
        num_pending = 0 if text else num_pending + 1
        if num_pending == _MAX_PENDING_TOKENS:
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            stream, num_pending = DecodeStream(skip_special_tokens=False), 0
        texts.append(text)
    return texts


def _all_logprobs(sample: Sample) -> NDArray[np.float32]:
    chunks = [logprobs for _, _, logprobs in sample.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, np.float32)


def _rounded(values: NDArray[np.float32]) -> list[float]:
    rounded: list[float] = np.round(values.astype(np.float64), 4).tolist()
    return rounded
