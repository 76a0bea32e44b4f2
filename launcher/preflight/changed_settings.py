"""Which settings in `config.yaml` may change between two lives of a run.

The shaper's journal and the learner's checkpoints follow from the settings: with other settings, a resumed run would
train on groups that neither file describes. Machines, speed, length and telemetry of a run may change, and so may the
place of a judge and how often it is asked.

Each life keeps a copy of its settings beside `config.yaml`. If the copy is lost, nothing is compared.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from darts_async.config import RunConfig
from darts_async.topology.run_files import BEGUN_FILE
from launcher.config_file import load_config
from launcher.problems import InputError, Problem, shown

FIXED = (
    *("seed", "model", "prompts", "sampling", "shaping", "staleness", "evaluation"),
    *("reward.function", "reward.functions", "learner.groups_per_step", "learner.lora"),
)
"""Settings, or sections of them, that a run keeps from its first step to its last."""

_FREE_OF_JUDGES = frozenset(
    {"url", "api_key_env", "requests_per_minute", "request_s", "total_s", "max_attempts", "cache_size"}
)
"""Settings of a judge that say where and how often it is asked, and not what or with what result."""


class Change(NamedTuple):
    """A setting that differs from that of the previous life."""

    place: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.place}: {shown(self.was)} -> {shown(self.now)}"


def changed(before: RunConfig, now: RunConfig, num_steps: int) -> tuple[Problem, ...]:
    """The changes with which a run of `num_steps` completed steps cannot be resumed."""
    old, new = _bound(before), _bound(now)
    found = [
        Problem(
            place,
            f"is {shown(was)} in the run so far, and its journal and checkpoints depend on it",
            shown(value),
            f"write {shown(was)} again to resume this run, or start another run with the new value",
        )
        for path in FIXED
        for place, was, value in _differences(path, _at(old, path), _at(new, path))
    ]
    if now.learner.steps < num_steps:
        fix = f"give {num_steps} or more"
        found.append(Problem("learner.steps", f"{num_steps} steps are completed", str(now.learner.steps), fix))
    return tuple(found)


def refuse_changes(run_dir: Path, file: Path, now: RunConfig, num_steps: int) -> tuple[Change, ...]:
    """The changes since the previous life. Raises `InputError` if `file`, the settings of a run to resume, has a
    forbidden one."""
    try:
        before = load_config(run_dir / BEGUN_FILE)
    except InputError:  # lost, or written by another version
        before = now
    if problems := changed(before, now, num_steps):
        raise InputError(file, problems)
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    return tuple(Change(*found) for key in old for found in _differences(key, old[key], new[key]))


def _bound(config: RunConfig) -> dict[str, Any]:
    """All settings but those of judges that may change."""
    settings = config.model_dump(mode="json")
    for part in _at(settings, "reward.functions"):
        if part["judge"] is not None:
            part["judge"] = {name: value for name, value in part["judge"].items() if name not in _FREE_OF_JUDGES}
    return settings


def _at(settings: Mapping[str, Any], path: str) -> Any:
    return functools.reduce(lambda value, key: value[key], path.split("."), settings)


def _differences(place: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from _differences(f"{place}.{key}", old[key], new[key])
    elif old != new:
        yield place, old, new
