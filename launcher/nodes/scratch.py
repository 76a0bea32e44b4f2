"""Gives each process a directory for temporary files, which is removed when the process ends.

Otherwise the files of a killed process would stay forever (sockets of vLLM's engine core, files of a reward function).
`TMPDIR` points to the directory. Its name is derived from run and node, so that the next keeper of the node can remove
what a killed keeper has left, and no other files. A pid would not identify it: pids are reused, and containers that
share a directory have equal ones. Neither would a path: a copy of a run directory may have replaced the original, whose
processes are still alive.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

_LONGEST_BASE = 40
"""The path of a Unix socket has at most 107 bytes, of which vLLM needs 37."""
_SHORT_BASE = Path("/tmp")


def owner_of(run_dir: Path, node: str) -> str:
    """The owner of the directories of a node's processes, as text."""
    return f"{run_dir.resolve()} {run_dir.stat().st_ino} {node}"


def make_scratch(owner: str) -> Path:
    """Create a directory."""
    return Path(tempfile.mkdtemp(prefix=_prefix(owner), dir=_base()))


def remove_scratch(path: Path) -> None:
    """Remove a directory and its files. Files that cannot be removed stay."""
    shutil.rmtree(path, ignore_errors=True)


def remove_all(owner: str) -> None:
    """Remove all directories of an owner, whose processes are dead."""
    for path in all_of(owner):
        remove_scratch(path)


def all_of(owner: str) -> list[Path]:
    """All directories of an owner."""
    return sorted(path for base in {_base(), _SHORT_BASE} for path in base.glob(f"{_prefix(owner)}*"))


def _prefix(owner: str) -> str:
    return f"darts-{hashlib.sha256(owner.encode()).hexdigest()[:8]}-"


def _base() -> Path:
    base = Path(tempfile.gettempdir())
    return base if len(str(base)) <= _LONGEST_BASE else _SHORT_BASE
