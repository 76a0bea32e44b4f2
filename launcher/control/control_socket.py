"""The launcher's ear for other terminals: a Unix socket in the run directory.

Whoever may enter the directory (mode 0700) may ask: the same people who may read the keys of the run. One request per
connection, one line of JSON each way, with a deadline: a client that is silent or floods harms nobody but itself.

A socket's address holds about a hundred bytes, and a run directory may lie deep: a longer one is reached through an
open descriptor of the directory.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec

from darts_async.errors import DartsError
from darts_async.topology.run_files import CONTROL_SOCKET
from launcher.control.requests import Refused, Reply, Request

MAX_REQUEST_BYTES = 1 << 12
MAX_REPLY_BYTES = 1 << 20
REQUEST_TIMEOUT_S = 5.0
_MAX_ADDRESS_BYTES = 100

Answer = Callable[[Request], Reply]


_decode_reply: Callable[[bytes], Reply] = msgspec.json.Decoder(Reply).decode


class NotRunningError(DartsError):
    """No launcher listens in a run directory."""


@contextlib.asynccontextmanager
async def serving_requests(run_dir: Path, answer: Answer) -> AsyncIterator[None]:
    """Take requests inside the block. The socket is gone afterwards."""
    path = run_dir / CONTROL_SOCKET

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(msgspec.json.encode(await _reply(reader, answer)) + b"\n")
                writer.close()
                await writer.wait_closed()
        writer.transport.abort()  # nothing, unless the client did not read

    with _address(run_dir) as address:
        server = await asyncio.start_unix_server(serve, address, limit=MAX_REQUEST_BYTES)
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()
        path.unlink(missing_ok=True)


async def _reply(reader: asyncio.StreamReader, answer: Answer) -> Reply:
    try:
        line = await reader.readuntil(b"\n")
        request = msgspec.json.decode(line, type=Request)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        return Refused(f"not one line of at most {MAX_REQUEST_BYTES} bytes: {error}")
    except msgspec.MsgspecError as error:
        return Refused(f"not a request of this version: {error}")
    return answer(request)


def ask(run_dir: Path, request: Request, timeout_s: float = 10.0) -> Reply:
    """The answer of the launcher that carries out the run in this directory.

    Raises:
        NotRunningError: there is none, or it does not answer in time.
    """
    try:
        with _address(run_dir) as address, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(address)
            client.sendall(msgspec.json.encode(request) + b"\n")
            with client.makefile("rb") as file:
                line = file.readline(MAX_REPLY_BYTES)
        return _decode_reply(line)
    except (FileNotFoundError, NotADirectoryError, ConnectionError) as error:
        raise NotRunningError(f"no launcher is running in {run_dir}") from error
    except TimeoutError as error:
        raise NotRunningError(f"the launcher in {run_dir} does not answer within {timeout_s:g} s") from error
    except msgspec.MsgspecError as error:
        raise NotRunningError(f"the launcher in {run_dir} does not answer as one of this version: {error}") from error


@contextlib.contextmanager
def _address(run_dir: Path) -> Iterator[str]:
    """A path to the socket that is short enough, valid inside the block."""
    path = str(run_dir / CONTROL_SOCKET)
    if len(os.fsencode(path)) <= _MAX_ADDRESS_BYTES:
        yield path
        return
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{CONTROL_SOCKET}"
    finally:
        os.close(directory)
