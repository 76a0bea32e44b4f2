"""Reads the rows of a data set file, each with its place for messages. Only the requested columns of a parquet file are
read. In a line of JSON only the requested fields must be readable (see `json_lines`); NaN is accepted as a number."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from darts_async.config.paths import is_file, missing_file
from darts_async.errors import DataError
from darts_async.prompts.json_lines import decode_line

FileFormat = Literal["jsonl", "parquet"]
Row = tuple[str, Any]
"""(place, value)"""

_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_rows(path: Path, file_format: FileFormat, fields: tuple[str, ...] | None = None) -> Iterator[Row]:
    """The rows of a file, in its order.

    Args:
        fields: the used fields, including dotted names; None: all.

    Raises:
        DataError: the file does not exist, or cannot be read.
    """
    if not is_file(path):
        raise DataError(f"{missing_file(path)}; check prompts.path and prompts.held_out_path")
    return _jsonl_rows(path, fields) if file_format == "jsonl" else _parquet_rows(path, fields)


def _jsonl_rows(path: Path, fields: tuple[str, ...] | None) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}, line {number}"
                if number == 1:
                    line = _without_mark(line, place)
                if line.strip():
                    yield place, decode_line(line, place, fields)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _without_mark(line: bytes, place: str) -> bytes:
    """The first line without the byte order mark that some editors write."""
    if line.startswith(_WIDE):
        raise DataError(f"{place}: the file is UTF-16 or UTF-32; save it as UTF-8: iconv -t UTF-8")
    return line.removeprefix(codecs.BOM_UTF8)


def _parquet_rows(path: Path, fields: tuple[str, ...] | None) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a parquet file; reading it needs the extra `data`: pip install 'darts-async[data]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = _columns(file.schema_arrow.names, fields)
            for batch in file.iter_batches(columns=names):
                columns = {name: _column_values(path, batch, name, number) for name in names}
                for index in range(batch.num_rows):
                    yield f"{path}, row {number}", {name: values[index] for name, values in columns.items()}
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet (at row {number}): {error}") from error


def _columns(names: list[str], fields: tuple[str, ...] | None) -> list[str]:
    """The columns that hold the fields. A missing column is reported at the first row, with all names."""
    if fields is None:
        return names
    wanted = {name if name in names else name.split(".")[0] for name in fields}
    found = [name for name in names if name in wanted]
    return found if len(found) == len(wanted) else names


def _column_values(path: Path, batch: Any, name: str, first_row: int) -> list[Any]:
    import pyarrow

    try:
        values: list[Any] = batch.column(name).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path}: column {name!r} cannot be read (from row {first_row} on): {error}; if the reward does not need "
            "it, list the needed fields in prompts.metadata_fields"
        ) from error
    return values
