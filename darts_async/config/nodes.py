"""The machines of a run, and the devices that a role takes on them."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from darts_async.config.section import NonNegative, Seconds, Section


def _counted(devices: Any) -> Any:
    """A count n stands for the devices 0 to n - 1."""
    if isinstance(devices, (list, tuple)):
        return devices
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 0:
        raise ValueError(f"devices is {devices!r}; write how many there are, or list their numbers")
    return tuple(range(devices))


class SshConfig(Section):
    """How a node is reached when a run begins, or when it is back. Afterwards all goes over the links of the run. What
    is left out is as `ssh` does it: `~/.ssh/config`, the agent, the user's keys; the node's key has to be known."""

    host: str | None = None
    """Name or address for ssh; without it, the node's `host`."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """22, or what `~/.ssh/config` says."""
    user: str | None = None
    """Who to be there."""
    identity_file: str | None = None
    """Path of the private key to use."""
    known_hosts: str | None = None
    """Path of the file that holds the node's public key; `~/.ssh/known_hosts` without it."""
    timeout_s: Seconds = 20.0
    """For connecting, and for each command."""


class NodeConfig(Section):
    """A machine. The first of the list is the one on which `darts-launch` is called; the others are reached over ssh.
    All see `runs_dir` under the same path."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """What roles call it."""
    host: str | None = None
    """Address of its interface, in numbers: its processes listen there and are reached there. Without it, that of
    `network.host`; where there are several nodes, each has its own."""
    devices: Annotated[tuple[NonNegative, ...], BeforeValidator(_counted), Field(strict=False)] = ()
    """GPUs that the run may use: how many, or a list of their numbers as `nvidia-smi` shows them."""
    ssh: SshConfig = SshConfig()
    """For every node but the first."""
    python: str | None = None
    """Path of the Python there; without it, that of the launcher."""
    workdir: str | None = None
    """Where its processes run; without it, the directory in which the launcher was called."""
    env: dict[str, str] = Field(default_factory=dict)
    """Added to the environment of its processes."""

    @field_validator("devices")
    @classmethod
    def _devices_are_distinct(cls, devices: tuple[int, ...]) -> tuple[int, ...]:
        twice = sorted({number for number in devices if devices.count(number) > 1})
        if twice:
            raise ValueError(f"device {twice[0]} is named twice in {list(devices)}; remove one of them")
        return devices


def _told_apart(nodes: tuple[NodeConfig, ...]) -> tuple[NodeConfig, ...]:
    """No two nodes have one name, nor one address: devices counted twice would be given out twice."""
    if not nodes:
        raise ValueError("the list of nodes is empty; name one, or leave the setting out")
    if len(nodes) == 1:
        return nodes
    names: dict[str, int] = {}
    hosts: dict[str, str] = {}
    for number, node in enumerate(nodes):
        if node.name in names:
            raise ValueError(f"nodes {names[node.name]} and {number} both have the name {node.name!r}; rename one")
        if node.host is None:
            raise ValueError(f"the node {node.name!r} has no host, but there are {len(nodes)} nodes; give its address")
        if node.host in hosts:
            raise ValueError(f"the nodes {hosts[node.host]!r} and {node.name!r} both have the host {node.host!r}")
        names[node.name], hosts[node.host] = number, node.name
    return nodes


Nodes = Annotated[tuple[NodeConfig, ...], Field(strict=False), AfterValidator(_told_apart)]
