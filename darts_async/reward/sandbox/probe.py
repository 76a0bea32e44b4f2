"""A program that tries what a program in a sandbox must not be able to do, and prints what it could.

    python -I probe.py FILE PORT

It is as harmless as it can be without walls: it starts at most 50 processes, which end by themselves, reads one file
that is not its own, writes an empty one, which it removes, and sends one datagram. Only the standard library is
imported.
"""

import json
import os
import socket
import sys
import time

MOST_FORKS = 50
SENT = b"from a sandbox"
_STAY_S = 2.0


def main(file: str, port: int) -> None:
    """Try everything, and print it."""
    _send(port)
    seen = {"could_read": _reads(file), "could_write": _writes_above(), "num_forks": _num_forks()}
    sys.stdout.write(json.dumps(seen))
    sys.stdout.flush()


def _num_forks() -> int:
    """How many processes could be started that are there at the same time."""
    for count in range(MOST_FORKS):
        try:
            child = os.fork()
        except OSError:
            return count
        if child == 0:
            time.sleep(_STAY_S)
            os._exit(0)
    return MOST_FORKS


def _reads(file: str) -> bool:
    try:
        with open(file) as opened:
            return bool(opened.read(1))
    except OSError:
        return False


def _writes_above() -> bool:
    """Whether it can write a file outside of its own directory."""
    name = f"../darts-probe-{os.getpid()}-{time.monotonic_ns()}"
    try:
        with open(name, "x"):
            os.unlink(name)
    except OSError:
        return False
    return True


def _send(port: int) -> None:
    """The listener knows whether it has arrived."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(SENT, ("127.0.0.1", port))
    except OSError:
        pass


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
