"""The runs that a dashboard shows: one, or all in a directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts_async.errors import ConfigError
from darts_async.topology.run_files import CONFIG_FILE
from launcher.control.find_run import known_record
from launcher.dashboard.plain import plain


@dataclass(frozen=True, slots=True)
class ShownRuns:
    """A run directory, or a directory of runs, in which further runs may appear."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> "ShownRuns":
        """What is at a path. Raises `ConfigError` if there is no run."""
        shown = cls(path.absolute())
        if not path.is_dir():
            raise ConfigError(f"{path} is not a directory; give a run directory, or one with runs in it")
        if not shown.found():
            raise ConfigError(f"there is no run in {shown.path}; give a run directory, or one with runs in it")
        return shown

    def found(self) -> dict[str, Path]:
        """The directories of the runs by name. A run is only ever found here, never by a path that a request names."""
        if (self.path / CONFIG_FILE).is_file():
            return {self.path.name: self.path}
        return {file.parent.name: file.parent for file in self.path.glob(f"*/{CONFIG_FILE}")}

    def listed(self) -> list[dict[str, Any]]:
        """What the list of runs shows of each, the newest first."""
        rows = []
        for name, run_dir in self.found().items():
            record = known_record(run_dir)
            row = {"run": name, "status": "unknown", "reason": "", "started_at_s": 0.0}
            if record is not None:
                row |= {"status": record.status, "reason": record.reason, "started_at_s": record.started_at_s}
            rows.append(row)
        return sorted((plain(row) for row in rows), key=lambda row: (row["started_at_s"] or 0.0, row["run"]))[::-1]
