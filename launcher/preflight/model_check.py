"""Checks the models of a run that are on this machine.

The headers of the files are checked here. Checks that need torch run in a child process (see `model_trial`), in
parallel to the other checks.
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

import darts_async
from darts_async.config import RunConfig
from darts_async.errors import ConfigError, ModelError
from darts_async.machine.lifetime import PARENT_PID_VARIABLE
from darts_async.machine.spawn import module_command
from darts_async.models.location import local_directory
from darts_async.models.weight_files import check_weight_files
from launcher.preflight.model_trial import Finding, Question
from launcher.problems import Problem, shown

_PACKAGE_DIR = Path(darts_async.__file__).parent
_DEADLINE_S = 120.0
"""Time limit of the child, which imports torch, on a busy machine."""


def local_models(config: RunConfig) -> dict[str, Path]:
    """Directories of the local models, by the setting that names them."""
    found: dict[str, Path] = {}
    for setting in ("model.path", "learner.loss.reference_path"):
        path = _path(config, setting)
        with contextlib.suppress(ConfigError, ModelError):  # of which another check tells
            if path is not None and (directory := local_directory(path, setting)) is not None:
                found[setting] = directory
    return found


def check_files(models: dict[str, Path]) -> Iterator[Problem]:
    """Each model has complete weight files."""
    for setting, directory in models.items():
        for fault in check_weight_files(directory):
            yield Problem(setting, f"{fault.file} {fault.message}", shown(str(directory)), fault.fix)


def _path(config: RunConfig, setting: str) -> str | None:
    return config.model.path if setting == "model.path" else config.learner.loss.reference_path


class ModelTrial:
    """A child process that checks models. Leaving the context ends it.

    A model that came with this package is not checked.
    """

    def __init__(self, config: RunConfig, models: dict[str, Path]) -> None:
        asked = {setting: path for setting, path in models.items() if not path.is_relative_to(_PACKAGE_DIR)}
        self._models = asked
        self._question = Question(config.model_dump_json(), {setting: str(path) for setting, path in asked.items()})
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._models:
            command = module_command("launcher.preflight.model_trial")
            # Small copies of a model do not benefit from more threads.
            environment = os.environ | {"OMP_NUM_THREADS": "1", PARENT_PID_VARIABLE: str(os.getpid())}
            with tempfile.TemporaryFile() as question:  # a pipe may be full before the child reads it
                question.write(msgspec.json.encode(self._question))
                question.seek(0)
                self._child = subprocess.Popen(
                    command, stdin=question, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.communicate()

    def problems(self) -> Iterator[Problem]:
        """What the child has found; blocks until it has ended."""
        if self._child is None:
            return
        try:
            output, errors = self._child.communicate(timeout=_DEADLINE_S)
        except subprocess.TimeoutExpired:
            message = f"could not be checked within {_DEADLINE_S:.0f} s"
            yield Problem("model.path", message, fix="try again when this machine is less busy", here=True)
            return
        if self._child.returncode:
            last = (errors.decode(errors="replace").strip().splitlines() or ["it wrote nothing"])[-1]
            message = f"the process that checks it ended with exit code {self._child.returncode}: {last}"
            yield Problem("model.path", message, here=True)
            return
        for found in msgspec.json.decode(output, type=list[Finding]):
            value = shown(str(self._models[found.setting]))
            yield Problem(found.setting, found.message, value, found.fix, is_hint=found.is_hint)
