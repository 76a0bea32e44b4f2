"""Finds free ports and checks addresses of this machine."""

import errno
import random
import socket

_FREE_PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections, one of which could take a port before its hub binds it."""
_LOOPBACK = "127.0.0.1"


def block(first_port: int, count: int) -> tuple[int, ...]:
    return tuple(range(first_port, first_port + count))


def free_block(host: str, count: int) -> tuple[int, ...]:
    """Free ports in a row at a host; at loopback for a dry run of another machine. Raises `OSError`."""
    here = host if why_not_bound(host, 0) is None else _LOOPBACK
    for first in random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS)):
        if all(why_not_bound(here, port) is None for port in block(first, count)):
            return block(first, count)
    raise OSError(f"no {count} free ports in a row from {_FREE_PORTS.start} to {_FREE_PORTS.stop}")


def why_not_bound(host: str, port: int) -> str | None:
    """Why no process can listen there, in words; None if one can. Port 0 asks only about the host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            return "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error.strerror})"
    return None
