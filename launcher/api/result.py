"""What a run has come to, read from its directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts_async.topology.run_files import METRICS_FILE
from launcher.run_dir.json_lines import read_lines
from launcher.run_dir.run_dir import final_model_path, read_record

_NOT_METRICS = ("type", "step")


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a run, and its numbers. The names of metrics are those of `metrics.jsonl`."""

    status: str
    """`finished`, `stopped` or `failed`."""
    reason: str
    run_dir: Path
    model_path: Path | None
    """The trained model in Hugging Face format; None if the run did not come to its end."""
    steps: tuple[Mapping[str, float], ...]
    """The metrics of each optimiser step, in order. A step that was taken again after a restart is there once."""
    evaluations: tuple[Mapping[str, Any], ...]
    """Each evaluation on held-out prompts, in order, also with the numbers of each sample."""

    def series(self, metric: str) -> list[float]:
        """One metric over the steps that have it.

        Raises:
            KeyError: no step has it; the message lists what there is.
        """
        values = [step[metric] for step in self.steps if metric in step]
        if not values:
            known = sorted({name for step in self.steps for name in step})
            raise KeyError(f"no step has {metric!r}; the metrics are {', '.join(known)}")
        return values


class RunFailedError(RuntimeError):
    """A run that failed. Its numbers are in `result`."""

    def __init__(self, result: Result) -> None:
        super().__init__(f"{result.reason}; see {result.run_dir}")
        self.result = result


class StepLines:
    """Puts the lines of `metrics.jsonl` together: the lines of a step come in parts, and again after a restart."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.evaluations: dict[tuple[int, int], dict[str, Any]] = {}
        self._num_told = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line."""
        if line["type"] == "step":
            values = {name: value for name, value in line.items() if name not in _NOT_METRICS}
            self.steps.setdefault(line["step"], {}).update(values)
        elif line["type"] == "evaluation":
            self.evaluations[line["policy_version"], line["newest_version"]] = {
                name: value for name, value in line.items() if name not in _NOT_METRICS
            }

    def take_complete(self, *, is_over: bool) -> list[int]:
        """The steps that are complete, each of them once: those before the newest one, and all when the run is over."""
        known = sorted(step for step in self.steps if step >= self._num_told)
        complete = known if is_over else known[:-1]
        if complete:
            self._num_told = complete[-1] + 1
        return complete


def read_result(run_dir: Path) -> Result:
    """The result of a run that is over. Raises `OSError` or `msgspec.DecodeError` if its record cannot be read."""
    record, lines = read_record(run_dir), StepLines()
    for line in read_lines(run_dir / METRICS_FILE).objects:
        lines.add(line)
    return Result(
        status=record.status,
        reason=record.reason,
        run_dir=run_dir,
        model_path=final_model_path(run_dir),
        steps=tuple(lines.steps[step] for step in sorted(lines.steps)),
        evaluations=tuple(lines.evaluations.values()),
    )
