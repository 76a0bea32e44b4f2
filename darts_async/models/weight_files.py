"""Checks that the weight files of a model directory are complete, from their headers and without torch.

A safetensors file has eight bytes with the length of the header, the header (JSON: type, shape and position of each
tensor), and the data. So the right size of a file is known without reading it.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE = "model.safetensors"
_OTHER_FORMATS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_POINTER = b"version https://git-lfs"
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4, "C64": 64}
_COPY_AGAIN = "copy or download it again"


class FileFault(NamedTuple):
    file: Path
    message: str
    fix: str


class TensorEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]
    """First byte and the one after the last, from the beginning of the data."""

    @property
    def num_bytes(self) -> int | None:
        """What the tensor takes; None if its type is unknown."""
        bits = _BITS.get(self.dtype)
        return None if bits is None else -(-math.prod(self.shape) * bits // 8)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _UnreadableError(ValueError):
    def __init__(self, message: str, fix: str = _COPY_AGAIN) -> None:
        super().__init__(message)
        self.fix = fix


def check_weight_files(directory: Path) -> Iterator[FileFault]:
    """Check that every weight file exists, is complete, and has the tensors of the index.

    Weights in other formats are not checked.
    """
    index, single = directory / INDEX_FILE, directory / WEIGHT_FILE
    if index.is_file():
        yield from _check_index(index)
    if single.is_file():  # where there are both, some programs read this one
        yield from _check_file(single, [])
    elif not any((directory / name).is_file() for name in (INDEX_FILE, *_OTHER_FORMATS)):
        fix = "copy them there, or save the model with save_pretrained"
        yield FileFault(directory, f"has no weights: neither {WEIGHT_FILE} nor {INDEX_FILE}", fix)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a file. Raises `ValueError` or `OSError` if it is not complete."""
    try:
        return _read(file)
    except _UnreadableError as error:
        raise ValueError(f"{file} {error}") from error


def _check_index(index: Path) -> Iterator[FileFault]:
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.MsgspecError) as error:
        yield FileFault(index, f"cannot be read: {error}", _COPY_AGAIN)
        return
    if not weight_map:
        yield FileFault(index, "names no weights", _COPY_AGAIN)
    for name in sorted(set(weight_map.values())):
        yield from _check_file(index.parent / name, [key for key, shard in weight_map.items() if shard == name])


def _check_file(file: Path, expected: list[str]) -> Iterator[FileFault]:
    if not file.is_file():
        message = f"is missing, though {INDEX_FILE} says that it holds {expected[0]} and {len(expected) - 1} more"
        yield FileFault(file, message, "copy or download it")
        return
    try:
        header = _read(file)
    except OSError as error:
        yield FileFault(file, f"cannot be read: {error}", _COPY_AGAIN)
        return
    except _UnreadableError as error:
        yield FileFault(file, str(error), error.fix)
        return
    absent = sorted(set(expected) - set(header))
    if absent:
        message = f"has no {absent[0]} ({len(absent)} missing), though {INDEX_FILE} says so"
        yield FileFault(file, message, "take index and weights from the same place")


def _read(file: Path) -> dict[str, TensorEntry]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if (start + opened.read(len(_POINTER) - 8)) == _POINTER:
            raise _UnreadableError("is a pointer of Git LFS and not the weights themselves", "run `git lfs pull` there")
        if size < 8 or length > _MOST_HEADER_BYTES:
            raise _UnreadableError(f"of {size} bytes does not begin as a safetensors file does")
        if 8 + length > size:
            raise _UnreadableError(f"has {size} bytes, but its header alone takes {8 + length}: it was cut off")
        opened.seek(8)
        header = _decode(opened.read(length))
    for name, entry in header.items():
        _check_entry(name, entry)
    _check_places(header)
    expected = 8 + length + max((entry.data_offsets[1] for entry in header.values()), default=0)
    if size != expected:
        what = "it was cut off" if size < expected else "something was appended to it"
        raise _UnreadableError(f"has {size} bytes, but its header describes {expected}: {what}")
    return header


def _decode(header: bytes) -> dict[str, TensorEntry]:
    try:
        parts = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        parts.pop("__metadata__", None)
        return {name: msgspec.json.decode(part, type=TensorEntry) for name, part in parts.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _UnreadableError(f"has a header that cannot be read: {error}") from error


def _check_entry(name: str, entry: TensorEntry) -> None:
    if entry.num_bytes is None:
        raise _UnreadableError(f"has {name} of a type {entry.dtype!r} that is unknown", "save it in another type")
    first, end = entry.data_offsets
    if min(entry.shape, default=0) < 0 or not 0 <= first <= end or end - first != entry.num_bytes:
        raise _UnreadableError(
            f"has {name} of shape {entry.shape} and type {entry.dtype} in {end - first} bytes; it takes "
            f"{entry.num_bytes}"
        )


def _check_places(header: dict[str, TensorEntry]) -> None:
    """Check that the tensors lie one after another: readers refuse gaps and overlaps."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        first, after = entry.data_offsets
        if first != end:
            raise _UnreadableError(f"has {name} at byte {first} of the data, but the tensor before it ends at {end}")
        end = after
