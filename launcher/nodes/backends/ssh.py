"""Starts and kills keepers on other machines over ssh.

A connection lasts for one command. Later messages use the links of the run, so a node does not end with its connection.
The key of a node must be known; nothing is asked at the terminal.

The environment is sent as a line of JSON to the standard input of `launcher.nodes.exec_with_env`, which runs first on
the node. On a command line every user of the machine could read it.
"""

import asyncio
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import asyncssh
import msgspec

from darts_async.config import NodeConfig, SshConfig
from darts_async.machine.spawn import module_command
from launcher.nodes.backends import AgentCommand, NodeError
from launcher.nodes.fleet import COMES_UP_WITHIN_S

FORWARDED = ("PYTHONPATH", "LD_LIBRARY_PATH", "DARTS_FAULTS", "TOKENIZERS_PARALLELISM")
FORWARDED_PREFIXES = ("HF_", "NCCL_", "GLOO_", "VLLM_", "TORCH_", "CUDA_HOME", "CUDA_LAUNCH")
"""Variables of the launcher that a node gets too, unless its `env` sets them."""
_MAX_OUTPUT_CHARS = 400


class SshBackend:
    """Starts and kills the keeper of one node. `kill_command` ends it there."""

    def __init__(self, node: NodeConfig, host: str, kill_command: AgentCommand) -> None:
        self._node = node
        self._host = host
        self._kill_command = kill_command

    async def launch(self, command: AgentCommand, on_end: Callable[[str], None]) -> None:
        """Start the keeper, if it does not run, and wait for its agent. Its end is not seen."""
        await run_there(self._node, self._host, command, takes_s=COMES_UP_WITHIN_S)

    async def kill(self) -> None:
        """End the keeper. If the node cannot be reached, the lease ends it."""
        try:
            await run_there(self._node, self._host, self._kill_command)
        except NodeError:
            return

    async def close(self) -> None:
        """Nothing is open."""


async def run_there(
    node: NodeConfig, host: str, command: AgentCommand, words: Mapping[str, Any] | None = None, *, takes_s: float = 0.0
) -> str:
    """Run a command on a node, and return its output. Its standard input has its environment and then `words`, as JSON.
    `takes_s` is how long the command itself may wait. Raises `NodeError` if the node cannot be reached or refuses,
    or if the command fails or does not end in time."""
    address = f"{node.ssh.host or host}" + (f" port {node.ssh.port}" if node.ssh.port else "")
    forwarded = {name for name in os.environ if name in FORWARDED or name.startswith(FORWARDED_PREFIXES)}
    environment = {name: os.environ[name] for name in forwarded} | dict(command.env)
    text = "".join(msgspec.json.encode(part).decode() + "\n" for part in (environment, dict(words or {})))
    try:
        async with asyncio.timeout(2 * node.ssh.timeout_s + takes_s), await _connect(node, host) as connection:
            done = await connection.run(_shell_line(command), input=text, encoding="utf-8")
    except TimeoutError as error:
        raise NodeError(node.name, f"{address} does not answer within {node.ssh.timeout_s:g} s") from error
    except (OSError, asyncssh.Error, ValueError) as error:
        raise _why(node, address, error) from error
    if done.exit_status != 0:
        raise _failed(node, command, done)
    return str(done.stdout)


async def _connect(node: NodeConfig, host: str) -> asyncssh.SSHClientConnection:
    timeout_s = node.ssh.timeout_s
    return await asyncssh.connect(
        node.ssh.host or host,
        connect_timeout=timeout_s,
        login_timeout=timeout_s,
        keepalive_interval=5.0,
        **_options(node.ssh),
    )


def _options(ssh: SshConfig) -> dict[str, Any]:
    """Options of asyncssh, which finds the rest as ssh does."""
    options = {
        "port": ssh.port,
        "username": ssh.user,
        "client_keys": None if ssh.identity_file is None else [str(Path(ssh.identity_file).expanduser())],
        "known_hosts": None if ssh.known_hosts is None else str(Path(ssh.known_hosts).expanduser()),
    }
    return {name: value for name, value in options.items() if value is not None}


def _shell_line(command: AgentCommand) -> str:
    first = module_command("launcher.nodes.exec_with_env", *command.argv, python=command.argv[0])
    return f"cd {shlex.quote(command.cwd)} && exec {shlex.join(first)}"


def _why(node: NodeConfig, address: str, error: Exception) -> NodeError:
    setting = f"nodes: {node.name}.ssh"
    match error:
        case asyncssh.HostKeyNotVerifiable():
            known = node.ssh.known_hosts or "~/.ssh/known_hosts"
            fix = f"connect once with ssh and accept its key, or see that {known} has the right one"
            return NodeError(node.name, f"the key of {address} is not the known one: {error.reason}", fix)
        case asyncssh.PermissionDenied():
            who = f" {node.ssh.user!r}" if node.ssh.user else ""
            fix = f"see {setting}.user and identity_file"
            return NodeError(node.name, f"{address} refuses the user{who}: {error.reason}", fix)
        case asyncssh.KeyImportError() | asyncssh.ConfigParseError() | FileNotFoundError() | ValueError():
            return NodeError(node.name, f"a file of {setting} cannot be used: {error}", f"see {setting}")
        case asyncssh.Error():
            return NodeError(node.name, f"{address}: {error.reason}", f"try: ssh {node.ssh.host or address}")
        case _:
            fix = f"see nodes: {node.name}.host and {setting}"
            return NodeError(node.name, f"{address} cannot be reached: {error}", fix)


def _failed(node: NodeConfig, command: AgentCommand, done: asyncssh.SSHCompletedProcess) -> NodeError:
    said = " ".join(f"{done.stderr!s} {done.stdout!s}".split())[-_MAX_OUTPUT_CHARS:]
    if "cd:" in said and command.cwd in said:
        return NodeError(node.name, f"there is no directory {command.cwd}", f"set nodes: {node.name}.workdir")
    if done.exit_status == 127:
        return NodeError(node.name, f"there is no {command.argv[0]}", f"set nodes: {node.name}.python")
    if "nknown option" in said and "-P" in said:
        fix = f"set nodes: {node.name}.python to the version of this machine"
        return NodeError(node.name, f"{command.argv[0]} is older than Python 3.11", fix)
    if "No module named" in said:
        fix = f"install darts-async there, or set nodes: {node.name}.python to one that has it"
        return NodeError(node.name, f"{command.argv[0]} has no darts_async: {said}", fix)
    how = f"ended with exit code {done.exit_status}" if done.exit_status is not None else "was ended by a signal"
    return NodeError(node.name, f"{' '.join(command.argv[:5])} {how}: {said or 'it said nothing'}")
