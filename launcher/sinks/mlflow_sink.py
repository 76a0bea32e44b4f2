"""MLflow: each line of the metrics is logged with the time at which it was measured.

A database takes a metric with the same run, step, time and value once, so a line that comes again after a kill adds
nothing. The run is found again by a tag. Where a step comes again, MLflow shows both values.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME
from mlflow.exceptions import MlflowException

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from launcher.sinks.sink import Memory, point_of, settings_for

_KEY_TAG: Final = "darts_async.key"
_MAX_METRICS: Final = 1000
"""Of one request."""
_MAX_PARAMS: Final = 100
"""Of one request."""
_MAX_PARAM_CHARS: Final = 500
_REFUSED: Final = re.compile(r"[^\w\-. :/]")
"""Characters that a name may not have."""


class MlflowSink:
    """Logs to a run of the experiment `telemetry.mlflow.experiment`, named like the run directory."""

    def __init__(self, run_dir: Path, config: RunConfig, memory: Memory) -> None:
        """Find the run by its key, or create it. Raises `MlflowException`."""
        self._client = _client(config)
        experiment = config.telemetry.mlflow.experiment or MLFLOW_EXPERIMENT_NAME.get() or "darts-async"
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        self._run_id = self._found_or_created(experiment_id, run_dir.name, memory.key)
        self._log_settings(config)
        self._metrics: list[Metric] = []

    @staticmethod
    def check(config: RunConfig) -> None:
        """Raises `ConfigError` for an address that MLflow cannot use."""
        _client(config)

    def write(self, line: dict[str, Any]) -> None:
        """Keep it for `flush`."""
        if (point := point_of(line)) is not None:
            at_ms = int(point.unix_s * 1000)
            for name, value in point.metrics.items():
                self._metrics.append(Metric(_REFUSED.sub("_at_", name), value, at_ms, point.step))

    def flush(self) -> None:
        """Send what was kept. Raises `MlflowException`."""
        for start in range(0, len(self._metrics), _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=self._metrics[start : start + _MAX_METRICS])
        self._metrics.clear()

    def close(self) -> None:
        """Say that the run has ended."""
        self._client.set_terminated(self._run_id)

    def _found_or_created(self, experiment_id: str, name: str, key: str) -> str:
        runs = self._client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        if not runs:
            return str(self._client.create_run(experiment_id, tags={_KEY_TAG: key}, run_name=name).info.run_id)
        self._client.update_run(runs[0].info.run_id, status="RUNNING")
        return str(runs[0].info.run_id)

    def _log_settings(self, config: RunConfig) -> None:
        """Once: MLflow refuses to change a setting, and a run may be resumed with others."""
        if self._client.get_run(self._run_id).data.params:
            return
        params = [
            Param(_REFUSED.sub("_", name), str(value)[:_MAX_PARAM_CHARS])
            for name, value in _flattened("", settings_for(config))
        ]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])


def _client(config: RunConfig) -> MlflowClient:
    try:
        return MlflowClient(tracking_uri=config.telemetry.mlflow.tracking_uri)
    except MlflowException as error:
        raise ConfigError(f"telemetry.mlflow.tracking_uri cannot be used: {error}") from error


def _flattened(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
