"""A directory for the temporary files of each process, which goes with it, however it ends.

What a process leaves when it is killed (the sockets of vLLM's engine core, the files of a reward function) would
otherwise stay for ever. `TMPDIR` points there. The name says whose it is, so that what is left of a supervisor that was
killed itself can be told from what is in use.
"""

import shutil
import tempfile
from pathlib import Path

_PREFIX = "darts-"
_LONGEST_BASE = 40
"""Of the 107 bytes that a Unix socket's path has, vLLM takes 37 for a name of its own."""
_SHORT_BASE = Path("/tmp")


def make_scratch(pid: int) -> Path:
    """A new directory, of the supervisor with this pid."""
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{pid}-", dir=_base()))


def remove_scratch(path: Path) -> None:
    """With all that is in it; what cannot be removed stays."""
    shutil.rmtree(path, ignore_errors=True)


def remove_scratch_of(pid: int) -> None:
    """Of a supervisor that is dead."""
    for path in _base().glob(f"{_PREFIX}{pid}-*"):
        remove_scratch(path)


def _base() -> Path:
    base = Path(tempfile.gettempdir())
    return base if len(str(base)) <= _LONGEST_BASE else _SHORT_BASE
