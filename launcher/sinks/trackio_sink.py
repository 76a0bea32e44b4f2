"""trackio: each line of the metrics is one row of its local database, with an id that the database takes once.

The id is a hash of the line, its time included. So a line that comes again after a kill adds nothing. The rows
of a batch are written in one transaction, by the same function that `trackio.log` calls from a thread of its own, where
errors are only warnings. `trackio sync` of the project puts it on a Hugging Face Space.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trackio.sqlite_storage import SQLiteStorage

from darts_async.config import RunConfig
from darts_async.errors import ConfigError
from launcher.sinks.sink import Memory, Point, point_of, settings_for


class TrackioSink:
    """Writes a run of the project `telemetry.trackio.project`, named like the run directory."""

    def __init__(self, run_dir: Path, config: RunConfig, memory: Memory) -> None:
        """Nothing is written yet."""
        self._project, self._name, self._key = config.telemetry.trackio.project, run_dir.name, memory.key
        self._settings = settings_for(config)
        self._rows: list[tuple[str, Point]] = []

    @staticmethod
    def check(config: RunConfig) -> None:
        """Raises `ConfigError` for a project whose name cannot be that of a database."""
        try:
            SQLiteStorage.validate_project_name(config.telemetry.trackio.project)
        except ValueError as error:
            raise ConfigError(f"telemetry.trackio.project cannot be used: {error}") from error

    def write(self, line: dict[str, Any]) -> None:
        """Keep it for `flush`."""
        if (point := point_of(line)) is not None:
            digest = hashlib.blake2b(json.dumps(line).encode(), digest_size=16).hexdigest()
            self._rows.append((f"{self._key}-{digest}", point))

    def flush(self) -> None:
        """Write what was kept, in one transaction."""
        if self._rows:
            points = [point for _, point in self._rows]
            SQLiteStorage.bulk_log(
                project=self._project,
                run=self._name,
                run_id=self._key,
                metrics_list=[point.metrics for point in points],
                steps=[point.step for point in points],
                timestamps=[datetime.fromtimestamp(point.unix_s, UTC).isoformat() for point in points],
                log_ids=[row for row, _ in self._rows],
                config=self._settings,
            )
        self._rows.clear()

    def close(self) -> None:
        """Nothing is open."""
