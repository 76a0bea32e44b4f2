"""Finds the files of a data set of the Hugging Face hub: on the hub, in its local cache, or in a copy of it.

The head of a data set's README names subsets, splits and their files:

    configs:
    - config_name: main
      data_files:
      - {split: train, path: main/train-*}

Without that the names of the files tell (`data/train-00000-of-00002.parquet`, `main/test/0000.parquet`). Files are read
as they are (parquet, JSON lines): no code of a data set runs, and nothing is converted or copied. What has only other
files mostly has a branch `refs/convert/parquet`, which the hub makes by itself.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from darts_async.config.paths import expanded
from darts_async.errors import DataError
from darts_async.extensions import HUB
from darts_async.machine.hub_cache import FetchError, fetched
from darts_async.prompts.files import FileFormat

if TYPE_CHECKING:
    from darts_async.config import RunConfig
    from darts_async.config.prompts import RecordsConfig

DEFAULT_SPLIT = "train"
CONVERTED = "refs/convert/parquet"
_README = "README.md"
_HEAD = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_Records = TypeVar("_Records", bound="RecordsConfig")
_FORMATS: dict[str, FileFormat] = {".parquet": "parquet", ".jsonl": "jsonl"}


class UnreachableError(DataError):
    """The data set is not on this machine, and the hub did not give it."""


@dataclass(frozen=True, slots=True)
class SplitFiles:
    """The files of one split, in order."""

    files: tuple[Path, ...]
    file_format: FileFormat


@dataclass(frozen=True, slots=True)
class _Subset:
    """What the README says of a subset: {split: patterns of its files}."""

    name: str
    splits: dict[str, list[str]]
    is_default: bool


def find_split(path: str, *, subset: str | None, split: str, revision: str | None) -> SplitFiles:
    """The files of one split of a data set, which are fetched if they are not on this machine.

    Args:
        path: id on the hub, or a local directory with a copy.
        subset: which subset; None if there is only one, or one is the default.
        revision: branch, tag or commit; None: the newest.

    Raises:
        ConfigError: a variable in the path is not set.
        UnreachableError: the hub does not give it.
        DataError: it has no such subset or split, or no files that can be read.
    """
    local = expanded(path, "path")
    where = f"the data set {path!r}"
    is_local = local.is_dir()
    if is_local and revision is not None:
        raise DataError(f"prompts.revision is {revision!r}, but {where} is a local directory; leave the revision out")
    root = local if is_local else _fetch(path, revision, [_README])
    subsets = _subsets_of(root / _README)
    if subsets:
        patterns = _named(subsets, subset, split, where)
        found = _matching(root if is_local else _fetch(path, revision, patterns), patterns)
    else:
        patterns = [f"*{split}*"]
        found = _inferred(root if is_local else _fetch(path, revision, patterns), subset, split, where)
    formats = {_FORMATS[file.suffix] for file in found if file.suffix in _FORMATS}
    if len(formats) != 1 or any(file.suffix not in _FORMATS for file in found):
        names = sorted({file.suffix for file in found})
        raise DataError(
            f"{where} has no files of the split {split!r} that can be read: found {names or 'none'}, and one of "
            f"{sorted(_FORMATS)} is needed; try prompts.revision: {CONVERTED}, where the hub keeps most data sets"
        )
    return SplitFiles(tuple(found), formats.pop())


def with_commits(config: "RunConfig") -> "RunConfig":
    """The settings of a run with the commit of each of its data sets as `revision`, so that a process that is started
    again, or a run that is resumed, reads the same records when the hub has newer ones.

    Raises:
        ConfigError: a variable in a path is not set.
        UnreachableError: the hub does not give a data set.
    """
    prompts, evaluation = _with_commit(config.prompts), config.evaluation
    mixture = tuple(_with_commit(part) for part in prompts.mixture)
    sets = tuple(_with_commit(each) for each in evaluation.sets)
    return config.model_copy(
        update={
            "prompts": prompts.model_copy(update={"mixture": mixture}),
            "evaluation": evaluation.model_copy(update={"sets": sets}),
        }
    )


def _with_commit(section: _Records) -> _Records:
    path, revision = section.path, section.revision
    if section.source != HUB or path is None or expanded(path, "path").is_dir() or _COMMIT.fullmatch(revision or ""):
        return section
    return section.model_copy(update={"revision": _fetch(path, revision, [_README]).name})


def _named(subsets: Sequence[_Subset], subset: str | None, split: str, where: str) -> list[str]:
    names = [each.name for each in subsets]
    if subset is None:
        chosen = next((each for each in subsets if each.is_default or len(subsets) == 1), None)
        if chosen is None:
            raise DataError(f"{where} has the subsets {', '.join(names)}; name one in prompts.subset")
    elif subset not in names:
        raise DataError(f"{where} has no subset {subset!r}; it has {', '.join(names)}{_near(subset, names)}")
    else:
        chosen = subsets[names.index(subset)]
    if split not in chosen.splits:
        known = list(chosen.splits)
        raise DataError(f"{where} has no split {split!r}; it has {', '.join(known)}{_near(split, known)}")
    return chosen.splits[split]


def _matching(root: Path, patterns: Iterable[str]) -> list[Path]:
    return [file for file in _files_in(root) if any(fnmatch.fnmatch(_within(root, file), each) for each in patterns)]


def _inferred(root: Path, subset: str | None, split: str, where: str) -> list[Path]:
    """The files whose names have the split in them, all of one subset, which is a directory."""
    readable = [file for file in _files_in(root) if file.suffix in _FORMATS]
    found = [file for file in readable if split in re.split(r"[^A-Za-z0-9]+", _within(root, file))]
    if subset is not None:
        found = [file for file in found if subset in PurePosixPath(_within(root, file)).parts[:-1]]
    if readable and not found:
        names = ", ".join(_within(root, file) for file in readable[:5])
        of = "" if subset is None else f" of the subset {subset!r}"
        raise DataError(f"{where} has no files of the split {split!r}{of}; there are {names}")
    tops = sorted({PurePosixPath(_within(root, file)).parts[0] for file in found if file.parent != root})
    if subset is None and len(tops) > 1:
        raise DataError(f"{where} has the subsets {', '.join(tops)}; name one in prompts.subset")
    return found


def _files_in(root: Path) -> list[Path]:
    return sorted(
        file
        for file in root.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )


def _within(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _subsets_of(readme: Path) -> list[_Subset]:
    """Empty if the README says nothing of them."""
    if not readme.is_file():
        return []
    try:
        match = _HEAD.match(readme.read_text("utf-8"))
        described = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"the head of {readme} cannot be read: {error}") from error
    configs = described.get("configs") if isinstance(described, dict) else None
    found = [_subset_of(each) for each in configs or () if isinstance(each, dict) and each.get("data_files")]
    return [each for each in found if each.splits]


def _subset_of(described: dict[str, Any]) -> _Subset:
    name, files = str(described.get("config_name", "default")), described["data_files"]
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    if isinstance(files, str) or all(isinstance(each, str) for each in files):
        files = [{"split": DEFAULT_SPLIT, "path": files}]
    splits: dict[str, list[str]] = {}
    for each in files:
        if isinstance(each, dict) and "path" in each:
            paths = [each["path"]] if isinstance(each["path"], str) else each["path"]
            inside = str(described.get("data_dir") or "").strip("/")
            splits.setdefault(str(each.get("split", DEFAULT_SPLIT)), []).extend(
                f"{inside}/{path}" if inside else str(path) for path in paths
            )
    return _Subset(name, splits, is_default=bool(described.get("default")) or name == "default")


def _fetch(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return fetched(hub_id, patterns, revision=revision, is_dataset=True)
    except FetchError as error:
        at = "" if revision is None else f" (revision {revision!r})"
        raise UnreachableError(
            f"the data set {hub_id!r}{at} is not a local directory (looked in {Path.cwd()}), and could not be fetched "
            f"from the hub: {error}. Correct its name, give a directory, or copy the cache of a machine that has it"
        ) from error
