"""What a node has: asked for over ssh before anything is started, answered in one line of JSON.

launcher.preflight.node_inspection      the first line of the input is a `Question`
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import msgspec

from darts_async.config.engines import VLLM
from darts_async.config.paths import expanded
from darts_async.errors import ConfigError
from launcher.plan.devices import gpus_found
from launcher.plan.ports import why_not_bound
from launcher.preflight.system_limits import Limits, limits_here

PACKAGES = ("darts-async", "torch", "transformers", "pyzmq", "msgspec", *VLLM.packages)
"""What has to be the same on all nodes, where it is there at all."""


class Question(msgspec.Struct, frozen=True):
    """What is to be looked at on a node."""

    shared_file: str
    shared_text: str
    """The file holds this, if the node sees the same `runs_dir`."""
    host: str
    ports: tuple[int, ...] = ()
    """That a process is to listen at there."""
    paths: dict[str, str] = {}
    """That have to be there, by the setting that names them."""
    modules: dict[str, str] = {}
    """That have to be importable, by the setting that names them."""


class Answer(msgspec.Struct, frozen=True):
    """What there is."""

    python: str
    versions: dict[str, str]
    sees_shared_file: bool
    gpus: list[int]
    unbound: dict[int, str]
    """Why nothing can listen at a port; port 0 is the host alone."""
    missing_paths: list[str]
    missing_modules: list[str]
    limits: Limits | None = None
    """None of another version, which is named for its version."""


def versions_here() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answer(question: Question) -> Answer:
    """Look."""
    bound = {port: why_not_bound(question.host, port) for port in (0, *question.ports)}
    return Answer(
        python=platform.python_version(),
        versions=versions_here(),
        sees_shared_file=_holds(Path(question.shared_file), question.shared_text),
        gpus=sorted(gpus_found()),
        unbound={port: reason for port, reason in bound.items() if reason is not None},
        missing_paths=[setting for setting, path in question.paths.items() if not _exists(path, setting)],
        missing_modules=[setting for setting, module in question.modules.items() if not _is_importable(module)],
        limits=limits_here(),
    )


def _exists(path: str, setting: str) -> bool:
    try:
        return expanded(path, setting).exists()
    except ConfigError:
        return False  # a variable that is set where the run is started, and not here


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def _is_importable(module: str) -> bool:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def main() -> None:
    """Entry point."""
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    sys.stdout.write(msgspec.json.encode(answer(question)).decode() + "\n")


if __name__ == "__main__":
    main()
