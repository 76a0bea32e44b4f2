"""A program that inspects a node: it runs there over ssh before a run starts, and prints one line of JSON.

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
    shared_file: str
    shared_text: str
    """The content of the shared file, if the node sees the same `runs_dir`."""
    host: str
    ports: tuple[int, ...] = ()
    """Ports at which processes will listen there."""
    paths: dict[str, str] = {}
    """Paths that must exist, by the setting that names them."""
    modules: dict[str, str] = {}
    """Modules that must be importable, by the setting that names them."""


class Answer(msgspec.Struct, frozen=True):
    python: str
    versions: dict[str, str]
    sees_shared_file: bool
    gpus: list[int]
    unbound: dict[int, str]
    """Why a process cannot listen at a port; port 0 means the host itself."""
    missing_paths: list[str]
    missing_modules: list[str]
    limits: Limits | None = None
    """None from another version of this program, which is reported for its version."""


def versions_here() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answer(question: Question) -> Answer:
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
        return False  # a variable that is only set where the run is started


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
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    sys.stdout.write(msgspec.json.encode(answer(question)).decode() + "\n")


if __name__ == "__main__":
    main()
