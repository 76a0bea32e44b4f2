"""Cut the connections of a gloo group, because gloo cannot be aborted.

Observed with torch 2.13: `ProcessGroupGloo.abort` and `shutdown` do nothing, dropping the group waits for its
running operation, and an operation on a peer that hangs blocks until its timeout. What frees it at once is the
end of its TCP connections. They are found by their addresses: every rank publishes the address it listens on
through the rendezvous store, as a `sockaddr` inside an opaque value. If gloo ever changes that format nothing
is found, and the operation's own timeout, which is the deadline of the update, frees the thread instead.

So it does where gloo misses the end of a connection: a few of a hundred sending operations that were being posted in
the very moment of the cut waited on (torch 2.13; its loop idle, the sockets shut down). Whoever waits for the thread of
a group that sends must therefore allow for that timeout.
"""

import contextlib
import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Iterable

Address = tuple[str, int]

_IPV4 = re.compile(re.escape(struct.pack("=H", socket.AF_INET)) + b"(..)(.{4})", re.DOTALL)
_IPV6 = re.compile(re.escape(struct.pack("=H", socket.AF_INET6)) + b"(..).{4}(.{16})", re.DOTALL)
DESCRIPTORS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
"""Where the open files of this process are listed."""


def addresses_in(values: Iterable[bytes]) -> set[Address]:
    """Everything in the rendezvous values that reads as a socket address (and so, by chance, a few that are none)."""
    found: set[Address] = set()
    for value in values:
        for family, pattern in ((socket.AF_INET, _IPV4), (socket.AF_INET6, _IPV6)):
            for match in pattern.finditer(value):
                port, host = match.groups()
                found.add((socket.inet_ntop(family, host), int.from_bytes(port, "big")))
    return found


def sever(listeners: set[Address]) -> int:
    """Shut down this process's TCP connections that have one of `listeners` at either end; returns how many."""
    return sum(_sever_if_ours(int(name), listeners) for name in os.listdir(DESCRIPTORS))


def _sever_if_ours(descriptor: int, listeners: set[Address]) -> bool:
    # A duplicate, so that the descriptor cannot be closed and given to something else between look and cut.
    # OSError: it was closed meanwhile, or it is a socket without a peer.
    with contextlib.suppress(OSError):
        duplicate = os.dup(descriptor)
        if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
            os.close(duplicate)
            return False
        with socket.socket(fileno=duplicate) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                ends = {connection.getsockname()[:2], connection.getpeername()[:2]}
                if ends & listeners:
                    connection.shutdown(socket.SHUT_RDWR)
                    return True
    return False
