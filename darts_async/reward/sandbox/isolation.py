"""The walls around a program that no person has read, and the command line that sets them up.

    bubblewrap   namespaces of every kind: the program sees the system's files read-only, a directory of its own in
                 memory, its own processes and no network
    processes    a supervisor, limits, and of these as many as the kernel permits: Landlock (files, TCP, signals),
                 namespaces (network, processes) and seccomp (sockets)

In both, the kernel limits CPU time, address space, size of files, number of open files and number of processes, and
`program` limits wall time, memory of all processes together and output. The kernel exempts the user root from the limit
of processes. So a run of root gives each program to a user that nothing else has (`user_id`).
"""

import json
import os
import pwd
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from darts_async.errors import ConfigError
from darts_async.reward.sandbox import confine

_CONFINE = Path(confine.__file__)
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
"""What programs are made of. Nothing here is of a user."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
HOME = "/tmp"
"""The working directory of a program in bubblewrap."""
_PLACES = """
import json, sys, sysconfig
print(json.dumps([sys.executable, sys.prefix, sys.base_prefix, *map(sysconfig.get_path, ("stdlib", "purelib"))]))
"""
_ANSWER_WITHIN_S = 30.0
NUM_OWN_USERS = 16
"""Users of the programs of one process."""
_MOST_PROCESSES = 1 << 22
"""As many as there are process ids."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """The walls that a program gets."""

    kind: Literal["bubblewrap", "processes"]
    python: str
    """Path of the interpreter that runs programs."""
    bubblewrap: str = ""
    """Path of the executable."""
    landlock: int = 0
    """Version of Landlock; 0 for none."""
    namespaces: bool = False
    no_sockets: bool = False
    """Whether seccomp refuses to open sockets."""
    user_id: int = 0
    """The user of the programs, the first of `NUM_OWN_USERS`; 0 for the user of the run."""

    def describe(self) -> str:
        """For people."""
        walls = [f"Landlock {self.landlock}"] * bool(self.landlock) + ["namespaces"] * self.namespaces
        walls += ["no sockets"] * self.no_sockets
        walls += ["a user of its own"] * bool(self.user_id)
        if self.kind == "bubblewrap":
            return " with ".join([f"bubblewrap ({self.bubblewrap})", *walls])
        return f"processes with limits{''.join(f', {wall}' for wall in walls)}"

    def of_program(self, number: int) -> "Isolation":
        """The same for the program of this number. Processes of the programs before it may still be ending, and count
        as processes of their user."""
        return replace(self, user_id=self.user_id and self.user_id + number % NUM_OWN_USERS)

    def place(self) -> str:
        """Where directories of programs are made: where the user of the programs gets to them, if there is such a
        place."""
        found = places()
        return next((place for place in found if not self.user_id or _is_open_to_all(Path(place))), found[0])

    def give(self, directory: Path) -> None:
        """Let the user of the programs have this directory and its files."""
        for path in (directory, *directory.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
            if self.user_id and self.kind == "processes":
                os.chown(path, self.user_id, self.user_id)

    def command(
        self, program: Sequence[str], limits: Mapping[str, int], directory: Path, tmpfs_bytes: int, tells: int
    ) -> tuple[str, ...]:
        """The command line that runs a program.

        Args:
            program: an executable and its arguments.
            limits: of the kernel, by their name in `resource`.
            directory: has the files of the program.
            tmpfs_bytes: limits what bubblewrap keeps in memory for each directory.
            tells: an open pipe, into which `confine.SET_UP` is written before the program is executed.
        """
        is_supervised = self.kind == "processes"
        options: dict[str, Any] = {
            "limits": dict(limits),
            "supervise": is_supervised,
            "namespaces": self.namespaces,
            "landlock": is_supervised and bool(self.landlock),
            "no_sockets": self.no_sockets,
            "user_id": self.user_id,
            "tells": tells,
            "readable": [*_SYSTEM, *_places_of(self.python), "/dev/urandom"],
            "writable": [str(directory), *_DEVICES],
        }
        confined = (json.dumps(options), *program)
        if is_supervised:
            return (self.python, "-I", "-S", str(_CONFINE), *confined)
        walls = self._bubblewrap(directory, tmpfs_bytes)
        return (*walls, self.python, "-I", "-S", "/confine.py", *confined)

    def _bubblewrap(self, directory: Path, tmpfs_bytes: int) -> Sequence[str]:
        places = (*_SYSTEM, *(part for place in _places_of(self.python) for part in _parts_for_all(place)))
        parents = {str(parent) for path in places for parent in Path(path).parents[:-1]}
        binds = [word for path in sorted(parents) for word in ("--perms", "0755", "--dir", path)]
        binds += [word for path in places for word in _bound(path)]
        files = [word for path in sorted(directory.iterdir()) for word in _copied(path)]
        in_memory = ("--perms", "1777", "--size", str(tmpfs_bytes), "--tmpfs")
        rights = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if self.user_id else ("--unshare-user",)
        return (
            *(self.bubblewrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
            *("--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL", *rights),
            *(*in_memory, HOME),  # before the interpreter, which may be below it
            *binds,
            *("--ro-bind", str(_CONFINE), "/confine.py", "--proc", "/proc", "--dev", "/dev"),
            *(*in_memory, "/dev/shm", "--remount-ro", "/dev"),
            *(*files, "--remount-ro", "/"),
            *(word for name, value in environment_in(HOME).items() for word in ("--setenv", name, value)),
            *("--chdir", HOME, "--"),
        )


def places() -> tuple[str, ...]:
    """Where directories of programs may be."""
    return (tempfile.gettempdir(), "/tmp", "/var/tmp")


def environment_in(home: str) -> dict[str, str]:
    """The environment of a program. Libraries for numbers would start a thread for each core of the machine, and
    threads count as processes."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", **one_thread}


@cache
def own_user_id() -> int:
    """The first of some users without a name and without a process, which no other process of this machine chooses; 0
    if this process may not become another user."""
    mapped = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, count = max(mapped, key=lambda line: line[2])
    if os.geteuid() != 0 or count < 1 << 16:
        return 0
    span = min(_MOST_PROCESSES, count // 4 // NUM_OWN_USERS)
    taken = {entry.pw_uid for entry in pwd.getpwall()} | set(_users_of_processes())
    number = os.stat("/proc/self/ns/pid").st_ino * 65_537 + os.getpid()  # a container may count processes by itself
    last = first + count - 3  # the last ones mean no user, and a user from outside
    firsts = (last - ((number + n) % span + 1) * NUM_OWN_USERS for n in range(span))
    return next(user for user in firsts if taken.isdisjoint(range(user, user + NUM_OWN_USERS)))


def _users_of_processes() -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                yield entry.stat().st_uid
            except FileNotFoundError:  # it has just ended
                continue


def _is_open_to_all(directory: Path) -> bool:
    try:
        return all(path.stat().st_mode & stat.S_IXOTH for path in (directory, *directory.resolve().parents))
    except OSError:
        return False


def _parts_for_all(place: str) -> list[str]:
    """What to show of a place. A directory that only its owner may enter, such as the home of root, is made again for
    all to enter, with the same contents."""
    path = Path(place)
    if not path.is_dir() or path.stat().st_mode & stat.S_IXOTH:
        return [place]
    return sorted(str(inner) for inner in path.iterdir())


def _below(*directories: str) -> Iterator[str]:
    """What the paths of all that is in these directories begin with."""
    return (f"{directory}/" for directory in directories)


def _bound(path: str) -> tuple[str, ...]:
    """A part of the file system, read-only; a link such as /bin stays one."""
    if os.path.islink(path):
        return ("--symlink", os.readlink(path), path)
    return ("--ro-bind-try", path, path)


def _copied(path: Path) -> tuple[str, ...]:
    return ("--ro-bind", str(path), f"{HOME}/{path.name}")


@cache
def _places_of(python: str) -> tuple[str, ...]:
    """Where an interpreter and its packages are, outside of the system's directories.

    Raises:
        ConfigError: it does not answer.
    """
    try:
        asked = subprocess.run(
            [python, "-I", "-c", _PLACES], capture_output=True, timeout=_ANSWER_WITHIN_S, check=True, text=True
        )
        executable, *told = json.loads(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"`python` of `code` is {python!r}, which does not work: {error}; write the path of a Python"
        ) from error
    places = {*told, *(str(Path(path).resolve()) for path in told), executable, str(Path(executable).resolve())}
    outside = {place for place in places if place not in ("/", "/usr")}
    return tuple(sorted(place for place in outside if not any(map(place.startswith, _below("/usr", *outside)))))
