"""Which walls this machine allows around a program that no person has read: the strongest is found out by trying.

    bubblewrap   namespaces of every kind: the program sees the system's files read-only, a directory of its own in
                 memory, its own processes and no network
    processes    a supervisor, limits, and of these as many as the kernel permits: Landlock (files, TCP, signals) and
                 namespaces (network, processes)

In both, CPU time, memory, size of files and number of open files are limited by the kernel, and wall time, memory of
all processes together, their number and output by the process that waits for it (see `program`).
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from darts_async.errors import ConfigError
from darts_async.reward.sandbox import confine

_CONFINE = Path(confine.__file__)
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
"""What programs are made of. Nothing here is of a user."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_TRY_WITHIN_S = 20.0
HOME = "/tmp"
"""The working directory of a program in bubblewrap."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """The walls that a program gets."""

    kind: Literal["bubblewrap", "processes"]
    bubblewrap: str = ""
    """Path of the executable."""
    landlock: int = 0
    """Version of Landlock; 0 for none."""
    namespaces: bool = False

    @property
    def is_closed(self) -> bool:
        """Whether a program can neither read what is not its business nor reach the network."""
        return self.kind == "bubblewrap" or (bool(self.landlock) and self.namespaces)

    def describe(self) -> str:
        """For people."""
        if self.kind == "bubblewrap":
            return f"bubblewrap ({self.bubblewrap})"
        walls = [f"Landlock {self.landlock}"] * bool(self.landlock) + ["namespaces"] * self.namespaces
        return f"processes with limits, {' and '.join(walls) or 'neither Landlock nor namespaces'}"

    def command(
        self, program: Sequence[str], limits: Mapping[str, int], directory: Path, tmpfs_bytes: int, max_processes: int
    ) -> tuple[str, ...]:
        """The command line that runs `program` with limits of the kernel (by their name in `resource`). `directory` has
        its files."""
        is_supervised = self.kind == "processes"
        options: dict[str, Any] = {
            "limits": dict(limits),
            "supervise": is_supervised,
            "namespaces": self.namespaces,
            "landlock": is_supervised and bool(self.landlock),
            "readable": [*_SYSTEM, *_of_python(), "/dev/urandom"],
            "writable": [str(directory), *_DEVICES],
        }
        if not is_supervised or self.namespaces:  # there the kernel counts the processes of the program alone
            options["limits"]["RLIMIT_NPROC"] = max_processes
        inner = (sys.executable, "-I", "-S", "CONFINE", json.dumps(options), *program)
        if is_supervised:
            return tuple(str(_CONFINE) if word == "CONFINE" else word for word in inner)
        return (*self._bubblewrap(directory, tmpfs_bytes), *(("/confine.py" if w == "CONFINE" else w) for w in inner))

    def _bubblewrap(self, directory: Path, tmpfs_bytes: int) -> Sequence[str]:
        binds = [word for path in (*_SYSTEM, *_of_python()) for word in _bound(path)]
        files = [word for path in sorted(directory.iterdir()) for word in _copied(path)]
        return (
            *(
                self.bubblewrap,
                "--unshare-all",
                "--die-with-parent",
                "--new-session",
                "--cap-drop",
                "ALL",
                "--clearenv",
            ),
            *binds,
            *("--ro-bind", str(_CONFINE), "/confine.py", "--proc", "/proc", "--dev", "/dev"),
            *("--size", str(tmpfs_bytes), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
            *("--size", str(tmpfs_bytes), "--tmpfs", HOME, *files, "--remount-ro", "/"),
            *("--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", HOME, "--chdir", HOME, "--"),
        )


def _bound(path: str) -> tuple[str, ...]:
    """A part of the file system, read-only; a link such as /bin stays one."""
    if os.path.islink(path):
        return ("--symlink", os.readlink(path), path)
    return ("--ro-bind-try", path, path)


def _copied(path: Path) -> tuple[str, ...]:
    return ("--ro-bind", str(path), f"{HOME}/{path.name}")


@cache
def _of_python() -> tuple[str, ...]:
    """Where this Python and its packages are."""
    places = {sys.prefix, sys.base_prefix, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib"))}
    places |= {str(Path(place).resolve()) for place in places} | {str(Path(sys.executable).resolve().parent.parent)}
    outside = {place for place in places if place != "/" and not place.startswith(("/usr/", "/lib/"))}
    return tuple(sorted(outside - {"/usr"}))


@cache
def find_isolation(wanted: Literal["auto", "bubblewrap", "processes"] = "auto") -> Isolation:
    """The strongest isolation of this machine, or of the kind that is wanted. Takes a moment: it is tried out.

    Raises:
        ConfigError: bubblewrap is wanted and does not work here.
    """
    why = "it is not installed"
    executable = shutil.which("bwrap") if wanted != "processes" else None
    if executable is not None:
        found = Isolation("bubblewrap", executable)
        why = _complaint(found)
        if not why:
            return found
    if wanted == "bubblewrap":
        raise ConfigError(
            f"`isolation` is 'bubblewrap', but {why}; install the package `bubblewrap`, permit user namespaces, or "
            "write 'auto'"
        )
    for found in (
        Isolation("processes", landlock=confine.landlock_version(), namespaces=True),
        Isolation("processes", landlock=confine.landlock_version()),
    ):
        if not _complaint(found):
            return found
    return Isolation("processes")


def _complaint(isolation: Isolation) -> str:
    """Why a program cannot be run in it; empty if it can."""
    program = (sys.executable, "-I", "-S", "-c", "pass")
    with tempfile.TemporaryDirectory(prefix="darts-sandbox-") as directory:
        command = isolation.command(program, {"RLIMIT_CORE": 0}, Path(directory), 1 << 20, 64)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TRY_WITHIN_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip() or f"it ends with {done.returncode}")
