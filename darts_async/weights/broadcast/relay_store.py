"""The rendezvous store of a broadcast group, over the authenticated link of the run instead of a TCPStore.

Values that the collective writes (addresses of gloo's sockets, NCCL's unique id) leave as `StoreValue` messages, and
`put` adds the values of other members. The collective's threads call `set`, `get`, `wait` and `check`; the event loop
calls `put` and `fail`. Every wait ends: by the value, by `fail`, or at a deadline.

Invariants: a peer never changes an existing value; after `fail` no thread waits.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store

from darts_async.errors import DeadlineError, ProtocolError, WeightUpdateError
from darts_async.protocol import StoreValue

MAX_KEYS = 1 << 14
MAX_VALUE_BYTES = 1 << 20


class RelayStore(Store):
    """A `torch.distributed.Store` whose writes are messages.

    Args:
        epoch: stamped on every message.
        send: called on the event loop with each value that the collective sets.
        deadline_s: how long `get` and `wait` wait. The timeout of the collective is ignored, because gloo passes that
            of a single attempt to connect.
    """

    def __init__(
        self, epoch: int, send: Callable[[StoreValue], None], loop: asyncio.AbstractEventLoop, *, deadline_s: float
    ) -> None:
        super().__init__()
        self._epoch = epoch
        self._send = send
        self._loop = loop
        self._deadline_s = deadline_s
        self._values: dict[str, bytes] = {}
        self._own: set[str] = set()
        self._failure: str | None = None
        self._changed = threading.Condition()

    # --- the event loop's side -------------------------------------------------------------------------------

    def put(self, key: str, value: bytes) -> None:
        """Add a value that another member has set. Raises `ProtocolError` if it is too large, if there are too many, or
        if it contradicts an existing value."""
        if len(value) > MAX_VALUE_BYTES:
            raise ProtocolError(f"store value {key!r} has {len(value)} bytes, the limit is {MAX_VALUE_BYTES}")
        with self._changed:
            if self._values.get(key, value) != value:
                raise ProtocolError(f"store value {key!r} of epoch {self._epoch} was set before, to something else")
            if len(self._values) >= MAX_KEYS:
                raise ProtocolError(f"the store of epoch {self._epoch} holds {MAX_KEYS} values, the limit")
            self._values[key] = value
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Wake all waiting threads with an error. The first reason is kept."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    def values(self) -> list[bytes]:
        with self._changed:
            return list(self._values.values())

    def own_values(self) -> list[bytes]:
        """The values that this member has set."""
        with self._changed:
            return [value for key, value in self._values.items() if key in self._own]

    # --- the group's thread ----------------------------------------------------------------------------------

    def meet(self, rank: int, world_size: int) -> None:
        """Wait until every member has called this; raises as `wait`."""
        self.set(f"here/{rank}", b"")
        self.wait([f"here/{other}" for other in range(world_size)])

    # --- the collective's side: called from its threads ------------------------------------------------------

    def set(self, key: str, value: bytes | str) -> None:
        """Store a value here and send it to the other members."""
        content = value.encode() if isinstance(value, str) else bytes(value)
        with self._changed:
            self._values[key] = content
            self._own.add(key)
            self._changed.notify_all()
        self._loop.call_soon_threadsafe(self._send, StoreValue(self._epoch, key, content))

    def get(self, key: str) -> bytes:
        self.wait([key])
        with self._changed:
            return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all `keys` exist.

        Raises:
            DeadlineError: some do not exist at the deadline; the message names them.
            WeightUpdateError: the group was given up.
        """
        deadline = time.monotonic() + self._deadline_s
        with self._changed:
            while missing := [key for key in keys if key not in self._values]:
                if self._failure is not None:
                    raise WeightUpdateError(self._failure)
                if not self._changed.wait(deadline - time.monotonic()):
                    raise DeadlineError(
                        f"waited {self._deadline_s:g} s for store keys {missing} of epoch {self._epoch}: "
                        "the members that set them have not joined the group"
                    )

    def check(self, keys: Sequence[str]) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)

    def set_timeout(self, timeout: timedelta) -> None:
        """Ignored: see the class."""

    def delete_key(self, key: str) -> bool:
        """Remove a value here; other members keep it."""
        with self._changed:
            return self._values.pop(key, None) is not None

    def get_num_keys(self) -> int:
        with self._changed:
            return len(self._values)

    def add(self, key: str, amount: int) -> int:
        """Refused: this store has no central place that could count for all members."""
        raise WeightUpdateError(f"the rendezvous store cannot count (key {key!r}, amount {amount})")
