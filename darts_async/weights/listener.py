"""Gloo's port: what it is, and how nobody gets in once a group is formed.

Each member of a gloo group listens on a port of the run's own interface that the kernel chooses, and the others connect
to it while the group forms. That takes milliseconds, but gloo listens until the group is dropped, and authenticates
nobody: observed with torch 2.13, every TCP connection that is opened and closed there costs the process a descriptor
for as long as the group lives. About a thousand of them, a scan of ports by any user of the machine, and it would abort.

After the group is formed nothing has to come in any more, so the kernel is told to drop every packet to the listening
socket (a socket filter, which needs no privilege). The connections that are there keep their own filter, which is none;
gloo notices nothing, and whoever connects gets no answer. Closing the socket in gloo's place would not do: it still
waits for its events. What got in before, while the group was forming, goes when the group is dropped.

On systems other than Linux, and under NCCL, whose ports NCCL itself looks after, nothing is done.
"""

import contextlib
import ctypes
import os
import socket
import stat
import struct
import sys

import structlog

from darts_async.weights.sever import DESCRIPTORS, Address

_SO_ATTACH_FILTER = 26
_DROP = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""A program of one instruction: accept zero bytes of a packet (`BPF_RET | BPF_K`)."""

log = structlog.get_logger()


def refuse_strangers(own_addresses: set[Address]) -> int:
    """Let no connection come in any more at this process's sockets that listen at one of these addresses; returns how
    many there are. What a kernel does not let us do is logged."""
    if sys.platform != "linux":
        return 0
    return sum(_refuse_if_ours(int(name), own_addresses) for name in os.listdir(DESCRIPTORS))


def _refuse_if_ours(descriptor: int, addresses: set[Address]) -> bool:
    # A duplicate, so that the descriptor cannot be closed and given to something else between look and call.
    with contextlib.suppress(OSError):  # it was closed meanwhile
        duplicate = os.dup(descriptor)
        if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
            os.close(duplicate)
            return False
        with socket.socket(fileno=duplicate) as found:
            if _listens(found) and found.getsockname()[:2] in addresses:
                return _drop_all(found)
    return False


def _listens(found: socket.socket) -> bool:
    is_tcp = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
    return is_tcp and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _drop_all(listener: socket.socket) -> bool:
    instructions = ctypes.create_string_buffer(_DROP)
    program = struct.pack("@HP", 1, ctypes.addressof(instructions))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError as error:
        log.warning("gloo_port_stays_open", address=listener.getsockname(), error=str(error))
        return False
    return True
