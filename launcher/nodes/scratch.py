"""A directory for the temporary files of each process, which goes with it, however it ends.

What a process leaves when it is killed (the sockets of vLLM's engine core, the files of a reward function) would
otherwise stay for ever. `TMPDIR` points there. The name says of which run and node it is, so that the next keeper of
that node can remove what one that was killed has left, and nothing of anybody else. A pid would not do: it comes again,
and two containers that share a directory have the same ones. A path alone would not do either: a copy of a run
directory may have taken the place of the original, whose processes live.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

_LONGEST_BASE = 40
"""Of the 107 bytes that a Unix socket's path has, vLLM takes 37 for a name of its own."""
_SHORT_BASE = Path("/tmp")


def owner_of(run_dir: Path, node: str) -> str:
    """Who the directories of a node's processes belong to."""
    return f"{run_dir.resolve()} {run_dir.stat().st_ino} {node}"


def make_scratch(owner: str) -> Path:
    """A new directory."""
    return Path(tempfile.mkdtemp(prefix=_prefix(owner), dir=_base()))


def remove_scratch(path: Path) -> None:
    """With all that is in it; what cannot be removed stays."""
    shutil.rmtree(path, ignore_errors=True)


def remove_all(owner: str) -> None:
    """Whatever there is; its processes are dead."""
    for path in all_of(owner):
        remove_scratch(path)


def all_of(owner: str) -> list[Path]:
    """What there is, wherever it may be."""
    return sorted(path for base in {_base(), _SHORT_BASE} for path in base.glob(f"{_prefix(owner)}*"))


def _prefix(owner: str) -> str:
    return f"darts-{hashlib.sha256(owner.encode()).hexdigest()[:8]}-"


def _base() -> Path:
    base = Path(tempfile.gettempdir())
    return base if len(str(base)) <= _LONGEST_BASE else _SHORT_BASE
