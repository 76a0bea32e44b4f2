"""Checks the models of a run that are on this machine.

The headers of the files are checked here. Checks that need torch run in a child process (see `model_trial`), in
parallel to the other checks.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import msgspec

import darts_async
from darts_async.config import RunConfig
from darts_async.errors import ConfigError, ModelError
from darts_async.machine.trial_process import TrialError, TrialProcess, trial_process
from darts_async.models.location import local_directory
from darts_async.models.weight_files import check_weight_files
from launcher.preflight.model_trial import Question
from launcher.problems import Problem, shown

_PACKAGE_DIR = Path(darts_async.__file__).parent
_DEADLINE_S = 120.0
"""Time limit of the child, which imports torch, on a busy machine."""


def local_models(config: RunConfig) -> dict[str, Path]:
    """Directories of the local models, by the setting that names them."""
    found: dict[str, Path] = {}
    named = {"model.path": config.model.path, "learner.loss.reference_path": config.learner.loss.reference_path}
    for setting, path in named.items():
        with contextlib.suppress(ConfigError, ModelError):  # of which another check tells
            if path is not None and (directory := local_directory(path, setting)) is not None:
                found[setting] = directory
    return found


def check_files(models: dict[str, Path]) -> Iterator[Problem]:
    """Each model has complete weight files."""
    for setting, directory in models.items():
        for fault in check_weight_files(directory):
            yield Problem(setting, f"{fault.file} {fault.message}", shown(str(directory)), fault.fix)


class ModelTrial:
    """A child process that checks models while other checks are made. Leaving the context ends it.

    A model that came with this package is not checked.
    """

    def __init__(self, config: RunConfig, models: dict[str, Path]) -> None:
        asked = {setting: str(path) for setting, path in models.items() if not path.is_relative_to(_PACKAGE_DIR)}
        self._question = Question(config.model_dump_json(), asked)
        self._child: TrialProcess | None = None
        self._at_the_end = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._question.directories:  # small copies of a model do not benefit from more threads
            child = trial_process("launcher.preflight.model_trial", self._question, OMP_NUM_THREADS="1")
            self._child = self._at_the_end.enter_context(child)
        return self

    def __exit__(self, *error: object) -> None:
        self._at_the_end.close()

    def problems(self) -> tuple[Problem, ...]:
        """What the child has found; blocks until it has ended."""
        if self._child is None:
            return ()
        try:
            return msgspec.json.decode(self._child.answer(_DEADLINE_S), type=tuple[Problem, ...])
        except TimeoutError:
            message, fix = (
                f"could not be checked within {_DEADLINE_S:.0f} s",
                "try again when this machine is less busy",
            )
            return (Problem("model.path", message, fix=fix, here=True),)
        except TrialError as error:
            return (Problem("model.path", f"the process that checks it ended {error}", here=True),)
