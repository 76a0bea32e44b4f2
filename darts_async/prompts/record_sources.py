"""Where the records of a run come from: files, tasks that are made, or a source of the user's that is called."""

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from darts_async.config.paths import expanded
from darts_async.errors import DataError
from darts_async.extensions import HUB, PROMPTS, TASKS, load
from darts_async.prompts.files import FileFormat
from darts_async.prompts.hub import DEFAULT_SPLIT, find_split
from darts_async.prompts.records import Fields, Record, parse_record, read_records
from darts_async.prompts.task_families import make_tasks

if TYPE_CHECKING:
    from darts_async.config.prompts import EvaluationSetConfig, FamilyConfig, PromptsConfig, RecordsConfig

Rows = Iterable[Mapping[str, Any]]
MAX_RECORDS = 1 << 22
"""What a source may give of each set: one without an end is a mistake."""


class Source(Protocol):
    """Gives records, of which some are held out, or two sets of them, `train` and `held_out`.

    Example:
        >>> def sums(*, num_train: int | None, held_out: int, seed: int) -> Rows:
        ...     for number in range((num_train or 1000) + held_out):
        ...         yield {"prompt": f"{number} + {number} =", "answer": 2 * number, "size": len(str(number))}
        >>> next(iter(sums(num_train=64, held_out=8, seed=0)))
        {'prompt': '0 + 0 =', 'answer': 0, 'size': 1}
    """

    def __call__(self, *, num_train: int | None, held_out: int, seed: int) -> Rows | Mapping[str, Rows]:
        """`prompts.num_train` (None if it is not set), `prompts.held_out` and a seed are handed over: the run's, or
        for a part of a mixture and an evaluation set one of its own. The same ones give the same records: a shaper that
        is started again asks again."""


_OF_TASKS = Fields("prompt", "answer")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the records. Those to train on are drawn in proportion to its weight."""

    name: str
    """Empty, if it is the only one and has none."""
    weight: float
    train: list[Record]
    """Empty for a set that is only evaluated on."""
    held_out: list[Record] | None
    """A separate set; None: `num_held_out` of `train` are held out."""
    num_train: int | None
    """Most training prompts to take; None: all."""
    num_held_out: int | None
    """None: all of a separate set that are short enough."""
    reward: str = ""
    """The reward function of this part alone."""

    @property
    def is_trained(self) -> bool:
        """Whether it is more than a set to evaluate on."""
        return bool(self.train)


def read_parts(prompts: "PromptsConfig", evaluated: "Iterable[EvaluationSetConfig]", seed: int) -> list[Part]:
    """The records of a run: the parts that are drawn in proportion to their weights, mostly one, and the sets that are
    only evaluated on.

    Raises:
        DataError: a file, a source or a record cannot be used.
        ExtensionError: the source cannot be loaded.
    """
    if not prompts.mixture:
        parts = _parts_of("", 1.0, prompts, seed)
    else:
        parts = [
            replace(part, reward=each.own_reward or "")
            for each in prompts.mixture
            for part in _parts_of(each.name, each.weight, each, seed)
        ]
    return parts + [_evaluated(each, seed) for each in evaluated]


def _evaluated(config: "EvaluationSetConfig", seed: int) -> Part:
    """A set that is only evaluated on."""
    reward = config.own_reward or ""
    if config.source == TASKS:
        tasks = [record for _, _, held_out in _tasks(config.name, config, 0, seed) for record in held_out]
        return Part(config.name, 1.0, [], tasks, None, None, reward)
    train, held_out = _read(config, _seed_for(config.name, seed))
    return Part(config.name, 1.0, [], train if held_out is None else held_out, None, config.held_out, reward)


def _parts_of(name: str, weight: float, config: "RecordsConfig", seed: int) -> list[Part]:
    """A source as one part; families of tasks as one part each."""
    if config.source != TASKS:
        train, held_out = _read(config, _seed_for(name, seed))
        return [Part(name, weight, train, held_out, config.num_train, config.held_out)]
    total = sum(family.weight for family in config.families)
    parts = []
    made = _tasks(name, config, config.num_train, seed)
    for own, (family, train, held_out) in zip(config.part_names(name), made, strict=True):
        share = weight * family.weight / total if name else family.weight
        parts.append(Part(own, share, train, held_out, None, None))
    return parts


def _seed_for(name: str, seed: int) -> int:
    """A seed of its own for each named set or part: one function called twice with one seed gives the same records, and
    those of an evaluation set are removed from training."""
    return random.Random(f"{seed}/{name}").randrange(1 << 31) if name else seed


def _tasks(
    of_set: str, config: "RecordsConfig", num_train: int | None, seed: int
) -> Iterator[tuple["FamilyConfig", list[Record], list[Record]]]:
    """The records of each family, to train on and held out."""
    made = make_tasks(config.families, num_train=num_train, held_out=config.held_out, seed=seed, of_set=of_set)
    for tasks in made:
        name = tasks.family.name
        train, held_out = (
            [parse_record(row, f"{name}, task {number}", _OF_TASKS) for number, row in enumerate(rows)]
            for rows in (tasks.train, tasks.held_out)
        )
        yield tasks.family, train, held_out


def _read(config: "RecordsConfig", seed: int) -> tuple[list[Record], list[Record] | None]:
    """Training records, and the held-out records if they are a separate set; none are tasks."""
    pattern = None if config.answer_pattern is None else re.compile(config.answer_pattern)
    fields = Fields(config.prompt_field, config.answer_field, pattern, config.metadata_fields)
    if config.source not in PROMPTS.built_in:
        return _ask(config, seed, fields)
    assert config.path is not None, "the configuration requires it"
    if config.source == HUB:
        return _read_hub(config, fields)
    file_format: FileFormat = "parquet" if config.source == "parquet" else "jsonl"
    records = read_records([expanded(config.path, "prompts.path")], file_format, fields)
    if config.held_out_path is None:
        return records, None
    held_out_path = expanded(config.held_out_path, "prompts.held_out_path")
    return records, read_records([held_out_path], file_format, fields)


def _read_hub(config: "RecordsConfig", fields: Fields) -> tuple[list[Record], list[Record] | None]:
    sets = []
    for split in (config.split or DEFAULT_SPLIT, config.held_out_split):
        if split is not None:
            found = find_split(config.path or "", subset=config.subset, split=split, revision=config.revision)
            sets.append(read_records(found.files, found.file_format, fields))
    return sets[0], sets[1] if len(sets) > 1 else None


def _ask(config: "RecordsConfig", seed: int, fields: Fields) -> tuple[list[Record], list[Record] | None]:
    """The records of a source that is called: an iterable of them, or a mapping of two sets."""
    where = f"prompts.source {config.source!r}"
    source: Source = load(PROMPTS, config.source)
    try:
        given = source(num_train=config.num_train, held_out=config.held_out, seed=seed)
        sets = given if isinstance(given, Mapping) else {"train": given}
        rows = {name: list(itertools.islice(sets[name], MAX_RECORDS + 1)) for name in sets}
    except DataError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise DataError(f"{where} raised {type(error).__name__}: {error}") from error
    if "train" not in rows or not rows.keys() <= {"train", "held_out"}:
        raise DataError(f"{where} gave sets named {sorted(map(str, rows))}; name them 'train' and 'held_out'")
    for name, found in rows.items():
        if not 0 < len(found) <= MAX_RECORDS:
            amount = "no records" if not found else f"more than {MAX_RECORDS:,} records"
            raise DataError(f"{where} gave {amount} of the set {name!r}; give at least 1, and come to an end")
    records = {
        name: [parse_record(row, f"{where}, {name} record {place}", fields) for place, row in enumerate(found)]
        for name, found in rows.items()
    }
    return records["train"], records.get("held_out")
