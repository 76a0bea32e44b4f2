"""The newest metrics of a run as text for Prometheus, version 0.0.4 of its format.

A name is that of `metrics.jsonl` with `darts_` before it and its unit after it: `reward/pool_mean` is
`darts_reward_pool_mean`, and `weights/total_s` is `darts_weights_total_seconds`. Shares are ratios there.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from launcher.progress.metric_names import EVALUATION_METRICS, STEP_METRICS, Metric, Unit, metric_of
from launcher.progress.run_view import RunView

_SUFFIXES: Final[dict[Unit, str]] = {
    "tokens": "tokens",
    "versions": "versions",
    "samples": "samples",
    "steps": "steps",
    "share": "ratio",
    "s": "seconds",
    "bytes": "bytes",
    "nats": "nats",
}
_FINISHED: Final = ("share", "s")
"""Units that a name of ours may end with, and that have another word there."""


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    meaning: str
    values: list[tuple[dict[str, str], float]]
    kind: str = "gauge"


def prometheus_text(view: RunView, now_s: float) -> str:
    """The page at `/metrics`. `now_s` is of the clock of the view."""
    families: dict[str, _Family] = {}
    for family in (*_run(view, now_s), *_measured(view), *_processes(view)):
        families.setdefault(family.name, family)  # a metric of a user's loss may have a name that is taken
    return "".join(map(_text, families.values()))


def prometheus_name(name: str, unit: Unit | None) -> str:
    """What a metric is called there.

    >>> prometheus_name("groups/zero_advantage_share", "share"), prometheus_name("pass@8", "share")
    ('darts_groups_zero_advantage_ratio', 'darts_pass_at_8_ratio')
    """
    words = re.sub(r"[^a-zA-Z0-9]+", "_", name.replace("@", "_at_")).strip("_").split("_")
    suffix = "" if unit is None else _SUFFIXES.get(unit, "")
    if suffix and words[-1] in _FINISHED:
        words = words[:-1]
    return "_".join(["darts", *words, *([suffix] if suffix and suffix not in words else [])])


def _run(view: RunView, now_s: float) -> Iterator[_Family]:
    yield _one("darts_run_info", "the run", 1.0, name=view.name, directory=Path(view.run_dir).name)
    yield _one("darts_run_elapsed_seconds", "time since the run began", now_s - view.started_at_s)
    yield _one("darts_run_completed_steps", "optimiser steps that were completed", view.num_steps)
    yield _one("darts_run_planned_steps", "optimiser steps of the run", view.total_steps)
    if view.last_step_at_s is not None:
        yield _one("darts_run_last_step_age_seconds", "time since the last step", now_s - view.last_step_at_s)


def _measured(view: RunView) -> Iterator[_Family]:
    yield from _metrics(view.latest, STEP_METRICS, "")
    if view.last_evaluation is not None:
        version = view.last_evaluation.policy_version
        yield _one("darts_evaluation_policy_version", "policy version of the last evaluation", version)
        yield from _metrics(view.evaluations[version].metrics(), EVALUATION_METRICS, "evaluation/")


def _metrics(values: Mapping[str, float], table: tuple[Metric, ...], prefix: str) -> Iterator[_Family]:
    for name, value in sorted(values.items()):
        if math.isfinite(value):
            metric = metric_of(name, table)
            unit, meaning = (metric.unit, metric.meaning) if metric is not None else (None, "a metric of the loss")
            yield _one(prometheus_name(prefix + name, unit), meaning.replace("`", ""), value)


def _processes(view: RunView) -> Iterator[_Family]:
    rows = view.rows.values()

    def each(name: str, meaning: str, values: list[float], kind: str = "gauge") -> _Family:
        labelled = [({"process": row.name}, value) for row, value in zip(rows, values, strict=True)]
        return _Family(f"darts_process_{name}", meaning, labelled, kind)

    yield each("up", "1 while the process is there", [float(not row.ended) for row in rows])
    yield each("restarts_total", "how often it was started again", [row.restarts for row in rows], "counter")
    yield each("uptime_seconds", "time since its start", [row.uptime_s for row in rows])
    yield each("policy_version", "version of the weights that it uses", [row.policy_version for row in rows])
    yield each("tokens", "tokens it has decoded, or trained on, since its start", [row.num_tokens for row in rows])
    yield each("in_flight_samples", "samples that it holds", [row.num_in_flight for row in rows])
    yield each("loop_lag_max_seconds", "longest time its event loop was held", [row.loop_lag_max_s for row in rows])
    busy = [({"process": row.name, "stage": stage}, s) for row in rows for stage, s in sorted(row.busy_s.items())]
    yield _Family("darts_process_busy_seconds", "time by stage since its start", busy)


def _one(name: str, meaning: str, value: float, /, **labels: str) -> _Family:
    return _Family(name, meaning, [(labels, float(value))])


def _text(family: _Family) -> str:
    lines = [f"# HELP {family.name} {family.meaning}", f"# TYPE {family.name} {family.kind}"]
    return "\n".join([*lines, *(f"{family.name}{_labels(labels)} {value!r}" for labels, value in family.values)]) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
