"""What a test leaves behind: processes, descriptors (ports and sockets among them), shared memory, temporary files.

Processes are known by a mark in their environment, which whoever is started inherits, also when it has left the
process group and its parent is dead.
"""

import gc
import os
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "DARTS_TEST_RUN"
"""In the environment of whatever the tests start."""
GONE_WITHIN_S = 10.0
"""A process that was killed takes a moment, and a socket is closed by a thread of ZeroMQ's."""
_TICK_S = 0.02
_SHARED_MEMORY = Path("/dev/shm")
_KEPT = ("/dev/", "/proc/", "/sys/", "/usr/", "anon_inode:[pidfd]", sysconfig.get_path("purelib"))
"""Where descriptors lead that libraries open once and keep."""
_OF_WANDB = ("wandb-artifacts", "wandb-media")


@dataclass(frozen=True, slots=True)
class Belongings:
    """What there is at one moment."""

    processes: frozenset[str]
    descriptors: Counter[str]
    """By kind, and by path where there is one."""
    shared_memory: frozenset[str]
    temporary: frozenset[str]

    def beyond(self, before: "Belongings") -> list[str]:
        """What has come since, in words."""
        return [
            *(f"process {name}" for name in sorted(self.processes - before.processes)),
            *(f"{count} x descriptor of {kind}" for kind, count in (self.descriptors - before.descriptors).items()),
            *(f"shared memory {name}" for name in sorted(self.shared_memory - before.shared_memory)),
            *(f"temporary file {name}" for name in sorted(self.temporary - before.temporary)),
        ]


def left_since(before: Belongings) -> list[str]:
    """What is there that was not, after a moment for what is just going."""
    if not (left := belongings().beyond(before)):
        return []
    gc.collect()
    deadline_s = time.monotonic() + GONE_WITHIN_S
    while (left := belongings().beyond(before)) and time.monotonic() < deadline_s:
        time.sleep(_TICK_S)
    return left


def belongings() -> Belongings:
    """What there is now."""
    ours = _ours()
    return Belongings(
        processes=frozenset(ours.values()),
        descriptors=Counter(_descriptors()),
        shared_memory=frozenset(path.name for path in _SHARED_MEMORY.iterdir() if not _is_of_others(path.name)),
        temporary=frozenset(map(str, _temporary())),
    )


def _temporary() -> Iterator[Path]:
    """Temporary files. What a supervisor that was killed leaves of its processes' waits for the next one, PyTorch keeps
    what it has compiled, and W&B removes the directories of its import when the process ends."""
    own = Path(tempfile.gettempdir())
    if not own.name.startswith("darts-"):  # or the module's own, which are removed with it
        for path in own.iterdir():
            kept = path.name.startswith(("darts-", "torchinductor_")) or path.name.endswith(_OF_WANDB)
            if not kept:
                yield path


def _ours() -> dict[int, str]:
    """Everything that these tests have started and that lives."""
    found = {}
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal() or int(path.name) == os.getpid():
            continue
        try:
            if mark in (path / "environ").read_bytes().split(b"\0"):
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(path.name)] = f"{path.name} {command.strip()}"
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def _descriptors() -> list[str]:
    kinds = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(path)
        except OSError:
            continue  # that of this listing
        if not target.startswith(_KEPT):
            kinds.append(target.partition(":")[0] if not target.startswith(("/", "anon_inode")) else target)
    return kinds


def _is_of_others(name: str) -> bool:
    """Whether a living process has a segment, by its name or in its memory, which is none of these tests'."""
    pids = [int(word) for word in name.replace("-", "_").split("_") if word.isdecimal()]
    ours = {os.getpid(), *_ours()}
    if any(psutil.pid_exists(pid) and pid not in ours for pid in pids):
        return True
    return any(_maps(pid, f"{_SHARED_MEMORY}/{name}") for pid in psutil.pids() if pid not in ours)


def _maps(pid: int, path: str) -> bool:
    try:
        return path in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return False  # it has ended, or is somebody else's
