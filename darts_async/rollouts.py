"""Rollouts as they are kept: one record per sample, one compressed file per step or evaluation.

A file is lines of JSON under gzip, so one line of pandas or duckdb makes a table of it:

    pandas.read_json("runs/NAME/samples/train-000012.jsonl.gz", lines=True)
    duckdb.sql("select outcome, avg(reward) from 'runs/NAME/samples/train-*.jsonl.gz' group by outcome")

Files are replaced atomically and named by what they are about, so one that is written again overwrites itself. The
shaper writes them (`shaper.rollout_writer`), and anything may read them. The number in a name is the step, counted from
0 as in `metrics.jsonl`, or the policy version that was evaluated.
"""

import gzip
import re
import zlib
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from darts_async.topology.outcomes import SampleOutcome

RolloutKind = Literal["train", "held-out"]
SUFFIX: Final = ".jsonl.gz"
_NAME = re.compile(r"(train|held-out)-(\d+)" + re.escape(SUFFIX))
_COMPRESSION_LEVEL = 3
"""Higher levels take several times as long for a few percent."""


class Rollout(Struct, frozen=True, kw_only=True):
    """One sample: a line of a file. All samples of a group are in the same file, in launch order.

    Example:
        >>> line = '{"kind":"train","step":12,"sample":"7/3","group_id":7,"sample_index":3,"prompt_id":5,'
        >>> line += '"prompt":"1+1=","text":"2","outcome":"trained","reward":1.0}'
        >>> rollout = msgspec.json.decode(line, type=Rollout)
        >>> rollout.sample, rollout.text, rollout.reward, rollout.advantage
        ('7/3', '2', 1.0, None)
    """

    kind: RolloutKind
    step: int
    """The step that has the group in its gradient, or that was next when the group was given up; or the policy version
    that was evaluated."""
    sample: str
    """As `darts-launch story` takes it: GROUP/INDEX."""
    group_id: int
    sample_index: int
    prompt_id: int
    prompt: str
    """As the reward function gets it."""
    model_input: str = ""
    """What the model saw: the prompt with the chat template and special tokens."""
    answer: str = ""
    metadata: dict[str, Any] = {}
    text: str = ""
    """As the reward function gets it: without special tokens."""
    tokens: list[str] = []
    """The text of each token, special tokens included; empty where the text of several tokens comes with the last of
    them. [length]"""
    token_ids: list[int] = []
    logprobs: list[float] = []
    """Of the behaviour policy, to four decimals. [length]"""
    versions: list[int] = []
    """The policy version that decoded each token. [length]"""
    length: int = 0
    """Tokens that were decoded."""
    finish_reason: str | None = None
    """`stop`, `length`, or None where the response was not complete."""
    outcome: SampleOutcome
    why: str = ""
    """The reason for the outcome, as in the ledger."""
    selected: bool = False
    """Whether its rule has kept it for the gradient."""
    reward: float | None = None
    """None: not scored, or the reward failed. Such a sample is never one with reward 0."""
    reward_parts: dict[str, float] = {}
    """Of each of several reward functions, before its weight."""
    weight: float | None = None
    """Of a selected sample, in the loss."""
    baseline: float | None = None
    """The prompt's pass rate, where rewards are compared with the history."""
    advantage: float | None = None
    """Of a selected sample, as the gradient had it: with its weight."""
    generators: list[str] = []
    """Which generators decoded it, in order: several where some died."""
    oldest_version: int | None = None
    newest_version: int | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it has no reward because its reward failed, or the engine rejected its prompt."""
        return self.why.startswith("reward_") or self.why == "rejected_by_engine"


class FileName(NamedTuple):
    """What a file is about."""

    kind: RolloutKind
    number: int

    def __str__(self) -> str:
        """
        >>> str(FileName("train", 12))
        'train-000012.jsonl.gz'
        """
        return f"{self.kind}-{self.number:06}{SUFFIX}"


def parse_name(name: str) -> FileName | None:
    """What the file of this name is about; None if it is not a file of rollouts."""
    found = _NAME.fullmatch(name)
    return FileName("train" if found[1] == "train" else "held-out", int(found[2])) if found else None


def rollout_files(directory: Path, kind: RolloutKind) -> dict[int, Path]:
    """The files of a kind by their number, ascending; none if the directory is not there. Raises `OSError`."""
    try:
        names = [(parse_name(path.name), path) for path in directory.iterdir()]
    except FileNotFoundError:
        return {}
    return dict(sorted((name.number, path) for name, path in names if name is not None and name.kind == kind))


def encode_rollouts(rollouts: Iterable[Rollout]) -> bytes:
    """The contents of a file: the same for the same rollouts."""
    packer = zlib.compressobj(_COMPRESSION_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    # One after another: each compression lets other threads run.
    parts = [packer.compress(msgspec.json.encode(rollout) + b"\n") for rollout in rollouts]
    return b"".join((*parts, packer.flush()))


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another version.
    """
    data = path.read_bytes()
    try:
        return [_decode(line) for line in gzip.decompress(data).splitlines()]
    except (EOFError, zlib.error, gzip.BadGzipFile, msgspec.DecodeError) as error:
        raise ValueError(str(error)) from error


def groups_of(rollouts: Iterable[Rollout]) -> list[list[Rollout]]:
    """The samples by group, in the order in which they come."""
    return [list(group) for _, group in groupby(rollouts, key=lambda rollout: (rollout.step, rollout.group_id))]


def best_and_worst(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Two samples that show the range: the highest and the lowest reward, or the shortest and the longest where all
    rewards are the same. Fewer if there are not two with a reward."""
    scored = sorted((each for each in rollouts if each.reward is not None), key=reward_and_length, reverse=True)
    if len(scored) < 2:
        return scored
    if scored[0].reward == scored[-1].reward:
        scored.sort(key=lambda rollout: rollout.length)
    return [scored[0], scored[-1]]


def reward_and_length(rollout: Rollout) -> tuple[float, int]:
    """Of equal rewards the shorter response is the better one."""
    return (rollout.reward or 0.0, -rollout.length)


_decode = msgspec.json.Decoder(Rollout).decode
