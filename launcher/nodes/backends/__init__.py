"""Backends start the agent of a node: as a child on this machine (`local`), or over ssh on another one (`ssh`).

A backend does nothing else. All messages of agents use the link `agents`, which is the same for every backend.
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
    """A command to run on a node, with the launcher's Python and directory unless its settings name others."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the environment of the node."""
    cwd: str


class Backend(Protocol):
    """Starts the agent of one node."""

    async def launch(self, command: AgentCommand, on_end: Callable[[str], None]) -> None:
        """Start the agent, within a deadline. If its end is seen, `on_end` gets the reason. Raises `NodeError`."""

    async def kill(self) -> None:
        """End what `launch` has started, and its descendants. On a node out of reach the lease ends them later."""

    async def close(self) -> None:
        """Release connections."""
