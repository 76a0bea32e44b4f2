"""Settings of the nodes (machines) of a run and their GPUs."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from darts_async.config.section import NonNegative, Seconds, Section


def _counted(devices: Any) -> Any:
    """A count n means the devices 0 to n - 1."""
    if isinstance(devices, (list, tuple)):
        return devices
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 0:
        raise ValueError(f"devices is {devices!r}; write how many there are, or list their numbers")
    return tuple(range(devices))


class SshConfig(Section):
    """How the launcher reaches a node when a run begins, or when the node is back. All later messages use the links of
    the run. Defaults are those of `ssh`: `~/.ssh/config`, the agent, the user's keys. The node's key must be known."""

    host: str | None = None
    """Name or address for ssh. Default: the node's `host`."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Default: that of `~/.ssh/config`, or 22."""
    user: str | None = None
    """User name on the node."""
    identity_file: str | None = None
    """Path of the private key."""
    known_hosts: str | None = None
    """Path of the file that holds the node's public key. Default: `~/.ssh/known_hosts`."""
    timeout_s: Seconds = 20.0
    """Time limit of connecting, and of each command."""


class NodeConfig(Section):
    """A machine. `darts-launch` runs on the first of the list, and reaches the others over ssh. All of them see
    `runs_dir` under the same path."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name that roles refer to."""
    host: str | None = None
    """Numeric address of the interface at which its processes listen. Default: `network.host`. With several nodes, each
    needs its own."""
    devices: Annotated[tuple[NonNegative, ...], BeforeValidator(_counted), Field(strict=False)] = ()
    """GPUs that the run may use: a count, or a list of their numbers as `nvidia-smi` shows them."""
    ssh: SshConfig = SshConfig()
    """How to reach it; not used for the first node."""
    python: str | None = None
    """Path of the Python on the node. Default: that of the launcher."""
    workdir: str | None = None
    """Working directory of its processes. Default: that of the launcher."""
    warm_start: bool = True
    """Whether its processes are forked from one that has imported everything, so that they are there at once. On
    systems other than Linux they are not."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables to add to the environment of its processes."""

    @field_validator("devices")
    @classmethod
    def _devices_are_distinct(cls, devices: tuple[int, ...]) -> tuple[int, ...]:
        twice = sorted({number for number in devices if devices.count(number) > 1})
        if twice:
            raise ValueError(f"device {twice[0]} is named twice in {list(devices)}; remove one of them")
        return devices


def _told_apart(nodes: tuple[NodeConfig, ...]) -> tuple[NodeConfig, ...]:
    """No two nodes share a name or an address: a device that is counted twice would be assigned twice."""
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
