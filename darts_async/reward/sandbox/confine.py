"""Becomes a program that may do little. It is the first thing that is executed in a sandbox.

    python -I -S confine.py OPTIONS PROGRAM ARGUMENT...

In bubblewrap, which has namespaces of its own, it only sets limits. Without bubblewrap it is also the wall:

- It stays as the supervisor of the program, as a subreaper. When the program has ended, or at SIGTERM, it kills all
  that is left. It ends as the program did.
- Where the kernel permits, the program is in network, process and IPC namespaces of its own.
- Where the kernel has seccomp, the program opens no socket, except pairs of its own.
- Where the kernel has Landlock (Linux 5.13), the program reads the system's files and its own directory and writes its
  own directory alone; from Linux 6.7 on it opens no TCP connection, and from 6.12 on it signals no process outside.

Only the standard library is imported: in a sandbox there is nothing else.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import time
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
_LOOK_EVERY_S = 0.005
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_SECCOMP_ALLOW, _SECCOMP_REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Its number, and that of the system call `socket`."""
_IO_URING_SETUP, _FIRST_X32_CALL = 425, 0x40000000
SET_UP = b"set up"
"""What is told through a pipe just before the program is executed. If that fails, more follows."""

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
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        if options["user_id"]:
            _become(options["user_id"])
        if options["no_sockets"]:
            refuse_sockets()
        if options["supervise"]:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the user takes it away
        os.set_inheritable(options["tells"], False)
        os.write(options["tells"], SET_UP)
        os.execv(program[0], program)
    except OSError as error:
        os.write(2, f"the sandbox cannot be set up: {error}\n".encode())
        os.write(options["tells"], b"no")
        os._exit(1)


def _become(user_id: int) -> None:
    """A user of no other process, to whom nothing is permitted and whose processes the kernel counts for themselves."""
    os.setgroups([])
    os.setresgid(user_id, user_id, user_id)
    os.setresuid(user_id, user_id, user_id)


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
        enter_namespaces(as_root=bool(options["user_id"]))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        os.setsid()
        return
    os.close(options["tells"])
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
    """What the program has started and left is a child of this process now, or will be when its parent is killed.

    Processes are stopped before they are killed, because what is stopped starts nothing. A list of children may miss
    some while others end, so it is read until there is no child."""
    while True:
        stopped: set[int] = set()
        while new := _descendants(os.getpid()) - stopped:
            _signal_all(new, signal.SIGSTOP)
            stopped |= new
        _signal_all(stopped, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(_LOOK_EVERY_S)


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    unseen = [pid]
    while unseen:
        children = _children(unseen.pop())
        unseen += children
        found.update(children)
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children += map(int, file.read().split())
    return children


def _signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)


def enter_namespaces(*, as_root: bool) -> None:
    """New network, process and IPC namespaces; unless it is done as root, a user namespace too. Raises `OSError` where
    the kernel does not permit it."""
    uid, gid = os.getuid(), os.getgid()
    _checked(libc.unshare(_CLONE_NEWNET | _CLONE_NEWPID | _CLONE_NEWIPC | (0 if as_root else _CLONE_NEWUSER)))
    if as_root:
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def can_refuse_sockets() -> bool:
    """Whether the kernel has seccomp, on a machine whose system calls are known here."""
    return os.path.exists("/proc/sys/kernel/seccomp") and os.uname().machine in _ARCHITECTURES


def refuse_sockets() -> None:
    """Have seccomp refuse `socket`, and the ways around it: io_uring, and system calls of other architectures. Raises
    `OSError`."""
    architecture, socket = _ARCHITECTURES[os.uname().machine]
    program = (
        (_LOAD, 0, 0, 4),  # the architecture
        (_IF_EQUAL, 0, 5, architecture),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_IF_AT_LEAST, 3, 0, _FIRST_X32_CALL),
        (_IF_EQUAL, 2, 0, socket),
        (_IF_EQUAL, 1, 0, _IO_URING_SETUP),
        (_RETURN, 0, 0, _SECCOMP_ALLOW),
        (_RETURN, 0, 0, _SECCOMP_REFUSE),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    _checked(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0))


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
