"""Finds the run that a verb means: the given directory, or the newest run with a live launcher."""

import fcntl
import os
from pathlib import Path

import msgspec

from darts_async.errors import ConfigError
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import agent_name
from darts_async.topology.run_files import CONFIG_FILE, LOCK_FILE, STATE_FILE
from launcher.control.control_socket import NotRunningError, ask
from launcher.control.requests import GetStatus, Reply, Request
from launcher.run_dir.place import inode_of
from launcher.run_dir.run_dir import RunRecord, read_record


def find_run(run_dir: Path | None, runs_dir: Path, *, is_live: bool = True) -> Path:
    """The directory of the run: the given one, the newest live one, or the newest one. Raises `ConfigError`."""
    if run_dir is None:
        return _newest_live(runs_dir) if is_live else _newest(runs_dir)
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    return run_dir


def record_of(run_dir: Path) -> RunRecord:
    """The state of the run, as its launcher has written it. Raises `ConfigError`."""
    try:
        return read_record(run_dir)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        if _is_locked(run_dir):
            advice = "its launcher is alive: Ctrl-C or SIGTERM ends it in order"
        else:
            advice = f"`darts-launch resume {run_dir}` continues the run"
        raise ConfigError(f"the state of the run in {run_dir} is unknown: {STATE_FILE}: {error}; {advice}") from error


def known_record(run_dir: Path) -> RunRecord | None:
    """The state of the run. None if the file is missing or incomplete."""
    try:
        return record_of(run_dir)
    except ConfigError:
        return None


def ask_run(run_dir: Path, request: Request) -> Reply:
    """The reply of the launcher of this run directory. In a copy made of hard links the socket belongs to the original,
    which is never asked. Raises `NotRunningError`."""
    if _is_copy(run_dir, record_of(run_dir)):
        raise NotRunningError(f"no launcher is running in {run_dir}")
    return ask(run_dir, request)


def has_launcher(run_dir: Path) -> bool:
    """Whether a launcher of the run is alive, on any machine. While it starts or ends it takes no requests."""
    return _is_locked(run_dir) and not _is_copy(run_dir, record_of(run_dir))


def _is_locked(run_dir: Path) -> bool:
    """Whether a launcher holds the lock of the run, or of the original if this is a copy of hard links."""
    try:
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def refuse_links(run_dir: Path) -> None:
    """Raises `ConfigError` if files are hard links to those of another run, because writes would change both."""
    try:
        is_linked = (run_dir / LOCK_FILE).stat().st_nlink > 1
    except OSError:
        return
    if is_linked:
        raise ConfigError(
            f"the files in {run_dir} are hard links to those of another run directory; make a real copy with "
            f"`cp -a {run_dir} COPY`, and resume that"
        )


def not_live(run_dir: Path, error: NotRunningError) -> ConfigError:
    """Why the run takes no requests: what is known of its end."""
    is_there = has_launcher(run_dir)
    record = record_of(run_dir)  # read late: a launcher that has just ended has written it
    if record.status != "running":
        return ConfigError(f"the run in {run_dir} is not live: it {record.status} ({record.reason})")
    resume = f"`darts-launch resume {run_dir}` continues from there"
    if _is_copy(run_dir, record):
        return ConfigError(f"{error}: it is a copy, made before its original had ended; {resume}")
    pid = f"pid {record.launcher_pid}"
    if is_there:
        return ConfigError(f"{error}: its launcher ({pid}) is starting, ending, hanging or elsewhere; try again")
    return ConfigError(f"{error}: it was killed, because {STATE_FILE} still says running ({pid}); {resume}")


def _is_copy(run_dir: Path, record: RunRecord) -> bool:
    return record.inode not in (0, inode_of(run_dir))


def names_of(plan: RunPlan, process: str) -> tuple[str, ...]:
    """The processes of `ROLE/N` or `ROLE`, or the agent of a node. Raises `ConfigError` if there are none."""
    everyone = (*(spec.name for spec in plan.processes), *map(agent_name, plan.nodes))
    names = plan.names(process) or tuple(name for name in everyone if name == process)
    if not names:
        raise ConfigError(f"there is no {process!r}; the run has {', '.join(everyone)}")
    return names


def _newest_live(runs_dir: Path) -> Path:
    """The live run that started last."""
    found = [path.parent for path in runs_dir.glob(f"*/{STATE_FILE}")]
    records = {run_dir: record for run_dir in found if (record := known_record(run_dir)) is not None}
    newest_first = sorted(records, key=lambda run_dir: records[run_dir].started_at_s, reverse=True)
    running = [run_dir for run_dir in newest_first if records[run_dir].status == "running"]
    for is_live in (_answers, has_launcher):  # prefer a launcher that answers
        if (newest := next(filter(is_live, running), None)) is not None:
            return newest
    advice = f"name one of its {len(found)} runs as RUN_DIR" if found else "there are no runs: give --runs-dir"
    if newest_first:
        advice += f"; the newest is {newest_first[0]}"
    raise ConfigError(f"no run is live in {runs_dir.absolute()}; {advice}")


def _newest(runs_dir: Path) -> Path:
    """The run that started last, live or over."""

    def started_at_s(run_dir: Path) -> float:
        record = known_record(run_dir)
        return record.started_at_s if record is not None else run_dir.stat().st_mtime

    found = [path.parent for path in runs_dir.glob(f"*/{CONFIG_FILE}")]
    if not found:
        raise ConfigError(f"there is no run in {runs_dir.absolute()}; give RUN_DIR, or another --runs-dir")
    return max(found, key=started_at_s)


def _answers(run_dir: Path) -> bool:
    try:
        ask_run(run_dir, GetStatus())
    except NotRunningError:
        return False
    return True
