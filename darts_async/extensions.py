"""Extensions of the user: the table of kinds, and how a name becomes something to call.

A setting has `module:name` of the user's, or a short name of this package. An import runs code of the user. So it is
done in the process that calls it and, before a run, in a child, and only these look for modules in the current
directory.

    reward.function     response -> number                 in each reward worker
    reward.functions    response(s) -> number(s)           in each reward worker
    prompts.source      () -> records                      in the shaper
    shaping.rule        settings -> a `ShapingRule`        in the shaper
    learner.loss.kind   `LossInputs` -> (loss, metrics)    in each rank of the learner
    telemetry.sinks     settings -> a `Sink`               in a follower of its own
    generator.engine    config -> an `Engine`              in each generator

Everything is called with arguments by name, so that one may be added. `EXTENDING.md` has an example of each.
"""

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Final

from darts_async.errors import ExtensionError

Extension = Callable[..., Any]
HUB: Final = "hub"
"""The source that reads data sets of the Hugging Face hub."""
TASKS: Final = "reasoning_gym"
"""The source that makes tasks, and the reward function that scores them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of extension.

    Example:
        >>> REWARD.checked("exact_match"), REWARD.checked("my_task:reward")
        ('exact_match', 'my_task:reward')
        >>> LOSS.checked("grppo")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: learner.loss.kind is 'grppo'; use one of 'dapo', ..., or module:name; did you mean 'grpo'?
    """

    setting: str
    arguments: tuple[str, ...]
    """The names of the arguments that it is called with."""
    built_in: Mapping[str, str] = field(default_factory=dict)
    """The short names, and `module:name` of each; empty if a stage makes it by itself."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Short names of earlier versions, and what to write instead."""
    may_be_async: bool = False
    """Whether it may be a coroutine function."""
    needs_extra: bool = False
    """Whether each short name needs the extra of the same name."""

    def checked(self, name: str) -> str:
        """`name`, without an import. Raises `ValueError` if it is neither a short name nor of the form
        `module:name`."""
        if name in self.renamed:
            raise ValueError(f"{self.setting} {name!r} is now called {self.renamed[name]!r}; write that")
        module, _, attribute = name.partition(":")
        if name not in self.built_in and not (module and attribute):
            known = {short: short for short in self.built_in} | dict(self.renamed)
            choices = f"one of {', '.join(map(repr, self.built_in))}, or " if self.built_in else ""
            raise ValueError(f"{self.setting} is {name!r}; use {choices}module:name" + _suggestion(name, known))
        return name

    def names_in(self, config: object) -> tuple[str, ...]:
        """The names that the setting has in a `RunConfig`."""
        found: Any = config
        for part in self.setting.split("."):
            found = getattr(found, part)
        every = found if isinstance(found, tuple) else (found,)
        names = (getattr(each, "function", each) for each in every)
        return tuple(name for name in names if name is not None)

    def is_of_user(self, name: str) -> bool:
        """Whether loading it runs code that did not come with this package."""
        return name not in self.built_in and not name.startswith("darts_async.")


REWARD: Final = Kind(
    "reward.function",
    ("prompt", "response", "answer", "metadata", "finish_reason"),
    {
        "exact_match": "darts_async.reward.builtin:exact_match",
        "math": "darts_async.reward.mathematics:math",
        TASKS: "darts_async.reward.task_families:score",
    },
    renamed={"chain": "darts_async.quickstart.task:reward"},
    may_be_async=True,
)
REWARDS: Final = {
    "sample": replace(REWARD, setting="reward.functions"),
    "batch": Kind(
        "reward.functions", ("prompts", "responses", "answers", "metadata", "finish_reasons"), may_be_async=True
    ),
}
"""One of several reward functions, by what it takes."""
PROMPTS: Final = Kind(
    "prompts.source",
    ("num_train", "held_out", "seed"),
    dict.fromkeys(("jsonl", "parquet", HUB, TASKS), ""),
    renamed={"chain": "darts_async.quickstart.task:prompts"},
)
RULE: Final = Kind(
    "shaping.rule",
    ("config",),
    dict.fromkeys(("none", "random", "shortest", "longest", "dual_end", "survivor", "qlpo"), ""),
)
LOSS: Final = Kind(
    "learner.loss.kind",
    ("inputs",),
    {name: "darts_async.learner.losses.kinds:clipped" for name in ("dapo", "grpo", "dr_grpo")}
    | {name: f"darts_async.learner.losses.kinds:{name}" for name in ("gspo", "cispo", "decoupled_ppo", "reinforce")},
)
SINK: Final = Kind(
    "telemetry.sinks",
    ("run_dir", "config", "memory"),
    {
        "wandb": "launcher.sinks.wandb_sink:WandbSink",
        "tensorboard": "launcher.sinks.tensorboard_sink:TensorBoardSink",
        "trackio": "launcher.sinks.trackio_sink:TrackioSink",
        "mlflow": "launcher.sinks.mlflow_sink:MlflowSink",
    },
    needs_extra=True,
)
ENGINE: Final = Kind(
    "generator.engine",
    ("config",),
    {
        "embedded": "darts_async.generator.embedded.engine:make_engine",
        "vllm": "darts_async.generator.vllm.engine:make_engine",
        "scripted": "darts_async.generator.scripted:make_engine",
    },
)
KINDS: Final = {kind.setting: kind for kind in (REWARD, REWARDS["sample"], PROMPTS, RULE, LOSS, SINK, ENGINE)}


def load(kind: Kind, name: str) -> Extension:
    """What a name of this kind leads to. For a module of the user the current directory becomes first on the path.

    Raises:
        ExtensionError: no such module or attribute, its import fails, or it cannot be called with the arguments.

    Example:
        >>> load(REWARD, "exact_match")(prompt="", response="4", answer="4", metadata={}, finish_reason="stop")
        1.0
    """
    try:
        module_name, _, attribute = kind.built_in.get(kind.checked(name), name).partition(":")
    except ValueError as error:
        raise ExtensionError(str(error)) from error
    where = f"{kind.setting} is {name!r}"
    extra = name if kind.needs_extra and name in kind.built_in else None
    module = _import(module_name, where, of_user=kind.is_of_user(name), extra=extra)
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ExtensionError(
            f"{where}, but {module.__name__!r} ({module.__file__}) has no {attribute!r}"
            + _suggestion(attribute, {key: key for key in public})
        )
    found = getattr(module, attribute)
    if not callable(found):
        raise ExtensionError(f"{where}, which is a {type(found).__name__} and cannot be called")
    _check_signature(
        found, where, f"it is called as {attribute}({', '.join(f'{key}=' for key in kind.arguments)})", kind
    )
    return found  # type: ignore[no-any-return]


def _import(module_name: str, where: str, *, of_user: bool, extra: str | None) -> ModuleType:
    if of_user and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the import of a user's module may raise anything, even call `sys.exit`
        raise ExtensionError(f"{where}, but {_import_complaint(module_name, error, extra)}") from error


def _import_complaint(module_name: str, error: BaseException, extra: str | None) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and extra is not None:
        return f"the package {missing!r} is not installed: pip install 'darts-async[{extra}]'"
    if missing is not None and (module_name == missing or module_name.startswith(f"{missing}.")):
        return (
            f"there is no module {missing!r}; looked in the current directory ({os.getcwd()}) and in what is installed "
            f"for {sys.executable}: put {missing.partition('.')[0]}.py in the directory, or install it"
        )
    return f"importing {module_name!r} raised {type(error).__name__}: {error}"


def is_coroutine_function(found: Extension) -> bool:
    """Whether what it returns has to be awaited."""
    return inspect.iscoroutinefunction(_called(found))


def _called(found: Extension) -> Extension:
    """The function that is executed when it is called."""
    while isinstance(found, functools.partial):
        found = found.func
    return found if inspect.isroutine(found) else type(found).__call__


def _check_signature(found: Extension, where: str, expected: str, kind: Kind) -> None:
    called = _called(found)
    if (inspect.iscoroutinefunction(called) and not kind.may_be_async) or inspect.isasyncgenfunction(called):
        raise ExtensionError(f"{where}, which is a coroutine function, and none can be awaited; {expected}")
    if kind is not PROMPTS and inspect.isgeneratorfunction(called):
        raise ExtensionError(f"{where}, which is a generator function: it must return its result; {expected}")
    try:
        signature = inspect.signature(found)
    except ValueError:  # written in C, without a signature: the first call will show it
        return
    try:
        signature.bind(**dict.fromkeys(kind.arguments))
    except TypeError as error:
        raise ExtensionError(f"{where}, which takes {signature}: {error}; {expected}") from error


def _suggestion(name: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {known[near[0]]!r}?" if near else ""
