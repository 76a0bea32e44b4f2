"""Becomes a program that may do little. It is the first thing that is executed in a sandbox.

    python -I -S confine.py OPTIONS PROGRAM ARGUMENT...

In bubblewrap, which has namespaces of its own, it only sets limits. Without bubblewrap it is also the wall:

- It stays as the supervisor of the program, as a subreaper. When the program has ended, or at SIGTERM, it kills all
  that is left. It ends as the program did.
- Where the kernel permits, the program is in user, network, process and IPC namespaces of its own.
- Where the kernel has Landlock (Linux 5.13), the program reads the system's files and its own directory and writes its
  own directory alone; from Linux 6.7 on it opens no TCP connection, and from 6.12 on it signals no process outside.

Only the standard library is imported: in a sandbox there is nothing else.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 1, 36, 38, 4
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ABI_OF = {"REFER": 2, "TRUNCATE": 3, "TCP": 4, "IOCTL_DEV": 5, "SCOPE": 6}
"""The version of Landlock that brought each right."""
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FIRST_RIGHTS = (1 << 13) - 1
"""The rights on files of the first version."""
CANNOT_CONFINE = 120
"""Exit code when a wall that was asked for cannot be set up."""

libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: Sequence[str]) -> None:
    """Set up what the options say, and execute the program."""
    options, program = json.loads(arguments[0]), list(arguments[1:])
    try:
        if options["supervise"]:
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            _become_supervisor(options)
        _set_limits(options["limits"])
        if options["landlock"]:
            restrict_files(options["readable"], options["writable"])
        os.execv(program[0], program)
    except OSError as error:
        os.write(2, f"the sandbox cannot be set up: {error}\n".encode())
        os._exit(CANNOT_CONFINE)


def _set_limits(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))


def _become_supervisor(options: dict[str, Any]) -> None:
    """Return in the child, which is to become the program; this process waits for it and never returns."""
    is_told_to_end = []
    signal.signal(signal.SIGTERM, lambda *_: is_told_to_end.append(True))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    if options["namespaces"]:
        enter_namespaces()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        return
    status = None
    while status is None:
        if signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGTERM:
            os.kill(child, signal.SIGKILL)
        status = _reaped(child)
    _kill_the_rest()
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _reaped(child: int) -> int | None:
    """Reap ended children; the status of `child` if it is one of them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in (0, child):
            return status if pid == child else None


def _kill_the_rest() -> None:
    """What the program has started and left is a child of this process now, or will be when its parent is killed."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            for pid in map(int, file.read().split()):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def enter_namespaces() -> None:
    """New user, network, process and IPC namespaces. Raises `OSError` where the kernel does not permit it."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWPID | _CLONE_NEWIPC) != 0:
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def landlock_version() -> int:
    """The version of Landlock that the kernel has; 0 for none."""
    return max(0, int(libc.syscall(_CREATE_RULESET, None, 0, 1)))


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Have Landlock refuse everything but reading and executing `readable`, and doing anything in `writable`. Paths
    that do not exist are left out. Raises `OSError`."""
    version = landlock_version()
    has = {name: version >= since for name, since in _ABI_OF.items()}
    rights = _FIRST_RIGHTS | has["REFER"] << 13 | has["TRUNCATE"] << 14 | has["IOCTL_DEV"] << 15
    fields = [rights, *([3] if has["TCP"] else []), *([3] if has["SCOPE"] else [])]
    attributes = (ctypes.c_uint64 * len(fields))(*fields)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.sizeof(attributes), 0))
    for paths, allowed in ((readable, _EXECUTE | _READ_FILE | _READ_DIR), (writable, rights)):
        for path in filter(os.path.exists, paths):
            _allow(ruleset, path, allowed if os.path.isdir(path) else allowed & (_EXECUTE | _READ_FILE | _WRITE_FILE))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder, signed=True)
    _checked(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0))
    os.close(descriptor)


def _prctl(option: int, value: int) -> None:
    _checked(libc.prctl(option, value, 0, 0, 0))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
