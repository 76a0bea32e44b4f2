"""Where the processes of a run listen, and the links between them."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from darts_async.config.section import Positive, Seconds, Section


class NetworkConfig(Section):
    """Where the processes of a run listen."""

    host: str = "127.0.0.1"
    """Address that every socket binds to, where a node names none of its own. Loopback unless the run spans machines;
    never a wildcard."""
    base_port: Annotated[int, Field(ge=0, le=65000)] = 0
    """First of a block of ports, one per link. 0 takes free ones, where all that listen are on the first node."""
    lease_s: Seconds = 30.0
    """A node that has not heard the launcher for so long, beyond `transport.dead_after_s`, ends what runs on it. Some
    time later the launcher counts its processes as killed, and starts them again when it is back."""


class TransportConfig(Section):
    """The reliable links between processes."""

    window: Positive = 256
    """Messages that a receiver lets a peer have outstanding (credit)."""
    max_outbox: Positive = 100_000
    """Messages kept for one peer until acknowledged; more is an error that names the peer."""
    max_message_bytes: Positive = 64 << 20
    """Larger messages are refused on both sides."""
    heartbeat_s: Seconds = 1.0
    """Interval of keep-alives, on the socket and on the link."""
    dead_after_s: Seconds = 10.0
    """A peer that was silent for this long is down."""
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
