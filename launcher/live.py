"""Which run a verb means: the directory that was given, or the newest one in which a launcher listens."""

from pathlib import Path

import msgspec

from darts_async.errors import ConfigError
from darts_async.topology import CONFIG_FILE, RunPlan, agent_name
from launcher.requests import GetStatus
from launcher.rundir import STATE_FILE, RunRecord, read_record
from launcher.service import NotRunningError, ask


def find_run(run_dir: Path | None, runs_dir: Path) -> Path:
    """The directory of the run that is meant. Raises `ConfigError` if there is none."""
    if run_dir is None:
        return _newest_live(runs_dir)
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    return run_dir


def record_of(run_dir: Path) -> RunRecord:
    """How the run stands, as its launcher has left it. Raises `ConfigError`."""
    try:
        return read_record(run_dir)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{run_dir} does not say how its run stands: {STATE_FILE}: {error}; "
            f"`darts-launch resume {run_dir}` goes on with the run"
        ) from error


def not_live(run_dir: Path, error: NotRunningError) -> ConfigError:
    """Why nothing can be asked of a run: what is known of its end."""
    record = record_of(run_dir)
    if record.status == "running":
        return ConfigError(f"{error}: it was killed, for {STATE_FILE} still says running (pid {record.launcher_pid})")
    return ConfigError(f"the run in {run_dir} is not live: it {record.status} ({record.reason})")


def names_of(plan: RunPlan, process: str) -> tuple[str, ...]:
    """The processes that `ROLE/N` or `ROLE` means, or the agent of a node. Raises `ConfigError` if there are none."""
    everyone = (*(spec.name for spec in plan.processes), *map(agent_name, plan.nodes))
    names = plan.names(process) or tuple(name for name in everyone if name == process)
    if not names:
        raise ConfigError(f"there is no {process!r}; the run has {', '.join(everyone)}")
    return names


def _newest_live(runs_dir: Path) -> Path:
    """By the time of its start."""
    found = [path.parent for path in runs_dir.glob(f"*/{STATE_FILE}")]
    for run_dir in sorted(found, key=lambda path: record_of(path).started_at_s, reverse=True):
        if record_of(run_dir).status == "running" and _is_live(run_dir):
            return run_dir
    raise ConfigError(
        f"no run is live in {runs_dir.absolute()}, of {len(found)} there; give RUN_DIR, or --runs-dir where it is"
    )


def _is_live(run_dir: Path) -> bool:
    try:
        ask(run_dir, GetStatus())
    except NotRunningError:
        return False
    return True
