"""How a run is: what its launcher answers while it is live, and what it has written at its end."""

from pathlib import Path
from typing import Any

import msgspec

from darts_async.topology.run_files import SUMMARY_FILE
from launcher.control.control_socket import NotRunningError, ask
from launcher.control.find_run import record_of
from launcher.control.requests import GetStatus, RunState
from launcher.display.summary import Summary
from launcher.run_dir.place import inode_of
from launcher.run_dir.run_dir import RunRecord

_ASK_TIMEOUT_S = 2.0


def read_state(run_dir: Path) -> dict[str, Any]:
    """The record of the run; `live`: the reply of its launcher; `summary`: its totals. Both may be None.

    Raises:
        ConfigError: this is not a run directory, or its state file is damaged.
        OSError: it cannot be read.
    """
    record = record_of(run_dir)
    live = _live(run_dir, record)
    return {
        "status": record.status,
        "reason": record.reason,
        "life": record.life,
        "started_at_s": record.started_at_s,
        "ended_at_s": record.ended_at_s,
        "run_dir": str(run_dir),
        "live": live,
        "summary": None if live is not None else _summary(run_dir),
    }


def _live(run_dir: Path, record: RunRecord) -> Any:
    """The launcher's reply. None if the run has ended, was killed, or does not take requests now.

    The lock of the run is not tried, as other verbs do: to hold it, even for a moment, could stop a `resume`.
    """
    if record.status != "running" or record.inode not in (0, inode_of(run_dir)):
        return None
    try:
        reply = ask(run_dir, GetStatus(), _ASK_TIMEOUT_S)
    except NotRunningError:
        return None
    return msgspec.to_builtins(reply) if isinstance(reply, RunState) else None


def _summary(run_dir: Path) -> Any:
    try:
        return msgspec.to_builtins(msgspec.json.decode((run_dir / SUMMARY_FILE).read_bytes(), type=Summary))
    except (FileNotFoundError, msgspec.MsgspecError):  # not there, or of another version: the other files tell enough
        return None
