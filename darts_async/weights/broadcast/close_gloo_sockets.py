"""Closes the connections of a gloo group, because gloo cannot be aborted.

Observed with torch 2.13: `ProcessGroupGloo.abort` and `shutdown` do nothing, dropping the group waits for its running
operation, and an operation on a hanging peer blocks until its timeout. Closing its TCP connections frees it at once.
They are found by address: every rank publishes its listening address through the rendezvous store, as a `sockaddr`
inside an opaque value. If gloo ever changes that format, no connection is found, and the operation's timeout, which is
the deadline of the update, frees the thread. The same timeout applies where gloo misses the end of a connection, as a
few in a hundred sending operations did that were posted at the moment of the cut.
"""

import contextlib
import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterable

Address = tuple[str, int]

_IPV4 = re.compile(re.escape(struct.pack("=H", socket.AF_INET)) + b"(..)(.{4})", re.DOTALL)
_IPV6 = re.compile(re.escape(struct.pack("=H", socket.AF_INET6)) + b"(..).{4}(.{16})", re.DOTALL)
_DESCRIPTORS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


def addresses_in(values: Iterable[bytes]) -> set[Address]:
    """All byte sequences in the rendezvous values that look like a socket address, including a few by chance."""
    found: set[Address] = set()
    for value in values:
        for family, pattern in ((socket.AF_INET, _IPV4), (socket.AF_INET6, _IPV6)):
            for match in pattern.finditer(value):
                port, host = match.groups()
                found.add((socket.inet_ntop(family, host), int.from_bytes(port, "big")))
    return found


def sever(listeners: set[Address]) -> int:
    """Shut down this process's TCP connections that have one of `listeners` at either end; returns how many."""

    def cut(connection: socket.socket) -> bool:
        is_ours = not listeners.isdisjoint((connection.getsockname()[:2], connection.getpeername()[:2]))
        if is_ours:
            connection.shutdown(socket.SHUT_RDWR)
        return is_ours

    return do_with_sockets(cut)


def do_with_sockets(act: Callable[[socket.socket], bool]) -> int:
    """Call `act` with each internet socket of this process; returns how often it was true. An `OSError` is ignored: the
    socket was closed meanwhile, or has no peer."""
    num_done = 0
    for name in os.listdir(_DESCRIPTORS):
        with contextlib.suppress(OSError):
            # A duplicate, so that the descriptor cannot be closed and reused between check and use.
            duplicate = os.dup(int(name))
            if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
                os.close(duplicate)
                continue
            with socket.socket(fileno=duplicate) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    num_done += act(found)
    return num_done
