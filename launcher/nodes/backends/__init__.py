"""How the agent of a node is started: as a child on this machine (`local`), over ssh on another one (`ssh`).

A backend starts agents and nothing else. What they do, and whether they are well, is heard over the link `agents`,
which is the same for every backend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from darts_async.errors import DartsError


class NodeError(DartsError):
    """A node cannot be used: which one, why, and what would help."""

    def __init__(self, node: str, reason: str, fix: str | None = None) -> None:
        self.node = node
        self.reason = reason
        self.fix = fix
        super().__init__(f"node {node}: {reason}" + (f"; {fix}" if fix else ""))


@dataclass(frozen=True, slots=True)
class AgentCommand:
    """What is to run on a node. `argv[0]` is the Python of the launcher, and `cwd` its directory; a node may say that
    it has another one."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the environment that is found there."""
    cwd: str


class Backend(Protocol):
    """Starts the agent of one node."""

    async def launch(self, command: AgentCommand, on_end: Callable[[str], None]) -> None:
        """Have the agent run. `on_end` is called with a reason when it is seen to have ended (where that can be seen).
        Raises `NodeError` within a deadline of its own."""

    async def kill(self) -> None:
        """End what `launch` has started, and everything below it, at once. Nothing if there is none, or if the node
        cannot be reached: there the lease of the agent ends it."""

    async def close(self) -> None:
        """Release connections."""
