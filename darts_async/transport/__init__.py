"""Reliable, typed, authenticated links between the processes of a run, over ZeroMQ.

    Endpoint -- bind_link/connect_link --> Link --> Mailbox       what a process uses
                                            |
      MessageCodec (typed messages)  Session (delivery: pure)  Wire (one non-blocking socket)

ZeroMQ alone loses messages when a peer dies. Here a message is kept until the consumer at the other end has handled it,
and is sent again to the next incarnation of a peer that died before. See `session` for the theory.
"""

from darts_async.transport.endpoint import Endpoint
from darts_async.transport.keys import RunKeys, create_run_keys, load_keys, renew_run_keys
from darts_async.transport.link import Link
from darts_async.transport.mailbox import Event, Mailbox, PeerDown, PeerUp, Received, Unreadable

__all__ = [
    "Endpoint",
    "Event",
    "Link",
    "Mailbox",
    "PeerDown",
    "PeerUp",
    "Received",
    "RunKeys",
    "Unreadable",
    "create_run_keys",
    "load_keys",
    "renew_run_keys",
]
