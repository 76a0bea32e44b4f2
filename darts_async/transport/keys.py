"""The CURVE keys of a run: each process has a private file, and all processes know all public keys.

    DIRECTORY/public_keys.json         {name: public key}                 mode 0600
    DIRECTORY/NAME.json                {"public_key", "secret_key"}       mode 0600, NAME percent-encoded

The directory has mode 0700. Each life of a run has new keys.
"""

import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import quote

import msgspec
import zmq

from darts_async.errors import TransportError

Key = Annotated[str, msgspec.Meta(min_length=40, max_length=40)]
"""32 bytes in Z85."""

_T = TypeVar("_T")

PUBLIC_KEYS_FILE = "public_keys.json"


class _KeyPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    public_key: Key
    secret_key: Key


@dataclass(frozen=True)
class RunKeys:
    """The keys that one process knows."""

    name: str
    public_key: str
    secret_key: str = field(repr=False)
    public_keys: dict[str, str] = field(repr=False)

    def public_of(self, name: str) -> str:
        """The public key of the process `name` of this run. Raises `TransportError` for an unknown one."""
        try:
            return self.public_keys[name]
        except KeyError:
            raise TransportError(f"no key was made for {name!r}; the run has {sorted(self.public_keys)}") from None


def create_run_keys(directory: Path, names: Iterable[str]) -> None:
    """Write new keys for all processes of a run into a new directory. One that has keys is refused."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(directory)
    public_keys: dict[str, str] = {}
    for name in names:
        public_key, secret_key = (key.decode() for key in zmq.curve_keypair())
        public_keys[name] = public_key
        _write_private(_private_path(directory, name), msgspec.json.encode(_KeyPair(public_key, secret_key)))
    _write_private(directory / PUBLIC_KEYS_FILE, msgspec.json.encode(public_keys))


def renew_run_keys(directory: Path, names: Iterable[str]) -> None:
    """Replace the keys of an earlier life of the run, which may have had other processes."""
    if directory.exists():
        shutil.rmtree(directory)
    create_run_keys(directory, names)


def load_keys(directory: Path, name: str) -> RunKeys:
    """The keys of process `name`. Raises `TransportError` for missing, malformed or readable-by-others files."""
    _check_private(directory)
    pair = _read_private(_private_path(directory, name), _KeyPair)
    public_keys = _read_private(directory / PUBLIC_KEYS_FILE, dict[str, Key])
    if public_keys.get(name) != pair.public_key:
        raise TransportError(f"the keys of {name!r} in {directory} are not of the run in {PUBLIC_KEYS_FILE}")
    return RunKeys(name, pair.public_key, pair.secret_key, public_keys)


def _private_path(directory: Path, name: str) -> Path:
    return directory / f"{quote(name, safe='')}.json"


def _write_private(path: Path, data: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise TransportError(
            f"{path} exists: keys are created once per life of a run, in their own directory"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _read_private(path: Path, kind: type[_T]) -> _T:
    _check_private(path)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise TransportError(f"cannot read keys from {path}: {error}") from error


def _check_private(path: Path) -> None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise TransportError(f"no keys at {path}: {error.strerror}") from error
    if mode & 0o077:
        raise TransportError(f"{path} has mode {mode:04o}; keys must be private: chmod {mode & 0o700:04o} {path}")
