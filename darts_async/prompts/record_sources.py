"""Where the records of a run come from: files, tasks that are made, or a source of the user's that is called."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from darts_async.config.paths import expanded
from darts_async.errors import DataError
from darts_async.extensions import PROMPTS, TASKS, load
from darts_async.prompts.files import FileFormat
from darts_async.prompts.records import Fields, Record, parse_record, read_records
from darts_async.prompts.task_families import make_tasks

if TYPE_CHECKING:
    from darts_async.config import PromptsConfig

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
        """`prompts.num_train` (None if it is not set), `prompts.held_out` and the seed of the run are handed over. The
        same ones give the same records: a shaper that is started again asks again."""


_OF_TASKS = Fields("prompt", "answer")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the records, which is drawn in proportion to its weight."""

    name: str
    """Empty, if it is the only one and has none."""
    weight: float
    train: list[Record]
    held_out: list[Record] | None
    """A separate set; None: `num_held_out` of `train` are held out."""
    num_train: int | None
    """Most training prompts to take; None: all."""
    num_held_out: int


def read_parts(config: "PromptsConfig", seed: int) -> list[Part]:
    """The records of a run, in parts that are drawn in proportion to their weights: mostly one.

    Raises:
        DataError: a file, a source or a record cannot be used.
        ExtensionError: the source cannot be loaded.
    """
    if config.source == TASKS:
        return _parts_of_families(config, seed)
    train, held_out = _read(config, seed)
    return [Part("", 1.0, train, held_out, config.num_train, config.held_out)]


def _parts_of_families(config: "PromptsConfig", seed: int) -> list[Part]:
    made = make_tasks(config.families, num_train=config.num_train, held_out=config.held_out, seed=seed)
    parts = []
    for place, tasks in enumerate(made):
        name = tasks.family.name
        train, held_out = (
            [parse_record(row, f"{name}, task {number}", _OF_TASKS) for number, row in enumerate(rows)]
            for rows in (tasks.train, tasks.held_out)
        )
        part = name if [family.name for family in config.families].count(name) == 1 else f"{name}.{place}"
        parts.append(Part(part, tasks.family.weight, train, held_out, None, len(held_out)))
    return parts


def _read(config: "PromptsConfig", seed: int) -> tuple[list[Record], list[Record] | None]:
    """Training records, and the held-out records if they are a separate set."""
    pattern = None if config.answer_pattern is None else re.compile(config.answer_pattern)
    fields = Fields(config.prompt_field, config.answer_field, pattern, config.metadata_fields)
    if config.source not in PROMPTS.built_in:
        return _ask(config, seed, fields)
    assert config.path is not None, "the configuration requires it"
    file_format: FileFormat = "parquet" if config.source == "parquet" else "jsonl"
    records = read_records(expanded(config.path, "prompts.path"), file_format, fields)
    if config.held_out_path is None:
        return records, None
    held_out_path = expanded(config.held_out_path, "prompts.held_out_path")
    return records, read_records(held_out_path, file_format, fields)


def _ask(config: "PromptsConfig", seed: int, fields: Fields) -> tuple[list[Record], list[Record] | None]:
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
