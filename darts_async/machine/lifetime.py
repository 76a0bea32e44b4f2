"""Ends a process when its parent ends.

Linux sends a chosen signal to a process when its parent ends, even if the parent was killed. The request does not
notice a parent that ended between fork and request, so the parent's pid is compared afterwards. The signal is SIGKILL,
because a process that hangs would ignore others; all files that a run needs are written atomically.

    python -P -m darts_async.machine.lifetime MODULE ARGUMENT...

binds itself to its parent, and then runs the module: see `spawn`. This file has no slow imports.
"""

import ctypes
import os
import runpy
import signal
import sys

PARENT_PID_VARIABLE = "DARTS_PARENT_PID"
"""Set by `spawn` for its children: the pid that they must find as their parent."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends. `parent_pid` is the expected parent. Default: the pid that
    `spawn` has set in the environment, or the current parent if the process was started in another way (ssh, a user).
    No effect on systems other than Linux."""
    if sys.platform != "linux":
        return
    expected_pid = parent_pid or int(os.environ.pop(PARENT_PID_VARIABLE, "0")) or os.getppid()
    _at_the_end_of_the_parent(signal.SIGKILL)
    if os.getppid() != expected_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def wake_with_parent() -> None:
    """Let the kernel resume this process, if it is stopped, when its parent ends. For a process that notices the end of
    its parent by itself. No effect on systems other than Linux."""
    if sys.platform == "linux":
        _at_the_end_of_the_parent(signal.SIGCONT)


def _at_the_end_of_the_parent(number: signal.Signals) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")


def main() -> None:
    """Entry point: bind, and become the module that the first argument names."""
    die_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
