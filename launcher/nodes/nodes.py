"""Starts the agents of nodes through their backends, and ends every node at the end of a run.

`Fleet` decides when to start an agent. Here a task per node does that, one launch at a time. Use `Nodes` with
`async with`. Leaving the block waits for keepers that were asked to end. After an error, or for nodes that did not obey
(`kill`), it ends them by force. So no process is left on a reachable node; on any other the keeper's lease ends them.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from darts_async.config import NodeConfig, RunConfig
from darts_async.machine.spawn import module_command
from darts_async.topology.plan import RunPlan
from darts_async.topology.roles import keeper_name
from darts_async.topology.run_files import LOGS_DIR, output_path
from launcher.nodes.backends import AgentCommand, Backend, NodeError
from launcher.nodes.backends.local import LocalBackend
from launcher.nodes.fleet import COMES_UP_WITHIN_S
from launcher.plan.placement import local_node
from launcher.plan.plan import imports_of, python_of


class Nodes:
    """The launches of all nodes."""

    def __init__(self, backends: Mapping[str, Backend], command_of: Callable[[str], AgentCommand]) -> None:
        self._backends = backends
        self._command_of = command_of
        self._news: list[tuple[str, str, bool]] = []  # at most two of each launch
        self._launches: dict[str, asyncio.Task[None]] = {}
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for launch in self._launches.values():
            launch.cancel()
        if error is not None:
            await self.kill(tuple(self._backends))
        await asyncio.gather(*(backend.close() for backend in self._backends.values()))
        await self._tasks.__aexit__(kind, error, trace)

    def launch(self, node: str) -> None:
        """Start the agent of a node. `take_news` has the result."""
        running = self._launches.get(node)
        if running is None or running.done():
            self._launches[node] = self._tasks.create_task(self._launch(node), name=f"launch the agent of {node}")

    def take_news(self) -> list[tuple[str, str, bool]]:
        """The nodes whose keepers have ended since the last call: each with the reason, and whether it had started."""
        news, self._news = self._news, []
        return news

    async def kill(self, nodes: Iterable[str]) -> None:
        await asyncio.gather(*(self._backends[node].kill() for node in nodes))

    async def _launch(self, node: str) -> None:
        try:
            await self._backends[node].launch(
                self._command_of(node), lambda reason: self._news.append((node, reason, True))
            )
        except NodeError as error:
            self._news.append((node, str(error), False))


def make_backends(config: RunConfig, plan: RunPlan, run_dir: Path) -> dict[str, Backend]:
    """How each node of the plan is reached."""
    return {node.name: _backend(config, node, run_dir) for node in config.nodes if node.name in plan.nodes}


def _backend(config: RunConfig, node: NodeConfig, run_dir: Path) -> Backend:
    if node == local_node(config):
        return LocalBackend(node.name, output_path(run_dir / LOGS_DIR, keeper_name(node.name)))
    from launcher.nodes.backends.ssh import SshBackend  # a run on one machine needs no ssh

    return SshBackend(node, config.host_of(node), keeper_command(config, run_dir, node.name, "--kill"))


def agent_command(config: RunConfig, run_dir: Path, node: str, *, life: int) -> AgentCommand:
    """The command of a node: its keeper, which starts its agent. On another machine it runs detached, under a lease."""
    options = ["--life", str(life), "--log-max-mb", str(config.telemetry.log_max_mb)]
    if next(found.warm_start for found in config.nodes if found.name == node):
        options += ["--warm", ",".join(imports_of(config, node))]
    if node != local_node(config).name:
        options += ["--detach", str(COMES_UP_WITHIN_S), "--lease-s", str(config.network.lease_s)]
    return keeper_command(config, run_dir, node, *options)


def keeper_command(config: RunConfig, run_dir: Path, node: str, *options: str) -> AgentCommand:
    [settings] = (found for found in config.nodes if found.name == node)
    whose = ("--run-dir", str(run_dir), "--node", node)
    argv = module_command("launcher.nodes.keeper", *whose, *options, python=python_of(config, node))
    return AgentCommand(argv, settings.env, settings.workdir or str(Path.cwd()))
