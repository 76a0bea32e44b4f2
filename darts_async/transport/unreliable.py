"""A wire that loses, delays, repeats and reorders frames as `DARTS_FAULTS` asks, to test sessions.

Delayed frames are returned when the link looks again, which it does several times per heartbeat.
"""

import heapq
import time
from random import Random

from darts_async.faults import LinkFault
from darts_async.transport.zmq_socket import Arrival, Wire

OVERTAKEN_BY_S = 0.05
"""How long a frame is delayed so that others overtake it, or until it is repeated."""


class UnreliableWire(Wire):
    """Wraps another wire."""

    def __init__(self, wire: Wire, faults: tuple[LinkFault, ...], seed: str) -> None:
        self._socket, self._handshakes = wire._socket, wire._handshakes
        self.routes, self.fd = wire.routes, wire.fd
        self._faults = faults
        self._random = Random(seed)
        self._opened_s = time.monotonic()
        self._held: list[tuple[float, int, Arrival]] = []  # bounded by what the peers have credit for
        self._num_held = 0

    def has_input(self) -> bool:
        """As `Wire.has_input`, with delayed frames that are due."""
        return self._is_due() or super().has_input()

    def receive(self) -> Arrival | None:
        """The next frame that is not lost."""
        if self._is_due():
            return heapq.heappop(self._held)[2]
        while (arrival := super().receive()) is not None:
            if self._passes(arrival):
                return arrival
        return None

    def _is_due(self) -> bool:
        return bool(self._held) and self._held[0][0] <= time.monotonic()

    def _passes(self, arrival: Arrival) -> bool:
        """Whether the frame is returned now."""
        for fault in self._faults:
            if fault.kind == "cut":
                if 0 <= time.monotonic() - self._opened_s - fault.first < fault.second:
                    return False
                continue
            if self._random.random() >= fault.first:
                continue
            match fault.kind:
                case "drop":
                    return False
                case "delay":
                    self._hold(arrival, self._random.uniform(0.0, fault.second))
                    return False
                case "reorder":
                    self._hold(arrival, OVERTAKEN_BY_S)
                    return False
                case "duplicate":
                    self._hold(arrival, OVERTAKEN_BY_S)
        return True

    def _hold(self, arrival: Arrival, for_s: float) -> None:
        self._num_held += 1
        heapq.heappush(self._held, (time.monotonic() + for_s, self._num_held, arrival))
