"""The interface of a sink: what takes the lines of `metrics.jsonl` to where people look at them.

A *follower* (see `follower`) is a process that makes one sink and gives it every line, in order. Lines are counted from
the beginning of the file. The number of lines that a sink has taken is kept in the run directory, so a follower that
was killed continues there. It may repeat the lines that came after the last `flush`. A sink whose service tells what it
has repeats none: it corrects `Memory.num_lines` when it is made.

Two rules of the file matter to each sink. The metrics of one step come in parts: weights are broadcast after the step
was taken. And steps come again after a restart of the learner or a resumed run: a later value of a metric replaces an
earlier one of the same step.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from darts_async.config import RunConfig

EVALUATION = "evaluation/"
"""What the names of an evaluation's metrics begin with, outside `metrics.jsonl`."""


@dataclass(slots=True)
class Memory:
    """What is known of a sink when it is made, and is kept in the run directory from then on."""

    key: str
    """Identifies the run in the service: eight hexadecimal digits, the same in each follower of the run. A copy of the
    run directory has another one."""
    num_lines: int = 0
    """Lines that the sink has taken. It continues with the one after these. A sink that knows better changes it in its
    constructor, and no later."""


class Sink(Protocol):
    """Takes metrics. It is made as `NAME(run_dir=Path, config=RunConfig, memory=Memory)`.

    It may also have a static method `check(config)`, which raises `ConfigError` for settings with which it cannot work.
    That is called before a run starts, in a process that is thrown away.

    Example:
        >>> from pathlib import Path
        >>> from darts_async.config import RunConfig
        >>> class Prints:
        ...     def __init__(self, run_dir: Path, config: RunConfig, memory: Memory) -> None:
        ...         self.name = config.name
        ...     def write(self, line: dict[str, Any]) -> None:
        ...         print(self.name, line["type"], line.get("step"))
        ...     def flush(self) -> None:
        ...         print("safe")
        ...     def close(self) -> None:
        ...         print("the end")
        >>> sink = Prints(Path("."), RunConfig(), Memory("3f0a91c2"))
        >>> sink.write({"type": "step", "step": 3, "reward/mean": 0.5})
        run step 3
        >>> sink.flush()
        safe
    """

    def write(self, line: dict[str, Any]) -> None:
        """Take a line as it is in `metrics.jsonl`: `type` is `step`, `evaluation` or `resumed`. A line that raises is
        repeated by the next follower."""

    def flush(self) -> None:
        """Return once the lines written so far are safe if this process is killed. They are not repeated after this."""

    def close(self) -> None:
        """No further lines come, and the last ones are flushed."""


@dataclass(frozen=True, slots=True)
class Point:
    """The metrics of a line on one axis of steps."""

    step: int
    """The optimiser step. Of an evaluation the policy version, which is the number of steps before it."""
    unix_s: float
    """When it was measured, in seconds since 1970."""
    metrics: dict[str, float]


def point_of(line: Mapping[str, Any]) -> Point | None:
    """What a line says in numbers. None for a line without metrics, such as `resumed`.

    >>> point_of({"type": "evaluation", "policy_version": 8, "reward/mean": 0.5, "rewards": [0.0, 1.0], "unix_s": 9.0})
    Point(step=8, unix_s=9.0, metrics={'evaluation/reward/mean': 0.5})
    """
    if line["type"] == "step":
        step, prefix = line.get("step"), ""
    elif line["type"] == "evaluation":
        step, prefix = line.get("policy_version"), EVALUATION
    else:
        return None
    metrics = {f"{prefix}{name}": float(value) for name, value in line.items() if _is_metric(name, value)}
    return Point(step, unix_s_of(line), metrics) if isinstance(step, int) and metrics else None


def settings_for(config: RunConfig) -> dict[str, Any]:
    """The settings of the run, to be shown by a service. `nodes` is left out: its addresses and environments may be
    secret. So is `user:password@` of any address."""
    return cast(dict[str, Any], _without_users(config.model_dump(mode="json", exclude={"nodes"})))


_USER = re.compile(r"(?<=://)[^/?#\s]*@")


def _without_users(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_users(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_users(inner) for inner in value]
    return _USER.sub("", value) if isinstance(value, str) else value


def unix_s_of(line: Mapping[str, Any]) -> float:
    """When a line was written."""
    return float(line.get("unix_s", 0.0))


_NOT_METRICS = {"step", "policy_version", "newest_version", "elapsed_s", "unix_s"}


def _is_metric(name: str, value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return is_number and name not in _NOT_METRICS
