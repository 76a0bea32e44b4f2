"""A run, launched from settings and measured from what it left: its traces, its metrics, its summary.

Shares are integrals over the intervals in which a process worked, in a window that begins at one step and ends at
another, so that starting and ending are in none: behind it follow as many steps as there are versions in flight, for
which nothing is launched any more. Tokens that a generator decoded are counted by itself.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import yaml
from msgspec import Struct

from darts_async.errors import ConfigError
from darts_async.topology.roles import LAUNCHER
from darts_async.trace import SAMPLE
from launcher.analysis.time_use import time_spent
from launcher.analysis.traces import Life, Traces

ROOT = Path(__file__).parent.parent
DEADLINE_S = 3600.0
LAUNCH = (
    "from darts_async.machine.lifetime import die_with_parent; die_with_parent();"
    " from launcher.commands.cli import main; main()"
)
"""What is run: `darts-launch`, which ends with the benchmark, however that ends."""
SCHEMA = 3
"""Of the files that hold these numbers. Another one cannot be compared with them."""


class Use(Struct, frozen=True):
    """What a process did in the window; shares of the window."""

    busy: float
    idle: float
    away: float
    stages: dict[str, float]
    """Work, by stage; stages may overlap."""
    waits: dict[str, float]
    loop_lag_max_s: float
    memory_max_mb: float
    slots: float | None = None
    """Of a generator: slots in use, in the mean over time."""


class Measured(Struct, frozen=True):
    """One run in its window."""

    window_s: float
    num_steps: int
    num_groups: int
    num_trained: int
    """Tokens in gradients."""
    num_decoded: int
    staleness_mean: float
    staleness_max: float
    stalls_s: tuple[float, float]
    """By which an update of the weights held decoding: median and longest of the updates."""
    cancels_s: tuple[float, float] | None
    """From the shaper's word until the generator had freed the slot, median and 99th percentile; None if it asked for
    none."""
    processes: dict[str, Use]
    tokens_by_outcome: dict[str, int]
    """Of the whole run."""
    reward: float
    """Mean of the trained samples."""

    def mean(self, role: str, of: str) -> float:
        """The mean of an attribute over the processes of a role."""
        return fmean(getattr(use, of) for name, use in self.processes.items() if name.startswith(f"{role}/"))

    def wait(self, role: str, stage: str) -> float:
        """The mean share that processes of a role waited for something."""
        return fmean(use.waits.get(stage, 0.0) for name, use in self.processes.items() if name.startswith(f"{role}/"))

    def largest(self, of: str) -> float:
        """The largest value of an attribute over all processes."""
        return max(float(getattr(use, of)) for use in self.processes.values())


def quickstart(num_slots: int = 192) -> dict[str, Any]:
    """The quickstart's settings, with one generator of many slots: two of 64 leave a learner little of two cores, which
    then hides what generation gains."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "launcher" / "configs" / "quickstart.yaml").read_text())
    settings["roles"]["generator"]["replicas"] = 1
    settings["generator"]["num_slots"] = num_slots
    return settings


def launch(settings: Mapping[str, Any], home: Path) -> Path:
    """Run `darts-launch` to its end, below an empty directory; returns the run directory.

    Raises:
        ConfigError: it did not finish, with its last words, or not within `DEADLINE_S`.
    """
    config = home / "cluster.yaml"
    config.write_text(yaml.safe_dump({**settings, "runs_dir": str(home / "runs")}))
    command = [sys.executable, "-c", LAUNCH, str(config)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired as error:  # the kernel ends everything with the launcher
        raise ConfigError(f"darts-launch has not ended within {DEADLINE_S:g} s; give fewer steps") from error
    if done.returncode:
        raise ConfigError(f"darts-launch ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")
    [run_dir] = (home / "runs").iterdir()
    return run_dir


def measure(run_dir: Path, skip_steps: int) -> Measured:
    """The numbers of a finished run, from the end of step `skip_steps` - 1 on, without the `draining` steps.

    Raises:
        ConfigError: the directory holds no finished run, no trace, or not that many steps.
    """
    try:
        summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        config: dict[str, Any] = yaml.safe_load((run_dir / "config.yaml").read_text())
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run_dir} is not the directory of a finished run: {error}") from error
    lives = dict(Traces(run_dir).by_process())
    ended_s = _step_ends(lives[LAUNCHER])
    end = len(ended_s) - draining(config["staleness"]["max_staleness"])
    if end <= skip_steps:
        raise ConfigError(
            f"{run_dir} holds {len(ended_s)} steps, of which the first {skip_steps} and the last {len(ended_s) - end} "
            "are to be left out; run more"
        )
    since_s, until_s = ended_s[skip_steps - 1], ended_s[end - 1]
    metrics = [line for line in lines if line["type"] == "step" and skip_steps <= line["step"] < end]
    stalls = [line["weights/stall_s"] for line in metrics if "weights/stall_s" in line]
    num_steps = end - skip_steps
    generators = [each for name, each in lives.items() if name.startswith("generator/")]
    return Measured(
        window_s=until_s - since_s,
        num_steps=num_steps,
        num_groups=num_steps * config["learner"]["groups_per_step"],
        num_trained=round(sum(_values(metrics, "learner/tokens"))),
        num_decoded=round(sum(tokens_between(each, since_s, until_s) for each in generators)),
        staleness_mean=fmean(_values(metrics, "staleness/mean")),
        staleness_max=max(_values(metrics, "staleness/max")),
        stalls_s=(median(stalls), max(stalls)) if stalls else (0.0, 0.0),
        cancels_s=_cancels(lives, since_s, until_s),
        processes={
            name: _use(name, each, since_s, until_s, config["generator"]["num_slots"])
            for name, each in lives.items()
            if name != LAUNCHER
        },
        tokens_by_outcome=_tokens_by_outcome(summary),
        reward=fmean(_values(metrics, "reward/mean")),
    )


def draining(max_staleness: int) -> int:
    """Steps at the end of a run while which less and less is left to be launched."""
    return max_staleness + 1


def _step_ends(launcher: Sequence[Life]) -> list[float]:
    """When the launcher heard of each step, by step; the last time, where a step was taken again."""
    ended_s = {each.args["step"]: each.at_s for life in launcher for each in life.instants if each.name == "step"}
    return [ended_s[step] for step in sorted(ended_s)]


def _cancels(lives: Mapping[str, Sequence[Life]], since_s: float, until_s: float) -> tuple[float, float] | None:
    at_s: dict[str, dict[Any, float]] = {"cancel": {}, "stopped": {}}
    for each in (each for of in lives.values() for life in of for each in life.instants if each.name in at_s):
        at_s[each.name][each.args[SAMPLE]] = each.at_s
    asked = {sample: asked_s for sample, asked_s in at_s["cancel"].items() if since_s <= asked_s <= until_s}
    took_s = [at_s["stopped"][sample] - asked_s for sample, asked_s in asked.items() if sample in at_s["stopped"]]
    return (float(np.median(took_s)), float(np.percentile(took_s, 99))) if took_s else None


def _values(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [line[name] for line in metrics if name in line] or [0.0]


def _use(name: str, lives: Sequence[Life], since_s: float, until_s: float, num_slots: int) -> Use:
    spent = time_spent(name, lives, since_s, until_s)
    levels = [level for life in lives for level in life.levels if since_s <= level.at_s <= until_s]
    return Use(
        busy=spent.share(spent.busy_s),
        idle=spent.share(spent.idle_s),
        away=spent.share(spent.away_s),
        stages={stage: spent.share(seconds) for stage, seconds in spent.by_stage_s.items()},
        waits={stage: spent.share(seconds) for stage, seconds in spent.waits_s.items()},
        loop_lag_max_s=max((level.values.get("loop_lag_s", 0.0) for level in levels), default=0.0),
        memory_max_mb=max((level.values.get("memory_mb", 0.0) for level in levels), default=0.0),
        slots=(
            fmean(min(level.values["in_flight"], num_slots) / num_slots for level in levels)
            if name.startswith("generator/") and levels
            else None
        ),
    )


def _tokens_by_outcome(summary: Mapping[str, Any]) -> dict[str, int]:
    tokens = summary["tokens"]
    return {} if tokens is None else {**tokens["by_outcome"], "evaluated": tokens["evaluated"]}


def tokens_between(lives: Sequence[Life], since_s: float, until_s: float) -> float:
    """Tokens that a process decoded in a window. Each incarnation counts from zero; between two counts the rate is
    constant."""
    return sum(_count_at(life, until_s) - _count_at(life, since_s) for life in lives)


def _count_at(life: Life, at_s: float) -> float:
    before_s, before = life.began_s, 0.0
    for level in life.levels:
        if "tokens" not in level.values:
            continue
        tokens = level.values["tokens"]
        if level.at_s > at_s:
            share = (at_s - before_s) / (level.at_s - before_s) if at_s > before_s else 0.0
            return before + (tokens - before) * share
        before_s, before = level.at_s, tokens
    return before
