"""Finds the directory of a model and loads its tokenizer, without torch or transformers.

Every process resolves the setting with the same function, so that all processes use the same directory.
"""

import importlib.util
import re
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from darts_async.config.paths import expanded
from darts_async.errors import ModelError
from darts_async.machine.hub_cache import FetchError, fetched

TOKENIZER_FILE = "tokenizer.json"

_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHT_FILES = ("*.safetensors",)
_IN_A_PACKAGE = re.compile(r"([A-Za-z_][\w.]*):([\w./-]+)")


def resolve_model_path(path: str, *, with_weights: bool = True, setting: str = "model.path") -> Path:
    """The local directory of a model.

    Args:
        path: a directory in Hugging Face format, `package:directory` for one in an installed package, or a hub id.
        with_weights: whether to fetch the weights of a hub id too, and not only configuration and tokenizer.

    Raises:
        ConfigError: a variable in the path is not set.
        ModelError: there is no such directory, and the hub has no such model.
    """
    if (local := local_directory(path, setting)) is not None:
        return local
    directory = expanded(path, setting)
    if path.startswith(("/", ".", "~", "$")) or path.count("/") > 1:
        raise ModelError(f"{setting} is {path!r}, but there is no directory {directory.absolute()}")
    return _fetch(path, setting, _TEXT_FILES + _WEIGHT_FILES if with_weights else _TEXT_FILES)


def local_directory(path: str, setting: str) -> Path | None:
    """The directory that a path names on this machine; None for a hub id, and if there is no such directory. Raises
    `ConfigError` if a variable in the path is not set, `ModelError` if a package or its directory is missing."""
    directory = expanded(path, setting)
    if directory.is_dir():
        return directory
    match = _IN_A_PACKAGE.fullmatch(path)
    if match is None:
        return None
    found = _in_package(match[1], match[2], f"{setting} is {path!r}", "directory")
    if not found.is_dir():
        raise ModelError(
            f"{setting} is {path!r}, but there is no directory {found}; reinstall the package, or correct the name"
        )
    return found


def file_in_package(path: str, setting: str) -> Path | None:
    """The file that `package:file` names in an installed package, which need not exist; None for any other text.

    Raises:
        ModelError: there is no such package.
    """
    match = _IN_A_PACKAGE.fullmatch(path)
    return None if match is None else _in_package(match[1], match[2], f"{setting} is {path!r}", "file")


def _in_package(package: str, name: str, where: str, kind: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{where}, but no package {package!r} is installed; write package:{kind}, or a path")
    return Path(next(iter(spec.submodule_search_locations))) / name


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """The tokenizer of a model directory, with padding and truncation switched off. Raises `ModelError` if the file is
    missing or cannot be read."""
    file = model_dir / TOKENIZER_FILE
    if not file.is_file():
        raise ModelError(
            f"{model_dir} has no {TOKENIZER_FILE}, the fast tokenizer; write one with "
            f"transformers.AutoTokenizer.from_pretrained(...).save_pretrained({str(model_dir)!r})"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the base class itself
        raise ModelError(f"{file} is not a tokenizer that this version of `tokenizers` can read: {error}") from error
    # A file keeps the settings with which it was saved: it could silently truncate long prompts.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def stop_token_ids(model_dir: Path) -> frozenset[int]:
    """The end-of-sequence tokens of a model, as its `generation_config.json` or else its `config.json` names them,
    there for its text part or at the top; empty if neither does. Raises `ModelError` if a file cannot be read."""
    for name in ("generation_config.json", "config.json"):
        for part in _parts(model_dir / name):
            if (ids := part.eos_token_id) is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def known_stop_token_ids(model_dir: Path) -> tuple[int, ...]:
    """The same, ascending. Raises `ModelError` also if there are none."""
    if found := stop_token_ids(model_dir):
        return tuple(sorted(found))
    raise ModelError(f"{str(model_dir)!r} names no eos_token_id in its generation_config.json or config.json")


def vocab_size(model_dir: Path) -> int | None:
    """The size of a model's vocabulary as its `config.json` names it, for its text part or at the top; None if it does
    not. Raises `ModelError` if the file cannot be read."""
    return next((part.vocab_size for part in _parts(model_dir / "config.json") if part.vocab_size), None)


class _Part(msgspec.Struct):
    """What is read of a configuration file, and of its part about text."""

    vocab_size: int | None = None
    eos_token_id: int | list[int] | None = None
    text_config: "_Part | None" = None


def _parts(file: Path) -> list[_Part]:
    """The part about text, if there is one, and the whole; nothing if there is no such file."""
    if not file.is_file():
        return []
    try:
        whole = msgspec.json.decode(file.read_bytes(), type=_Part)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    return [whole] if whole.text_config is None else [whole.text_config, whole]


def _fetch(hub_id: str, setting: str, patterns: tuple[str, ...]) -> Path:
    try:
        return fetched(hub_id, patterns)
    except FetchError as error:
        raise ModelError(
            f"{setting} is {hub_id!r}: it is not a local directory (looked in {Path.cwd()}), and could not be loaded "
            f"from the hub: {error}. Give a directory, or download it on a machine with a network and copy the cache"
        ) from error
