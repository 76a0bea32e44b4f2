"""Settings of addresses, ports and the links between processes."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from darts_async.config.section import Positive, Seconds, Section


class NetworkConfig(Section):
    """Where the processes of a run listen."""

    host: str = "127.0.0.1"
    """Address that sockets bind to on nodes without an address of their own. Use loopback unless the run spans
    machines; never a wildcard."""
    base_port: Annotated[int, Field(ge=0, le=65000)] = 0
    """First of a block of ports, one per link. 0 chooses free ports, if every listener is on the first node."""
    lease_s: Seconds = 30.0
    """A node that has not heard from the launcher for this long, in addition to `transport.dead_after_s`, ends its
    processes. Later the launcher counts them as killed, and restarts them when the node is back."""


class TransportConfig(Section):
    """The reliable links between processes."""

    window: Positive = 256
    """Most messages that a peer may send ahead of acknowledgement (credit)."""
    max_outbox: Positive = 100_000
    """Most messages kept for one peer until it acknowledges them; more is an error that names the peer."""
    max_message_bytes: Positive = 64 << 20
    """Both sides refuse larger messages."""
    heartbeat_s: Seconds = 1.0
    """Interval of keep-alives, on the socket and on the link."""
    dead_after_s: Seconds = 10.0
    """A peer that is silent for this long is down."""
    resend_after_s: Seconds = 2.0
    """Unacknowledged messages are sent again after this long without progress."""
    linger_s: Seconds = 2.0
    """How long a closing link waits for its last acknowledgements."""

    @model_validator(mode="after")
    def _silence_outlasts_heartbeats(self) -> Self:
        if self.dead_after_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"dead_after_s ({self.dead_after_s}) must be at least three times heartbeat_s ({self.heartbeat_s})"
            )
        return self
