"""Closes gloo's listening port to all other processes once a group is formed.

Each member of a gloo group listens on a port of the run's interface, and the others connect to it while the group
forms. That takes milliseconds, but gloo listens until the group is dropped, without authentication. Observed with torch
2.13: every TCP connection that is opened and closed there costs a descriptor until the group is dropped. With about a
thousand connections any user of the machine could make the process abort.

After the group is formed, no further connection is needed, so the kernel drops every packet to the listening socket (a
socket filter, which needs no privilege). Connections of the group are not affected, and other processes get no answer.
The socket itself cannot be closed, because gloo still waits for its events.

There is no filter on systems other than Linux, nor for NCCL's ports.
"""

import ctypes
import socket
import struct
import sys

import structlog

from darts_async.weights.broadcast.close_gloo_sockets import Address, do_with_sockets

_SO_ATTACH_FILTER = 26
_DROP = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""A program of one instruction: accept zero bytes of a packet (`BPF_RET | BPF_K`)."""

log = structlog.get_logger()


def refuse_strangers(own_addresses: set[Address]) -> int:
    """Refuse further connections to the sockets of this process that listen at one of these addresses; returns their
    number. It is logged if the kernel does not allow it."""
    if sys.platform != "linux":
        return 0
    return do_with_sockets(lambda found: _listens(found, own_addresses) and _drop_all(found))


def _listens(found: socket.socket, addresses: set[Address]) -> bool:
    accepts = found.type == socket.SOCK_STREAM and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return bool(accepts) and found.getsockname()[:2] in addresses


def _drop_all(listener: socket.socket) -> bool:
    instructions = ctypes.create_string_buffer(_DROP)
    program = struct.pack("@HP", 1, ctypes.addressof(instructions))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError as error:
        log.warning("gloo_port_stays_open", address=listener.getsockname(), error=str(error))
        return False
    return True
