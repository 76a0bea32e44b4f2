"""Which requests the dashboard answers. Pure.

Any program and any page of any browser on this machine can reach a loopback address. So the first part of a path is a
token that only the printed address has. A page of another site that has made its own name point to this machine (DNS
rebinding) is refused by the Host header, before the token is looked at. Nothing can be changed: only GET is answered.

A path after the token is looked up in a table, and a run in the list of runs. Neither becomes part of a file name.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qs, urlsplit

from darts_async.errors import DartsError

HOSTS: Final = ("127.0.0.1", "localhost")
_MAX_FIELDS = 64


class RefusedError(DartsError):
    """A request that is not answered, with the HTTP status that says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A request that may be answered."""

    path: str
    """What follows the token and its slash. Empty: the page itself."""
    query: dict[str, list[str]] = field(default_factory=dict)

    def all(self, name: str) -> list[str]:
        """All values of a field."""
        return self.query.get(name, [])

    def one(self, name: str) -> str:
        """The value of a field. Raises `RefusedError` unless there is exactly one."""
        values = self.all(name)
        if len(values) != 1:
            raise RefusedError(400, f"{self.path} needs {name}=... once in its address, and has it {len(values)} times")
        return values[0]


def read_request(method: str, target: str, hosts: Sequence[str], token: str) -> PageRequest:
    """The request, if it is a GET of this address with the token.

    Args:
        method: of the request line.
        target: of the request line: `/TOKEN/PATH?QUERY`.
        hosts: values of all Host headers.

    Raises:
        RefusedError: it is something else.

    Example:
        >>> read_request("GET", "/secret/samples?run=a", ["127.0.0.1:8000"], "secret")
        PageRequest(path='samples', query={'run': ['a']})
    """
    if len(hosts) != 1 or not _is_ours(hosts[0]):
        raise RefusedError(403, f"the Host of the request is not one of {', '.join(HOSTS)}")
    if method != "GET":
        raise RefusedError(405, f"{method} is not answered: the dashboard only reads, by GET")
    found, slash, rest = target.removeprefix("/").partition("/")
    if not target.startswith("/") or not hmac.compare_digest(_bytes(found), _bytes(token)):
        raise RefusedError(403, "this is not the address that `darts-launch dashboard` printed: its token is missing")
    if not slash:
        raise RefusedError(404, "the address ends with a slash")
    try:
        address = urlsplit(f"/{rest}")
        query = parse_qs(address.query, keep_blank_values=True, max_num_fields=_MAX_FIELDS)
    except ValueError as error:
        raise RefusedError(400, f"the address cannot be read: {error}") from error
    return PageRequest(address.path.removeprefix("/"), query)


def _is_ours(host: str) -> bool:
    """Whether a Host header names this machine by its loopback name. A tunnel may have any port."""
    name, colon, port = host.strip().partition(":")
    return name.lower() in HOSTS and (not colon or port.isdecimal())


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
