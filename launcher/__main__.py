"""The entry point of `darts-launch` and `python -m launcher`.

This file has no slow imports. While the other modules are imported, a Ctrl-C ends the process without a traceback.
`python -m` puts the caller's directory first on the path, where a foreign `structlog.py` may be, so it is removed. If
it holds our own sources, the processes of a run need it too.
"""

import os
import signal
import sys
from pathlib import Path

_SOURCES = str(Path(__file__).parent.parent)


def main() -> None:
    """Entry point."""
    _open_what_is_closed()
    _leave_the_directory_of_the_caller()
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launcher.commands.cli import main as command_line

    signal.signal(signal.SIGINT, handler)
    command_line()


def _open_what_is_closed() -> None:
    """Give a closed standard stream (`>&-`) the null device. Otherwise a file of ours would get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, "w" if number else "r", closefd=False))


def _leave_the_directory_of_the_caller() -> None:
    directory = os.getcwd()
    if sys.flags.safe_path or sys.path[0] != directory:
        return
    if directory == _SOURCES:
        known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([_SOURCES, *filter(None, known)])
    else:
        del sys.path[0]


if __name__ == "__main__":
    main()
