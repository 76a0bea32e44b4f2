"""The launcher takes requests from other terminals over a Unix socket in the run directory.

Any user who may enter the directory (mode 0700) may send requests; the same user may read the keys of the run. Each
connection carries one request and one reply, each a line of JSON, with a deadline: a client that is silent or floods
harms only itself.

A socket's address holds about a hundred bytes, and a run directory may lie deep: a longer one is reached through an
open descriptor of the directory. A socket file that somebody removes is made again within a few seconds.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from darts_async.errors import DartsError
from darts_async.topology.run_files import CONTROL_SOCKET
from launcher.control.requests import Refused, Reply, Request
from launcher.run_dir.place import inode_of

MAX_REQUEST_BYTES = 1 << 12
MAX_REPLY_BYTES = 1 << 20
REQUEST_TIMEOUT_S = 5.0
LOOK_EVERY_S = 1.0
"""How often it is looked whether the socket file is there."""
_MAX_ADDRESS_BYTES = 100

Answer = Callable[[Request], Reply]


_decode_reply: Callable[[bytes], Reply] = msgspec.json.Decoder(Reply).decode


class NotRunningError(DartsError):
    """No launcher listens in a run directory."""


@contextlib.asynccontextmanager
async def serving_requests(run_dir: Path, answer: Answer) -> AsyncIterator[None]:
    """Take requests inside the block. The socket is gone afterwards."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(msgspec.json.encode(await _reply(reader, answer)) + b"\n")
                writer.close()
                await writer.wait_closed()
        writer.transport.abort()  # no effect, unless the client did not read

    listener = _Listener(run_dir, serve)
    await listener.open()
    watcher = asyncio.create_task(listener.stay_open(), name="keep the control socket")
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        await listener.close()


class _Listener:
    """The socket, which has a file as long as the run has its directory."""

    def __init__(self, run_dir: Path, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> None:
        self._run_dir = run_dir
        self._run_dir_inode = inode_of(run_dir)
        self._path = run_dir / CONTROL_SOCKET
        self._serve = serve
        self._server: asyncio.Server | None = None
        self._inode = 0

    async def open(self) -> None:
        """Raises `OSError`."""
        with _address(self._run_dir) as address:
            self._server = await asyncio.start_unix_server(self._serve, address, limit=MAX_REQUEST_BYTES)
        self._inode = self._path.stat().st_ino

    async def stay_open(self) -> None:
        """Make the file again whenever it is gone, and the directory is there."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with contextlib.suppress(OSError):  # the directory is gone, or the disk full: it is tried again
                if not self._has_file() and inode_of(self._run_dir) == self._run_dir_inode:
                    await self.close()
                    await self.open()

    async def close(self) -> None:
        """The file goes too, if it is of this socket."""
        if self._server is None:
            return
        self._server.close()
        await self._server.wait_closed()
        self._server = None
        if self._has_file():
            self._path.unlink(missing_ok=True)

    def _has_file(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False


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
    """The reply of the launcher. Raises `NotRunningError` if none runs, or if it does not answer in time."""
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
        raise NotRunningError(f"the launcher in {run_dir} seems to be of another version: {error}") from error


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
